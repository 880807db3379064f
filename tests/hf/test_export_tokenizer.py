"""AutoTokenizer on an exported folder gives the ids that training saw; where it cannot, it gives none."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.cutting import CL100K
from megatron_iiet.data.tokenizers.hard_texts import hard_texts
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf import folders
from megatron_iiet.hf.chat import NAMED
from megatron_iiet.hf.generation import hugging_face_codec
from megatron_iiet.hf.tokenizer import Extras, extras_of_tokenizer
from tests.data.inputs import make_texts

TEXTS = (
    "",
    "two  spaces,   three",
    " leading and trailing ",
    "tab\tand\ttabs\t\t",
    "dos\r\nline ends\r\n\r\n",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "a\0b \0\0",
    "ends </s> in the <s>middle</s> <unk>",
    "▁ ▁▁a <0x0A>",
)


def llama_model() -> Path:
    """A real model of LLaMA's shape, with 32,000 ids."""
    package = find_spec("mistral_common")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def train(folder: Path, **options: Any) -> Path:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    usual = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2}
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = iter("\n".join(make_texts(300)).split("\n"))
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**usual, **exact, **options})
    (folder / "mine.model").write_bytes(model.getvalue())
    return folder / "mine.model"


def write(exported: Extras, folder: Path) -> Any:
    """The folder's tokenizer as our tools load it: all of a text is text."""
    folder.mkdir()
    for name, content in exported.files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


def assert_equal(loaded: Any, exact: Tokenizer, texts: Any) -> None:
    for text in texts:
        ids = exact.encode(text).tolist()
        assert loaded(text)["input_ids"] == ids, repr(text[:80])
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == exact.decode(ids), repr(text[:80])


def load(path: Path) -> Tokenizer:
    exact = load_tokenizer(path)
    assert isinstance(exact, Tokenizer)
    return exact


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    return write(extras_of_tokenizer(llama_model()), tmp_path_factory.mktemp("t") / "hf"), load(llama_model())


