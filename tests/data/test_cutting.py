"""Giant texts in parts: the ids are those of the text encoded whole, or the text is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from megatron_iiet.data.tokenizers import base, cutting
from megatron_iiet.data.tokenizers.base import Tokenizer, UncuttableError
from megatron_iiet.data.tokenizers.cutting import SPACE, BetweenPieces, BetweenWords
from megatron_iiet.data.tokenizers.hard_texts import HARD_TEXTS
from megatron_iiet.data.tokenizers.hugging_face import cutting_of
from megatron_iiet.data.tokenizers.loading import load_encoder, load_tokenizer
from tests.data.inputs import make_texts
from tests.data.test_fast_encoder import llama_model, real_texts, train  # noqa: F401

WORDS = (
    "the",
    "of",
    "don't",
    "I'LL",
    "x2",
    "été",
    "世界",
    "a",
    "Q",
    "🙂",
    "12",
    "345",
    "_",
    "(",
    ")",
    "...",
    "'",
    "'s",
)
GAPS = (
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "",
    "",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\x1c",
    ".\n",
    "/\n",
)
TEXTS = st.lists(st.sampled_from(WORDS + GAPS) | st.characters(exclude_categories=["Cs"]), max_size=120).map(
    "".join
)


def llama_json(model: Path, folder: Path) -> Path:
    """A SentencePiece model as the tokenizer.json of LLaMA's kind: merges of all text, byte fallback."""
    from transformers import LlamaTokenizer

    converted = LlamaTokenizer.from_pretrained(str(model.parent), vocab_file=str(model), legacy=True)
    definition = json.loads(converted.backend_tokenizer.to_str())
    definition["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    definition["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": SPACE}, space],
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition))
    return path


def byte_level(folder: Path, pattern: str | None) -> Path:
    """A byte-level vocabulary with a pattern of words (None: that of GPT-2 as tokenizers has it)."""
    from tokenizers import Regex, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*make_texts(200), "don't I'll we'VE\n\n it's\n x  y\n" * 50], trainer)
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path


PATTERNS = {
    "gpt2": None,
    "cl100k": cutting.CL100K,
    "qwen": cutting.QWEN,
    "o200k": cutting.O200K,
    "tekken": cutting.TEKKEN,
}


@pytest.fixture(scope="module", params=["llama", "llama.json", "pieces over spaces", "no space", *PATTERNS])
def exact(
    request: pytest.FixtureRequest,
    llama_model: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("exact")
    make: dict[str, Callable[[], Path]] = {
        "llama": lambda: llama_model,
        "llama.json": lambda: llama_json(train(folder), folder),
        "pieces over spaces": lambda: train(folder, split_by_whitespace=False, split_by_unicode_script=False),
        "no space": lambda: train(folder, add_dummy_prefix=False, user_defined_symbols=["<x y>", "ab\ncd"]),
    }
    if request.param in PATTERNS:
        return load_tokenizer(byte_level(folder, PATTERNS[request.param]))
    return load_tokenizer(make[request.param]())


def in_parts(tokenizer: Tokenizer, text: str, size: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "MAX_PART_CHARACTERS", size)
        return tokenizer.encode_parts([text]).tolist()


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(text=TEXTS, size=st.integers(3, 40))
def test_parts_have_the_ids_of_the_whole(exact: Tokenizer, text: str, size: int) -> None:
    whole = exact.encode(text).tolist()
    assert in_parts(exact, text, size) == whole


@pytest.mark.slow
def test_every_place_of_real_texts(exact: Tokenizer) -> None:
    """Many cuts in each; hard ones, and those of this project and the standard library."""
    for text in (*HARD_TEXTS, *(text[:20_000] for text in real_texts()[::8])):
        assert in_parts(exact, text, 30) == exact.encode(text).tolist()


def test_texts_are_really_cut(exact: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_PART_CHARACTERS", 200)
    text = "So it is with words of letters and a line\nthat begins with one " * 50
    parts = list(exact.encode_pieces(text[start : start + 33] for start in range(0, len(text), 33)))
    assert len(parts) > 10
    assert np.concatenate(parts).tolist() == exact.encode(text[:180] + text[180:]).tolist()
    assert max(map(len, parts)) <= 200


def test_without_a_line_break_no_space_comes_in(exact: Tokenizer) -> None:
    """Once: a part began with the space that the model puts before every text."""
    text = "word " * 500
    assert in_parts(exact, text, 100) == exact.encode(text).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
    ids=str,
)
def test_what_has_no_proof_is_encoded_whole_or_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = load_tokenizer(train(tmp_path, **options))
    assert model.cutting is None
    text = " ".join(make_texts(3))
    assert in_parts(model, text, 20) == model.encode(text).tolist()
    model.max_uncut_bytes = len(text.encode()) - 1
    with pytest.raises(UncuttableError, match=r"no place for .* bytes where .*trained\.model may cut it"):
        in_parts(model, text, 20)
    model.max_uncut_bytes += 1
    assert in_parts(model, text, 20) == model.encode(text).tolist()


def test_a_text_without_a_place_is_refused(exact: Tokenizer) -> None:
    exact.max_uncut_bytes = 2000
    try:
        if isinstance(exact.cutting, BetweenWords):
            with pytest.raises(UncuttableError):
                in_parts(exact, "x" * 3000, 100)
        assert (
            in_parts(exact, "an end\nof lines " * 500, 100)
            == exact.encode("an end\nof lines " * 500).tolist()
        )
    finally:
        exact.max_uncut_bytes = base.MAX_UNCUT_BYTES


@pytest.mark.slow
def test_the_fast_encoder_cuts_as_well(exact: Tokenizer) -> None:
    fast = load_encoder(exact.path)
    for text in (*HARD_TEXTS, *make_texts(10), "word " * 300):
        assert in_parts(fast, text, 30) == exact.encode(text).tolist()


PIECES = {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": True}
DEFINITION = {
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": PIECES,
}
SYMBOL = {"content": "<x>", "special": False, "lstrip": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, BetweenWords),
        ({"normalizer": {"type": "NFC"}}, BetweenWords),
        ({"added_tokens": [SYMBOL]}, BetweenWords),
        ({"added_tokens": [SYMBOL | {"rstrip": True}]}, None),
        ({"added_tokens": [SYMBOL | {"content": "a b"}]}, None),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"pre_tokenizer": {"type": "Whitespace"}}, None),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, None),
        ({"model": {"type": "BPE", "vocab": {}, "dropout": 0.1}}, None),
        ({"pre_tokenizer": None}, BetweenPieces),
        ({"pre_tokenizer": None, "added_tokens": [SYMBOL]}, None),
        ({"pre_tokenizer": None, "normalizer": {"type": "NFC"}}, None),
        ({"pre_tokenizer": None, "model": PIECES | {"byte_fallback": False}}, None),
        ({"pre_tokenizer": None, "model": PIECES | {"ignore_merges": True}}, None),
        ({"pre_tokenizer": None, "model": {"type": "Unigram", "vocab": []}}, None),
    ],
    ids=str,
)  # fmt: skip
def test_which_definitions_are_understood(change: dict[str, Any], kind: type | None) -> None:
    found = cutting_of({**DEFINITION, **change})
    assert type(found) is (type(None) if kind is None else kind)


