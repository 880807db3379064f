"""All kinds of tokenizer: round trips, no control ids from text, giant texts, clear refusals."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.hard_texts import HARD_TEXTS as HARDER_TEXTS
from megatron_iiet.data.tokenizers.loading import (
    check_eod_token,
    load_encoder,
    load_tokenizer,
    tokenizer_digest,
)
from megatron_iiet.data.tokenizers.tiktoken import PRESETS, read_ranks
from megatron_iiet.data.tokenizers.training import train_tokenizer
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


@cache
def _load_once(load: Callable[[Path], Tokenizer], path: Path) -> Tokenizer:
    return load(path)


@pytest.fixture(scope="session")
def ranks_file(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary of ``tokenizer_json`` as tiktoken ranks."""
    vocabulary = json.loads(tokenizer_json.read_text())["model"]["vocab"]
    characters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in characters}
    byte_of |= {chr(0x100 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*characters}))}
    ordered = sorted((number, text) for text, number in vocabulary.items() if number > 1)
    path = tmp_path_factory.mktemp("tiktoken") / "small.tiktoken"
    path.write_bytes(
        b"".join(
            base64.b64encode(bytes(map(byte_of.__getitem__, text))) + f" {rank}\n".encode()
            for rank, (_, text) in enumerate(ordered)
        )
    )
    special_tokens = {"<|begin_of_text|>": 498, "<|end_of_text|>": 499}
    side_file = {"pattern": PRESETS["cl100k"]["pattern"], "special_tokens": special_tokens}
    (path.parent / "small.tiktoken.json").write_text(json.dumps(side_file))
    return path


@pytest.fixture(params=["sentencepiece_model", "tokenizer_json", "ranks_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def test_properties(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 500
    assert {tokenizer.eod_id, tokenizer.bos_id} < {0, 1, 2} or (tokenizer.bos_id, tokenizer.eod_id) == (
        498,
        499,
    )


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
    assert copy.name == tokenizer.name
    assert copy.encode("ba ce").tolist() == tokenizer.encode("ba ce").tolist()


def test_no_parts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_parts([]).tolist() == []
    assert tokenizer.encode_parts(["", "ba ce", ""]).tolist() == tokenizer.encode("ba ce").tolist()


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, load_encoder(tokenizer.path).encode):
        with pytest.raises(
            ValueError, match=r"lone surrogate '\\ud83d' at character 6 \('broken\\ud83dtext'\)"
        ):
            encode("broken\ud83dtext")


class TestLoading:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"The tokenizer .*no\.model is missing; give a SentencePiece"):
            load_tokenizer(tmp_path / "no.model")
        with pytest.raises(ValueError, match="is a folder; give"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.model", b"", "not a SentencePiece model"),
            ("a.model", b"not a tokenizer", "not a SentencePiece model"),
            ("a.model", b"{}", "not a Hugging Face tokenizer file"),
            ("a.json", b"", "not a Hugging Face tokenizer file"),
            ("a.json", b"\xff", "not a Hugging Face tokenizer file"),
            ("a.json", b"{}", "not a Hugging Face tokenizer file"),
            ("a.tiktoken", b"", "has no rank for 256 of the 256 single bytes, such as 0x00"),
            ("a.tiktoken", b"{}", r"a\.tiktoken, line 1: b'\{\}' is no base64 token and rank"),
            ("a.model", b"QQ== 0\nQg 1\n", r"a\.model, line 2: b'Qg 1' is no base64 token and rank"),
            ("a.model", b"QQ== 0\n\nQQ== 1\n", r"a\.model, line 3: the token or rank of b'QQ== 1' was given"),
            ("a.model", b"QQ== 0\nQg== 0\n", r"line 2: the token or rank of b'Qg== 0' was given before"),
        ],
    )
    def test_other_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
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
        (tmp_path / "tokenizer_config.json").write_text("[]")
        with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list, not an object"):
            load_tokenizer(path)

    def test_end_of_document_as_a_symbol(self, tmp_path: Path) -> None:
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(make_texts(300)),
            model_writer=model,
            model_type="bpe",
            vocab_size=500,
            user_defined_symbols=["</s>"],
            minloglevel=2,
        )
        (tmp_path / "a.model").write_bytes(model.getvalue())
        with pytest.raises(ValueError, match=r"a\.model has no eos piece to end documents with"):
            load_tokenizer(tmp_path / "a.model")