class TestSentencePiece:
    @pytest.mark.slow
    def test_llama_s(self, llama: tuple[Any, Tokenizer]) -> None:
        loaded, exact = llama
        assert (len(loaded), exact.vocab_size) == (32000, 32000)
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 2, 0)
        assert_equal(loaded, exact, [*TEXTS, *hard_texts(exact)])
        assert loaded("the end</s>")["input_ids"][-1] != 2
        assert loaded.decode([2, *exact.encode("a b").tolist(), 2], skip_special_tokens=True) == "a b"

    @pytest.mark.slow
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
    @given(
        text=st.text(max_size=100)
        | st.text(" \t\n▁-=a<s>/", max_size=100)
        | st.lists(st.sampled_from(["</s>", "<s>", "<0x0A>", "  ", "世", "é", "the", "\0", "\r\n"])).map(
            "".join
        )
    )
    def test_any_text(self, llama: tuple[Any, Tokenizer], text: str) -> None:
        assert_equal(*llama, [text])

    @pytest.mark.slow
    def test_the_end_of_a_text_can_be_written(self, llama: tuple[Any, Tokenizer]) -> None:
        """As fine-tuning appends it, by its name; other texts are as exact as they were."""
        loaded, exact = llama
        plain = AutoTokenizer.from_pretrained(loaded.name_or_path)
        assert plain("the end" + plain.eos_token)["input_ids"] == [*exact.encode("the end").tolist(), 2]
        assert_equal(plain, exact, [text for text in TEXTS if "<" not in text])

    @pytest.mark.slow
    def test_a_conversation_has_ends_of_texts_where_a_prompt_has_their_letters(
        self, llama: tuple[Any, Tokenizer]
    ) -> None:
        _, exact = llama
        loaded = AutoTokenizer.from_pretrained(llama[0].name_or_path, split_special_tokens=True)
        loaded.chat_template = NAMED["turns"]
        codec = hugging_face_codec(loaded, "eod")
        assert codec.chat is not None
        ids = codec.chat([{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}])
        before = exact.encode("### Assistant:\nyes").tolist()
        assert ids[: len(before) + 1] == [*before, 2]
        assert codec.encode("yes</s>") == [2, *exact.encode("yes</s>").tolist()]

    def test_batches_are_padded(self, llama: tuple[Any, Tokenizer]) -> None:
        loaded, exact = llama
        batch = loaded(["a", "a longer text"], padding=True, padding_side="left")
        ids = exact.encode("a").tolist()
        assert batch["input_ids"][0][-len(ids) :] == ids
        assert set(batch["input_ids"][0][: -len(ids)]) == {0}

    @pytest.mark.parametrize(
        ("options", "pad"), [({}, 0), ({"add_dummy_prefix": False}, 0), ({"pad_id": 3}, 3)], ids=str
    )
    def test_trained_here(self, tmp_path: Path, options: dict[str, Any], pad: int) -> None:
        path = train(tmp_path, **options)
        exported = extras_of_tokenizer(path)
        assert (exported.note, *exported.token_ids.values()) == ("", 2, 2, pad)
        assert exported.files["tokenizer.model"] == path.read_bytes()
        loaded = write(exported, tmp_path / "hf")
        assert loaded.pad_token_id == pad
        assert_equal(loaded, load(path), [*TEXTS, *make_texts(20)])
        again = extras_of_tokenizer(tmp_path / "hf" / "tokenizer.model")
        assert again == exported

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"model_type": "unigram"}, "it is not a BPE model"),
            ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
            ({"byte_fallback": False}, "it has no byte fallback"),
            ({"user_defined_symbols": ["<sep>"]}, "it has 1 user-defined symbols"),
        ],
        ids=str,
    )
    def test_says_what_no_file_can_stand_for(self, tmp_path: Path, options: dict[str, Any], why: str) -> None:
        """transformers converts a .model of its usual name by itself, and to other ids; here it refuses."""
        exported = extras_of_tokenizer(train(tmp_path, **options))
        assert set(exported.files) == {"sentencepiece.model", "tokenizer_config.json"}
        assert exported.note == (
            f"no tokenizer.json encodes as mine.model does: {why}. The folder has it as sentencepiece.model, "
            "for the sentencepiece library; AutoTokenizer finds none"
        )
        with pytest.raises(ValueError, match="instantiate"):
            write(exported, tmp_path / "hf")
        assert load(tmp_path / "hf" / "sentencepiece.model").eod_id == exported.token_ids["eos_token_id"]

    def test_a_declared_bos_stays(self, tmp_path: Path) -> None:
        path = train(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        exported = extras_of_tokenizer(path)
        assert [*exported.token_ids.values()][:2] == [1, 2]
        assert write(exported, tmp_path / "hf").bos_token == "<s>"


def byte_level(folder: Path, **more: Any) -> Path:
    """A byte-level tokenizer.json whose post-processor puts a token before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(make_texts(100), trainer)
    tokenizer.add_special_tokens([AddedToken("<|begin|>"), AddedToken("<|endoftext|>")])
    begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    tokenizer.save(str(folder / "mine.json"))
    return folder / "mine.json"


class TestTokenizerJson:
    def test_alone_it_adds_nothing(self, tmp_path: Path) -> None:
        path = byte_level(tmp_path)
        exact = load(path)
        exported = extras_of_tokenizer(path)
        assert (exported.note, *exported.token_ids.values())[:3] == ("", exact.eod_id, exact.eod_id)
        loaded = write(exported, tmp_path / "hf")
        assert_equal(loaded, exact, [*TEXTS, "a<|endoftext|>b <|begin|>"])
        assert loaded.eos_token == loaded.pad_token == "<|endoftext|>"

    def test_with_its_own_configuration_it_stays_as_it_is(self, tmp_path: Path) -> None:
        path = byte_level(tmp_path)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|endoftext|>",
            "model_max_length": 77,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        exported = extras_of_tokenizer(path)
        assert exported.files["tokenizer.json"] == path.read_bytes()
        assert exported.note == (
            "tokenizer_config.json is the tokenizer's own: transformers adds to a text what it says, which "
            "training here does not"
        )
        loaded = write(exported, tmp_path / "hf")
        assert loaded.model_max_length == 77
        assert [loaded.bos_token_id, loaded.eos_token_id] == [*exported.token_ids.values()][:2]
        assert loaded("a", add_special_tokens=False)["input_ids"] == load(path).encode("a").tolist()


def test_tiktoken_ranks_become_a_tokenizer_json(tmp_path: Path) -> None:
    from base64 import b64encode

    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the", b"  "]
    lines = [f"{b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (tmp_path / "mine.model").write_text("\n".join(lines))
    side = {"pattern": CL100K, "special_tokens": {"<|endoftext|>": 300}}
    (tmp_path / "mine.model.json").write_text(json.dumps(side))
    exported = extras_of_tokenizer(tmp_path / "mine.model")
    assert (*exported.token_ids.values(), exported.note) == (300, 300, 300, "")
    loaded = write(exported, tmp_path / "hf")
    assert_equal(loaded, load(tmp_path / "mine.model"), [*TEXTS, "the  theory</s><|endoftext|>."])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer; give one with --tokenizer, or put it there$"):
        folders.load_tokenizer(tmp_path)
