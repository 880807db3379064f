"""Both kinds of tokenizer: round trips, no control ids from text, giant texts, clear refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data import tokenizer as tokenizer_module
from megatron_iiet.data.tokenizer import Tokenizer, load_tokenizer, split_text
from megatron_iiet.data.tokenizer_training import train_tokenizer
from tests.data.inputs import jsonl, make_texts

HARD_TEXTS = [
    "two  spaces",
    " leading",
    "tab\tand\r\nline ends\n\n",
    "a\0b",
    "👩‍👩‍👧 世界 é",
    "<s> </s> <unk> <|endoftext|> <0x0A>",
    "▁",
    "",
]


@pytest.fixture(params=["sentencepiece_model", "tokenizer_json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def test_properties(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 500
    assert {tokenizer.eod_id, tokenizer.bos_id} < {0, 1, 2}


@pytest.mark.parametrize("text", [*HARD_TEXTS, *make_texts(5, seed=7)])
def test_round_trip_without_control_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert not {tokenizer.eod_id, tokenizer.bos_id} & set(ids.tolist())
    if text != "▁":  # SentencePiece's own mark for a space
        assert tokenizer.decode(ids) == text


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(HARD_TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in HARD_TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_control_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("ba ce"), tokenizer.eod_id]) == "ba ce"


def test_pickles(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("ba ce").tolist() == tokenizer.encode("ba ce").tolist()


def test_giant_texts_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(make_texts(30))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "MAX_PART_CHARACTERS", 200)
    monkeypatch.setattr(split_text, "__defaults__", (200,))
    assert tokenizer.encode(text).tolist() == whole.tolist()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab\n", max_size=60), limit=st.integers(2, 10))
def test_split_text(text: str, limit: int) -> None:
    parts = list(split_text(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts) or parts == [""]


class TestLoading:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"The tokenizer .*no\.model is missing; give a SentencePiece"):
            load_tokenizer(tmp_path / "no.model")
        with pytest.raises(ValueError, match="is a folder; give"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("a.model", "not a SentencePiece model"), ("a.json", "not a Hugging Face tokenizer file")],
    )
    @pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"{}"])
    def test_other_files(self, tmp_path: Path, name: str, message: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)

    def save_words(self, folder: Path, *special: str) -> Path:
        """A word-level tokenizer, the kind in which text can spell a control token."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, pre_tokenizers

        fast = Fast(
            models.WordLevel({"[UNK]": 0, "a": 1, **{s: i + 2 for i, s in enumerate(special)}}, "[UNK]")
        )
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast.save(str(folder / "tokenizer.json"))
        return folder / "tokenizer.json"

    def test_no_end_of_document(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no end-of-document token"):
            load_tokenizer(self.save_words(tmp_path))

    def test_text_that_becomes_control_ids(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"turns the plain text '</s>' into control id 2"):
            load_tokenizer(self.save_words(tmp_path, "</s>"))

    def test_declared_tokens(self, tokenizer_json: Path, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(tokenizer_json.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
        assert load_tokenizer(path).eod_id == 0
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
            load_tokenizer(path)


class TestTraining:
    def test_shape(self, sentencepiece_model: Path) -> None:
        tokenizer = load_tokenizer(sentencepiece_model)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (500, 1, 2)
        assert len(tokenizer.encode("1234")) >= 4  # digits stand alone

    def test_too_little_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["few words"]))
        with pytest.raises(ValueError, match=r"Training 5000 pieces on 9 characters failed .*--vocab-size"):
            train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", vocab_size=5000)
        assert not list(tmp_path.glob("t*"))

    def test_bad_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(make_texts(30)) + b'{"text": 5}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 31: 'text' is"):
            train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", vocab_size=300)
        assert not list(tmp_path.glob("t*"))

    def test_reads_no_more_than_asked(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(make_texts(300)))
        result = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 300, max_characters=5000)
        assert 5000 <= result.characters < 5200
        assert result.path.exists()