class TestTiktoken:
    def words(self, text: str) -> list[str]:
        """The cl100k pattern on text of ASCII letters, digits, spaces and line breaks, written anew."""
        import re

        return re.findall(
            r"'(?:[sdmtSDMT]|ll|ve|re)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            text,
        )

    def merged(self, word: bytes, ranks: dict[bytes, int]) -> list[int]:
        """Byte pair encoding as its definition goes: again and again the first of the best pairs."""
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            joined = [ranks.get(left + right, 1 << 30) for left, right in pairwise(parts)]
            best = min(joined)
            if best == 1 << 30:
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ranks[part] for part in parts]

    @given(
        text=st.text("abc deho \n\t1290.,-'s", max_size=80)
        | st.integers(0, 10_000).map(lambda seed: make_texts(1, seed)[0].replace("é世", ""))
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_against_the_definition(self, ranks_file: Path, text: str) -> None:
        ranks = read_ranks(ranks_file)
        expected = [piece for word in self.words(text) for piece in self.merged(word.encode(), ranks)]
        assert _load_once(load_tokenizer, ranks_file).encode(text).tolist() == expected
        assert _load_once(load_encoder, ranks_file).encode(text).tolist() == expected

    @pytest.mark.parametrize("preset", [None, *PRESETS])
    def test_against_tiktoken(self, ranks_file: Path, tmp_path: Path, preset: str | None) -> None:
        tiktoken = pytest.importorskip("tiktoken")
        path = tmp_path / "tokenizer.model"  # LLaMA-3's name for it
        unreachable = base64.b64encode(b"zqxj") + b" 498\n"  # no two tokens make it up
        path.write_bytes(ranks_file.read_bytes() + unreachable)
        used: dict[str, Any] = {"pattern": r"\p{L}+|\P{L}", "special_tokens": {"<eos>": 1000}}
        if preset:  # whose own ranks are many more
            used = PRESETS[preset]
        (tmp_path / "tokenizer.model.json").write_text(json.dumps(used))
        theirs = tiktoken.Encoding(
            "theirs",
            pat_str=used["pattern"],
            mergeable_ranks=read_ranks(path),
            special_tokens=used["special_tokens"],
        )
        ours, fast = load_tokenizer(path), load_encoder(path)
        assert ours.eod_id in theirs._special_tokens.values()
        assert ours.vocab_size == used.get("vocab_size", max(used["special_tokens"].values()) + 1)
        for text in [
            *HARDER_TEXTS,
            *make_texts(10),
            "it's IT'S we'll 12345\r\n\r\n x",
            "zqxj zqxj",
            "<eos><|endoftext|>",
        ]:
            assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
            assert fast.encode(text).tolist() == theirs.encode_ordinary(text)

    @pytest.mark.parametrize(
        ("preset", "words"),
        [
            ("cl100k", "don|'t| HelloWorld|  | (|123|45|).\n|//|x| \n\n| é|世"),
            ("llama3", "don|'t| HelloWorld|  | (|123|45|).\n|//|x| \n\n| é|世"),
            ("o200k", "don't| Hello|World|  | (|123|45|).\n//|x| \n\n| é|世"),
        ],
    )
    def test_words_of_presets(self, preset: str, words: str) -> None:
        """What is known of the published encodings; letters of all scripts make one word."""
        regex = pytest.importorskip("regex")
        expected = words.replace("é|世", "é世").split("|")
        assert regex.findall(PRESETS[preset]["pattern"], "".join(expected)) == expected

    def test_every_byte_of_a_text_comes_back(self, ranks_file: Path) -> None:
        """Of all control characters, and of letters of two and three bytes, which have all others in them."""
        tokens = {rank: token for token, rank in read_ranks(ranks_file).items()}
        text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x11000, 997)]))
        for tokenizer in (load_tokenizer(ranks_file), load_encoder(ranks_file)):
            ids = tokenizer.encode(text).tolist()
            assert b"".join(tokens[number] for number in ids) == text.encode()

    def test_special_tokens_of_presets(self) -> None:
        """As the files' makers published them: an id off by one is another token."""
        assert {name: preset["special_tokens"] for name, preset in PRESETS.items()} == {
            "cl100k": {
                "<|endoftext|>": 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
            "o200k": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
            "llama3": {
                "<|begin_of_text|>": 128000,
                "<|end_of_text|>": 128001,
                "<|start_header_id|>": 128006,
                "<|end_header_id|>": 128007,
                "<|eot_id|>": 128009,
            },
            "llama4": {
                "<|begin_of_text|>": 200000,
                "<|end_of_text|>": 200001,
                "<|header_start|>": 200005,
                "<|header_end|>": 200006,
                "<|eot|>": 200008,
            },
        }

    def test_ranks_of_presets(self) -> None:
        """What tells the published files apart; LLaMA-3's begins with all of cl100k's."""
        ranks = {name: preset["ranks"] for name, preset in PRESETS.items()}
        assert ranks == {"cl100k": 100256, "o200k": 199998, "llama3": 128000, "llama4": 200000}
        for preset in PRESETS.values():
            assert preset["ranks"] <= min(preset["special_tokens"].values())

    def test_a_preset_wants_its_own_ranks(
        self, ranks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whole: not cut, not more, not another preset's, whatever of the preset is overridden."""
        path, lines = tmp_path / "a.tiktoken", ranks_file.read_bytes().splitlines(keepends=True)
        (tmp_path / "a.tiktoken.json").write_text('{"preset": "small", "special_tokens": {"<eos>": 600}}')
        monkeypatch.setitem(PRESETS, "small", {**PRESETS["cl100k"], "ranks": len(lines)})
        monkeypatch.setitem(PRESETS, "smaller", {**PRESETS["cl100k"], "ranks": len(lines) - 20})
        path.write_bytes(b"".join(lines))
        assert load_tokenizer(path).eod_id == 600
        for content, said in (
            (lines[:-1], f"has {len(lines) - 1} ranks, but the preset 'small' of .* has {len(lines)}; fetch"),
            ([*lines, base64.b64encode(b"zqxj") + b" 498\n"], f"has {len(lines) + 1} ranks, but"),
            (lines[:-20], "as smaller has; give that preset, or write pattern"),
            ([*lines[:-1], lines[-1].replace(b" 497", b" 498")], "no token for 1 ids below 498, such as 497"),
        ):
            path.write_bytes(b"".join(content))
            with pytest.raises(ValueError, match=said):
                load_tokenizer(path)

    def test_fast(self, ranks_file: Path) -> None:
        name = "gigatoken (checked against tokenizers (tiktoken ranks))"
        assert load_encoder(ranks_file).name == name

    @pytest.mark.parametrize(
        ("side_file", "message"),
        [
            (
                None,
                r'leave open how .*; write .*tiktoken\.json with \{"preset": "cl100k\|o200k\|llama3\|llama4',
            ),
            ("{", r"a\.tiktoken\.json is not valid JSON"),
            ("[]", "lacks a pattern or special_tokens; write"),
            ('{"pattern": "a"}', "lacks a pattern or special_tokens; write"),
            ('{"preset": "gpt9"}', "asks for preset 'gpt9'; there are cl100k, o200k, llama3, llama4"),
            (
                '{"preset": "llama3", "vocab_size": "many"}',
                "gives the vocab_size 'many'; give an integer, or none",
            ),
            ('{"pattern": "a", "special_tokens": {"<eos>": "9"}}', "'<eos>' the id '9'; give an integer"),
            ('{"pattern": "a", "special_tokens": {"<eos>": 3}}', "'<eos>' the id 3, which is a rank in"),
            ('{"pattern": "a", "special_tokens": {"<eos>": -3}}', "'<eos>' the id -3, which is negative in"),
            ('{"pattern": "a", "special_tokens": {"<x>": 999}}', "has no end-of-document token among"),
            (
                r'{"pattern": "\\p{L}++", "special_tokens": {"<eos>": 999}}',
                r"repetition '\+\+', .*; write '\+'",
            ),
            (
                r'{"pattern": "\\d{1,3}+", "special_tokens": {"<eos>": 999}}',
                r"'\{1,3\}\+', .*; write '\{1,3\}'",
            ),
            ('{"pattern": "(", "special_tokens": {"<eos>": 999}}', "is not a Hugging Face tokenizer file"),
        ],
    )
    def test_side_file(self, ranks_file: Path, tmp_path: Path, side_file: str | None, message: str) -> None:
        (tmp_path / "a.tiktoken").write_bytes(ranks_file.read_bytes())
        if side_file:
            (tmp_path / "a.tiktoken.json").write_text(side_file)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "a.tiktoken")

    def test_plus_signs_that_are_no_possessive(self, ranks_file: Path, tmp_path: Path) -> None:
        (tmp_path / "a.tiktoken").write_bytes(ranks_file.read_bytes())
        side_file = {"pattern": r"\p{L}+|[*+]+|\?+|[^\s]", "special_tokens": {"<eos>": 999}}
        (tmp_path / "a.tiktoken.json").write_text(json.dumps(side_file))
        assert load_tokenizer(tmp_path / "a.tiktoken").decode([999, *b"A"]) is not None


class TestCutAndMixedFiles:
    """Of every kind: what is not whole, or of two models, is refused, and not read as something else."""

    def test_a_sentencepiece_model_cut_anywhere(self, sentencepiece_model: Path, tmp_path: Path) -> None:
        """Behind a piece it is a model still, of other pieces and another kind."""
        from sentencepiece import sentencepiece_model_pb2 as definitions

        content, path = sentencepiece_model.read_bytes(), tmp_path / "a.model"
        whole = definitions.ModelProto.FromString(content)  # type: ignore[attr-defined]
        pieces = definitions.ModelProto(pieces=whole.pieces[3:])  # type: ignore[attr-defined]
        pieces.pieces.extend(whole.pieces[:3])
        for piece in pieces.pieces:
            piece.type = 1 if piece.type == 6 else piece.type  # those of bytes are refused by the library
        for cut in (pieces.SerializeToString(), *(content[:at] for at in range(0, len(content), 97))):
            path.write_bytes(cut)
            with pytest.raises(ValueError, match=r"a\.model (is not a|ends behind its 500 pieces)"):
                load_tokenizer(path)

    def test_a_hole_in_the_ids(self, tokenizer_json: Path, tmp_path: Path) -> None:
        """Above the last id of a text ids may be in reserve."""
        content, path = json.loads(tokenizer_json.read_text()), tmp_path / "tokenizer.json"
        vocabulary = content["model"]["vocab"]
        content["added_tokens"].append({**content["added_tokens"][-1], "id": 900, "content": "<|reserve|>"})
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"'<\|reserve\|>' the id 900, but the library reads it as 500"):
            load_tokenizer(path)
        vocabulary["<|reserve|>"] = 900
        path.write_text(json.dumps(content))
        assert load_tokenizer(path).vocab_size == 901
        vocabulary[next(text for text, number in vocabulary.items() if number == 499)] = 520
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="has no token for 21 ids below 520, such as 499; fetch"):
            load_tokenizer(path)

    def test_a_byte_without_a_token(self, tokenizer_json: Path, tmp_path: Path) -> None:
        content, path = json.loads(tokenizer_json.read_text()), tmp_path / "tokenizer.json"
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        number = vocabulary.pop("ÿ")
        vocabulary["spare"] = number
        content["model"]["merges"] = [merge for merge in merges if "ÿ" not in "".join(merge)]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no token for 1 of the 256 single bytes, such as 0xff, "):
            load_tokenizer(path)

    def test_merges_of_another_vocabulary(self, tokenizer_json: Path, tmp_path: Path) -> None:
        model = json.loads(tokenizer_json.read_text())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        vocabulary = model["vocab"]

        def load(merges: list[str], vocabulary: dict[str, int]) -> Tokenizer:
            (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
            (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            return load_tokenizer(tmp_path / "vocab.json")

        text = make_texts(1, seed=3)[0]
        expected = load_tokenizer(tokenizer_json).encode(text).tolist()
        assert load(merges, vocabulary).encode(text).tolist() == expected
        last, line = merges[-1].replace(" ", ""), len(merges) + 1
        other = {**vocabulary, "other": vocabulary[last]}
        del other[last]
        for merges_given, vocabulary_given, said in (
            (
                merges[:-1],
                vocabulary,
                f"merges.txt has no merge that makes the token {last!r} of",
            ),
            (merges[:-20], vocabulary, "merges.txt has no merge that makes the token"),
            (
                merges,
                other,
                f"merges.txt, line {line}: the token {last!r} is not in .*; fetch both",
            ),
            ([*merges, "a"], vocabulary, f"merges.txt, line {line + 1}: 'a' is no two tokens"),
            (
                merges,
                {**vocabulary, "<gap>": 502},
                "vocab.json has no token for 2 ids below 502",
            ),
        ):
            with pytest.raises(ValueError, match=said):
                load(merges_given, vocabulary_given)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"vocab": slice(None, -1)}, "has 499 tokens and 10 special ones, but its config tells of 500"),
            ({"vocab": slice(7, None)}, "has 493 tokens"),
            ({"config": {"default_num_special_tokens": "ten"}}, r"is no tekken\.json \(TypeError"),
        ],
    )
    def test_tekken(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        words = [bytes([byte]) for byte in range(256)] + [b"%d" % number for number in range(10, 254)]
        entries = [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)
        ]
        content: dict[str, Any] = {
            "config": {
                "default_num_special_tokens": 10,
                "default_vocab_size": 510,
                "pattern": PRESETS["o200k"]["pattern"],
            },
            "vocab": entries,
        }
        path = tmp_path / "tekken.json"
        path.write_text(json.dumps(content))
        assert load_tokenizer(path).vocab_size == 510
        for key, value in change.items():
            content[key] = content[key][value] if key == "vocab" else content[key] | value
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            load_tokenizer(path)


