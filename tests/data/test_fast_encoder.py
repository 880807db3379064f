"""gigatoken in the place of the exact tokenizers: the same ids, or not used and a reason."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.tokenizers.base import NotSupportedError, Tokenizer
from megatron_iiet.data.tokenizers.fast import BoundedEncoder, FastEncoder, fast_encoder
from megatron_iiet.data.tokenizers.hard_texts import HARD_TEXTS, hard_texts
from megatron_iiet.data.tokenizers.loading import load_encoder, load_tokenizer
from megatron_iiet.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.data.inputs import make_texts

FAST = "gigatoken (checked against sentencepiece)"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama_model() -> Path:
    """A real model of LLaMA's shape, with 32,000 ids."""
    package = find_spec("mistral_common")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="session")
def llama(llama_model: Path) -> tuple[Tokenizer, Tokenizer]:
    encoder = load_encoder(llama_model)
    assert encoder.name == FAST
    return SentencePieceTokenizer(llama_model), encoder


def real_texts() -> list[str]:
    files = sorted(path for pattern in ("*.md", "docs/**/*.md", "csrc/**/*.*") for path in ROOT.glob(pattern))
    library = sorted(Path(json.__file__).parents[1].glob("*/*.py"))  # the standard library's packages
    return [path.read_text(encoding="utf-8", errors="replace") for path in [*files[:60], *library[:150]]]


def train(folder: Path, more_text: str = "", **options: Any) -> Path:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    usual = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2}
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = iter([*"\n".join(make_texts(300)).split("\n"), *[more_text] * 300])
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**usual, **exact, **options})
    (folder / "trained.model").write_bytes(model.getvalue())
    return folder / "trained.model"


class TestEquality:
    @pytest.mark.slow
    def test_real_texts(self, llama: tuple[Tokenizer, Tokenizer]) -> None:
        exact, fast = llama
        texts = real_texts()
        assert sum(map(len, texts)) > 1_000_000
        for text in texts:
            assert fast.encode(text).tolist() == exact.encode(text).tolist()

    @pytest.mark.slow
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
    @given(
        text=st.text(max_size=200)
        | st.text(" \t\n▁-=a<s>/", max_size=200)
        | st.lists(st.sampled_from(["</s>", "<s>", "<0x0A>", "  ", "--", "世", "é", "the", "\0"])).map(
            "".join
        )
    )
    def test_any_text(self, llama: tuple[Tokenizer, Tokenizer], text: str) -> None:
        exact, fast = llama
        assert fast.encode(text).tolist() == exact.encode(text).tolist()

    @pytest.mark.parametrize("text", ["</s>", "a</s>b<s>", "x <unk> </s></s>", "<0x00>", "line</s>\n<s>line"])
    def test_control_pieces_in_text_stay_text(self, llama: tuple[Tokenizer, Tokenizer], text: str) -> None:
        exact, fast = llama
        assert fast.encode(text).tolist() == exact.encode(text).tolist()
        assert not {0, 1, 2} & set(fast.encode(text).tolist())
        assert fast.decode(fast.encode(text)) == text

    @pytest.mark.slow
    def test_giant_text(self, llama: tuple[Tokenizer, Tokenizer]) -> None:
        exact, fast = llama
        text = "many words\n and  more</s>\n" * 100_000
        assert fast.encode(text).tolist() == exact.encode(text).tolist()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"add_dummy_prefix": False},
            {"split_by_whitespace": False, "split_by_unicode_script": False},
            {"control_symbols": ["<im>", "[INST]"], "pad_id": 3},
        ],
        ids=["plain", "no prefix", "pieces with spaces inside", "more control pieces"],
    )
    def test_other_models(self, tmp_path: Path, options: dict[str, Any]) -> None:
        model = train(tmp_path, **options)
        exact, fast = load_tokenizer(model), load_encoder(model, make_texts(20))
        assert fast.name == FAST
        for text in [*make_texts(50, seed=5), "  <im>[INST] </s>", "[INST]\n\n<pad>"]:
            assert fast.encode(text).tolist() == exact.encode(text).tolist()

    @pytest.mark.parametrize("name", ["<im>", "<0x41>"])
    def test_pieces_that_would_merge_into_a_special_one(self, tmp_path: Path, name: str) -> None:
        options = {"split_by_unicode_script": False, "split_by_number": False}
        lines = f"a {name[:-1]} b {name[1:]} c {name[:-1]} {name[1:]}"
        model = train(tmp_path, lines, control_symbols=["<im>"], **options)
        exact, fast = load_tokenizer(model), load_encoder(model)
        assert fast.name == FAST
        pieces = [exact.decode([number]) for number in exact.encode(f"{name} {name}")]
        assert {name[:-1], name[1:]} & set(pieces)
        assert fast.encode(f"a{name} {name}").tolist() == exact.encode(f"a{name} {name}").tolist()

    def test_symbols_looked_for_in_text(self, tmp_path: Path) -> None:
        model = train(tmp_path, user_defined_symbols=["<sep>", "ba"])
        exact, fast = load_tokenizer(model), load_encoder(model, [])
        assert fast.name == FAST
        symbol = exact.encode("<sep>")[-1]
        for text in ["a<sep>b", "<sep>", "baba <se p>", " <sep> <sep", *make_texts(20)]:
            assert fast.encode(text).tolist() == exact.encode(text).tolist()
        assert symbol in fast.encode("a <sep> b")

    def test_hugging_face(self, tokenizer_json: Path) -> None:
        exact, fast = load_tokenizer(tokenizer_json), load_encoder(tokenizer_json, make_texts(20))
        assert fast.name == "gigatoken (checked against tokenizers)"
        for text in [*real_texts()[:20], *make_texts(20), "a<|endoftext|>b<s>"]:
            assert fast.encode(text).tolist() == exact.encode(text).tolist()

    def test_hugging_face_added_tokens(self, tokenizer_json: Path, tmp_path: Path) -> None:
        definition = json.loads(tokenizer_json.read_text())
        definition["added_tokens"].append({**definition["added_tokens"][0], "id": 500, "content": "[sep]"})
        definition["added_tokens"][-1]["special"] = False
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(definition))
        exact, fast = load_tokenizer(path), load_encoder(path)
        assert fast.name == "gigatoken (checked against tokenizers)"
        assert 500 in fast.encode("ba[sep]ce")
        assert fast.encode("ba[sep]ce</s>").tolist() == exact.encode("ba[sep]ce</s>").tolist()