def test_no_lead_is_left() -> None:
    everything = ["".join(map(chr, range(32)))]
    assert BetweenPieces.of(everything, adds_space=True) is None
    assert BetweenPieces.of(everything, adds_space=False) is not None


@pytest.fixture(scope="module")
def tekken_file(llama_model: Path) -> Path:  # noqa: F811
    return llama_model.with_name("tekken_240911.json")


@pytest.mark.slow
def test_tekken_gives_the_ids_of_mistral_s_own_code(tekken_file: Path) -> None:
    ours, theirs = load_tokenizer(tekken_file), Tekkenizer.from_file(str(tekken_file))
    assert (
        (ours.vocab_size, ours.eod_id, ours.bos_id)
        == (131072, 2, 1)
        == (theirs.n_words, theirs.eos_id, theirs.bos_id)
    )
    for text in (*HARD_TEXTS, *make_texts(20), *(text[:5000] for text in real_texts()[::10])):
        assert ours.encode(text).tolist() == theirs.encode(text, bos=False, eos=False)
    text = " ".join(real_texts()[::20])
    assert in_parts(ours, text, 1000) == ours.encode(text).tolist()


def test_a_vocabulary_and_merges(tmp_path: Path) -> None:
    """As GPT-2's files are: the ids of the tokenizer.json that they were taken from."""
    definition = json.loads(byte_level(tmp_path, None).read_text())
    whole = load_tokenizer(tmp_path / "tokenizer.json")
    files = tmp_path / "files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    with pytest.raises(ValueError, match=r"whose merges, .*merges\.txt, are missing; put them beside it"):
        load_tokenizer(files / "vocab.json")
    merges = [" ".join(pair) for pair in definition["model"]["merges"]]
    (files / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours = load_tokenizer(files / "vocab.json")
    assert (ours.vocab_size, ours.eod_id) == (whole.vocab_size, whole.eod_id)
    for text in (*HARD_TEXTS, *make_texts(20)):
        assert ours.encode(text).tolist() == whole.encode(text).tolist()


def test_a_tekken_file_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text('{"config": {"pattern": "x"}, "vocab": []}')
    with pytest.raises(ValueError, match=r"tekken\.json is no tekken\.json \(KeyError"):
        load_tokenizer(tmp_path / "tekken.json")