class TestDigest:
    def test_of_the_file(self, sentencepiece_model: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.model"
        copy.write_bytes(sentencepiece_model.read_bytes())
        digest = tokenizer_digest(sentencepiece_model)
        assert digest == tokenizer_digest(copy)
        assert len(bytes.fromhex(digest)) == 16
        content = bytearray(copy.read_bytes())
        content[100] ^= 1
        copy.write_bytes(content)
        assert tokenizer_digest(copy) != digest
        with pytest.raises(ValueError, match="is missing"):
            tokenizer_digest(tmp_path / "no.model")

    def test_of_the_side_file(self, ranks_file: Path, tmp_path: Path) -> None:
        (tmp_path / "a.tiktoken").write_bytes(ranks_file.read_bytes())
        digests = {tokenizer_digest(tmp_path / "a.tiktoken")}
        for preset in PRESETS:
            (tmp_path / "a.tiktoken.json").write_text(json.dumps({"preset": preset}))
            digests.add(tokenizer_digest(tmp_path / "a.tiktoken"))
        assert len(digests) == 1 + len(PRESETS)

    def test_of_the_declared_tokens(self, tokenizer_json: Path, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(tokenizer_json.read_bytes())
        plain = tokenizer_digest(path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
        assert tokenizer_digest(path) == plain
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
        assert tokenizer_digest(path) != plain


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

    def test_every_input_has_its_share(self, tmp_path: Path) -> None:
        """Once the first characters decided, and the files behind them were never seen."""
        for name, alphabet in (("a", "abc"), ("b", "xyz"), ("c", "αβγ")):
            words = np.random.default_rng(0).choice([*alphabet], (400, 50, 3))
            texts = [" ".join(map("".join, text)) for text in words]
            (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
        result = train_tokenizer([str(tmp_path)], tmp_path / "t", 320, max_characters=30_000)
        assert result.inputs == 3
        assert 30_000 <= result.characters < 30_800
        seen = {piece for piece in map(load_tokenizer(result.path).decode, range(320)) if piece.strip()}
        assert {*"abcxyzαβγ"} <= seen
        last = texts[-1]
        assert len(last.encode()) / len(load_tokenizer(result.path).encode(last)) > 2.5
        assert 1.5 < result.bytes_per_token < 5
        assert str(result).endswith(f"of 3 files, {result.bytes_per_token:.2f} bytes a token")

    def test_reads_no_more_than_asked(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(make_texts(300)))
        result = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 300, max_characters=5000)
        assert 5000 <= result.characters < 5200
        assert result.path.exists()

    def test_another_tokenizer_is_not_replaced(self, tmp_path: Path) -> None:
        """The same training again changes nothing."""
        (tmp_path / "a.jsonl").write_bytes(jsonl(make_texts(300)))
        path = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 300).path
        assert train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 300).path == path
        before = path.read_bytes()
        with pytest.raises(
            ValueError, match=r"t\.model is there already, and is not what this training gives"
        ):
            train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 310)
        assert path.read_bytes() == before