class TestFallback:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"model_type": "unigram"}, "it is not a BPE model"),
            ({"byte_fallback": False}, "it has no byte fallback"),
            ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
            ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
            ({"treat_whitespace_as_suffix": True}, "it writes spaces behind words"),
            ({"user_defined_symbols": ["a▁b"]}, "a user-defined symbol has a space"),
            ({"user_defined_symbols": [f"<{i}>" for i in range(40)]}, "it has 40 user-defined symbols"),
        ],
    )
    def test_reason(self, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
        model = train(tmp_path, **options)
        encoder = load_encoder(model, make_texts(3))
        assert encoder.name == f"sentencepiece (not gigatoken: {reason})"
        assert pickle.loads(pickle.dumps(encoder)).name == encoder.name
        assert encoder.encode("ba ce").tolist() == load_tokenizer(model).encode("ba ce").tolist()

    def test_unused_pieces(self, sentencepiece_model: Path, tmp_path: Path) -> None:
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2  # made by protobuf, without types
        model = proto.ModelProto.FromString(sentencepiece_model.read_bytes())
        model.pieces[300].type = model.pieces[300].UNUSED
        path = tmp_path / "unused.model"
        path.write_bytes(model.SerializeToString())
        assert load_encoder(path).name == "sentencepiece (not gigatoken: it has unused pieces)"

    def test_without_gigatoken(self, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gigatoken", None)
        encoder = load_encoder(sentencepiece_model)
        assert encoder.name.startswith("sentencepiece (not gigatoken: it cannot be imported")
        assert encoder.encode("ba ce").size

    @pytest.mark.parametrize(
        "definition", [b"", b"{}", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}']
    )
    def test_failure(self, sentencepiece_model: Path, definition: bytes) -> None:
        with pytest.raises(NotSupportedError, match=r"it failed with|its ids differ"):
            fast_encoder(_Redefined(sentencepiece_model, definition), [])

    @pytest.mark.slow
    def test_other_ids_on_hard_texts(self, llama_model: Path) -> None:
        definition = json.loads(SentencePieceTokenizer(llama_model).gigatoken_definition()[0])
        merges = definition["model"]["merges"]
        definition["model"]["merges"] = [merge for merge in merges if merge != ["▁", "▁"]]
        with pytest.raises(NotSupportedError, match="its ids differ for"):
            fast_encoder(_Redefined(llama_model, json.dumps(definition).encode()), [])

    @pytest.mark.slow
    def test_other_ids_on_the_sample(self, llama_model: Path) -> None:
        """A piece that no hard text has, taken away: only the corpus itself can show it."""
        exact = SentencePieceTokenizer(llama_model)
        definition = json.loads(exact.gigatoken_definition()[0])
        seen = {piece for text in hard_texts(exact) for piece in exact.encode(text).tolist()}
        unseen = next(
            piece
            for piece in range(20_000, 32_000)
            if piece not in seen and piece in exact.encode("some " + exact.decode([piece]))
        )
        name = next(text for text, number in definition["model"]["vocab"].items() if number == unseen)
        merges = definition["model"]["merges"]
        definition["model"]["merges"] = [merge for merge in merges if "".join(merge) != name]
        redefined = _Redefined(llama_model, json.dumps(definition).encode())
        fast_encoder(redefined, ["nothing of it"])
        with pytest.raises(NotSupportedError, match="its ids differ for 'some"):
            fast_encoder(redefined, ["nothing of it", "some " + exact.decode([unseen])])

    @pytest.mark.slow
    def test_sample_is_read_no_further_than_needed(self, llama_model: Path) -> None:
        def documents() -> Iterator[str]:
            yield "broken \ud83d"
            yield "x " * 300_000
            yield "y " * 300_000
            raise AssertionError("read on")

        assert load_encoder(llama_model, documents()).name == FAST

    def test_errors_of_the_sample_come_through(self, sentencepiece_model: Path) -> None:
        def documents() -> Iterator[str]:
            yield "good"
            raise ValueError("line 2 is bad")

        with pytest.raises(ValueError, match="line 2 is bad"):
            load_encoder(sentencepiece_model, documents())


class _Redefined(SentencePieceTokenizer):
    """Gives gigatoken something else than its own vocabulary."""

    def __init__(self, path: Path, definition: bytes) -> None:
        super().__init__(path)
        self._definition = definition

    def gigatoken_definition(self) -> tuple[bytes, tuple[str, ...]]:
        return self._definition, ()


class TestControlIds:
    def test_refused_when_they_come_through(self, llama_model: Path) -> None:
        exact = SentencePieceTokenizer(llama_model)
        definition = json.loads(exact.gigatoken_definition()[0])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"] = [{"id": 2, "content": "</s>", "special": True, **flags}]
        del definition["model"]["vocab"]["\0" + "2"]
        definition["model"]["vocab"]["</s>"] = 2
        leaky = FastEncoder(exact, json.dumps(definition).encode(), ())
        assert leaky.encode("a s").size
        for encode in (
            leaky.encode,
            lambda text: leaky.encode_batch([text]),
            lambda text: leaky.encode_parts([text]),
        ):
            with pytest.raises(RuntimeError, match=r"made control id 2 of plain text with .*model\.v1"):
                encode("a</s>b")

    def test_ids_beyond_the_vocabulary(self, llama_model: Path) -> None:
        exact = SentencePieceTokenizer(llama_model)
        exact.vocab_size = 1000
        with pytest.raises(RuntimeError, match=r"made id \d+ of a text, but .* has 1000 ids"):
            exact.encode("the longest of all words")


class TestWorkers:
    def test_pickle_loads_nothing_else(self, llama: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> None:
        exact, fast = llama
        (tmp_path / "encoder").write_bytes(pickle.dumps(fast))
        script = (
            "import pickle, sys\n"
            f"encoder = pickle.load(open({str(tmp_path / 'encoder')!r}, 'rb'))\n"
            "print(encoder.name)\n"
            "print(encoder.encode('Some  text</s>').tolist())\n"
            "heavy = 'torch transformers awkward pandas tokenizers sentencepiece datasets google.protobuf'\n"
            "print([name for name in heavy.split() if name in sys.modules])"
        )
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert output.stdout.splitlines() == [FAST, str(exact.encode("Some  text</s>").tolist()), "[]"], (
            output
        )

    def test_decodes_after_pickling(self, llama: tuple[Tokenizer, Tokenizer]) -> None:
        copy = pickle.loads(pickle.dumps(llama[1]))
        assert copy.decode(copy.encode("Some  text")) == "Some  text"


class TestMemory:
    def grown(self, definition: Path, limit: int) -> tuple[int, int]:
        """(bytes that a process grows by on 20 MB of words that never repeat, loads) with the given limit."""
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "import numpy as np\n"
            "from megatron_iiet.data.tokenizers import fast\n"
            f"encoder = fast.BoundedEncoder(Path({str(definition)!r}).read_bytes(), {limit})\n"
            "encoder.encode('load')\n"
            "start, most, loads = fast._private_memory(), 0, 1\n"
            "for block in range(60):\n"
            "    numbers = np.random.default_rng(block).integers(0, 1 << 40, 25_000)\n"
            "    encoder.encode(' '.join(map(hex, numbers)))\n"
            "    most = max(most, fast._private_memory())\n"
            "    loads += encoder._encode is None\n"
            "print(most - start, loads)"
        )
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        growth, loads = map(int, output.stdout.split())
        return growth, loads

    @pytest.mark.slow
    def test_bounded(self, llama_model: Path, tmp_path: Path) -> None:
        definition = tmp_path / "definition"
        definition.write_bytes(SentencePieceTokenizer(llama_model).gigatoken_definition()[0])
        bounded, loads = self.grown(definition, 40 << 20)
        unbounded, once = self.grown(definition, 1 << 40)
        assert loads > 3
        assert once == 1
        assert bounded < 120 << 20 < 150 << 20 < unbounded

    def test_same_ids_after_forgetting(self, llama: tuple[Tokenizer, Tokenizer]) -> None:
        exact, _ = llama
        encoder = BoundedEncoder(exact.gigatoken_definition()[0], limit=-(1 << 40))
        text = "Words and words, 12345\n" * 12_000
        expected = exact.encode(text).tolist()
        for _ in range(3):
            assert encoder.encode(text).tolist() == expected
            assert encoder._encode is None


def test_hard_texts_hold_every_control_piece(llama_model: Path) -> None:
    texts = list(hard_texts(SentencePieceTokenizer(llama_model)))
    for piece in ("<unk>", "<s>", "</s>"):
        assert piece in texts
        for around in (f"a{piece}b", f" {piece} {piece[:-1]} {piece[1:]}{piece}{piece}\n{piece}"):
            assert around in texts
    assert len(set(islice(texts, 2000))) > 1000


def test_hard_texts_hold_runs_and_the_vocabulary(llama_model: Path) -> None:
    tokenizer = SentencePieceTokenizer(llama_model)
    texts = list(hard_texts(tokenizer))
    assert texts[: len(HARD_TEXTS)] == list(HARD_TEXTS)
    for character in (" ", "\t", "\n", "\\", "0", "a", "▁", "é", "世", "🙂"):
        runs = [text for text in texts if text and set(text) == {character}]
        assert {1, 7, 73, 79} <= set(map(len, runs))
        assert any(f"{character * 39}a{character * 39}" in text for text in texts)
        assert any(text.startswith(f"{character}a{character}\n{character * 2}a") for text in texts)
    size = tokenizer.vocab_size
    pieces = {tokenizer.decode(np.array([i])) for i in range(size) if i not in tokenizer.control_ids}
    whole, together = set(texts), "\0".join(texts)
    assert sum(piece in together for piece in pieces) > min(7900, 0.95 * size), "of 8,000 and fewer, each"
    assert 900 < sum(piece * 7 in whole for piece in pieces) <= 1000 + len(runs)
    assert texts == list(hard_texts(tokenizer)), "the same every time"