class TestWhichTokenEndsDocuments:
    def test_it_is_what_the_files_of_the_tokenizer_say(
        self, tokenizer_json: Path, ranks_file: Path, tmp_path: Path
    ) -> None:
        definition, ranks = tmp_path / "tokenizer.json", tmp_path / "of.tiktoken"
        definition.write_bytes(tokenizer_json.read_bytes())
        ranks.write_bytes(ranks_file.read_bytes())
        side = json.loads(ranks_file.with_name(ranks_file.name + ".json").read_text())
        special = next(
            token["content"]
            for token in json.loads(definition.read_text())["added_tokens"]
            if token["special"]
        )
        for path, named_in, token, content in (
            (definition, tmp_path / "tokenizer_config.json", special, {}),
            (ranks, tmp_path / "of.tiktoken.json", "<|begin_of_text|>", side),
        ):
            named_in.write_text(json.dumps({**content, "eos_token": token}))
            check_eod_token(path, token)
            tokenizer = load_tokenizer(path)
            assert tokenizer.decode(tokenizer.encode(token)) == token  # as text it stays text
            assert tokenizer.eod_id in tokenizer.control_ids
            with pytest.raises(ValueError) as refused:
                check_eod_token(path, "<|other|>")
            assert f"with {token!r}, which {named_in} decides" in str(refused.value)
        before = tokenizer_digest(ranks)
        (tmp_path / "of.tiktoken.json").write_text(json.dumps(side))
        assert tokenizer_digest(ranks) != before  # a corpus with another end is another's
        assert load_tokenizer(ranks).eod_token == "<|end_of_text|>"

    def test_a_sentencepiece_model_has_its_own(self, sentencepiece_model: Path) -> None:
        check_eod_token(sentencepiece_model, "</s>")
        with pytest.raises(ValueError, match=r"ends documents with '</s>', which \S+ decides"):
            check_eod_token(sentencepiece_model, "<s>")

    @pytest.mark.parametrize("eod", [7, "<|absent|>"])
    def test_a_side_file_that_names_no_special_token(
        self, ranks_file: Path, tmp_path: Path, eod: object
    ) -> None:
        path = tmp_path / "of.tiktoken"
        path.write_bytes(ranks_file.read_bytes())
        side = json.loads(ranks_file.with_name(ranks_file.name + ".json").read_text())
        path.with_name("of.tiktoken.json").write_text(json.dumps({**side, "eos_token": eod}))
        with pytest.raises(
            ValueError, match=f"eos_token {eod}; give" if eod == 7 else "add <|absent|>".replace("|", r"\|")
        ):
            load_tokenizer(path)
