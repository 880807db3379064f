"""Hugging Face ``tokenizer.json`` files, through the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.tokenizers.base import BOS_NAMES, EOD_NAMES, NotSupportedError, Tokenizer
from megatron_iiet.data.tokenizers.cutting import (
    GPT2,
    KNOWN_PATTERNS,
    SPACE,
    BetweenPieces,
    BetweenWords,
    Cutting,
)

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = iter(range(0x100, 0x200))
BYTE_CHARACTERS = [chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256)]
"""The character that stands for each byte in byte-level vocabularies: printable ones for themselves."""

_NAME = re.compile(r"<.*>|\[.*\]")


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer file.

    Which token ends documents: ``eos_token`` of a ``tokenizer_config.json`` in the same folder, else the
    first token with a customary name (``<|endoftext|>``, ``</s>``, ...). The same for ``bos_token``.
    """

    name = "tokenizers"

    def __init__(self, path: Path) -> None:
        declared = declared_tokens(path.with_name("tokenizer_config.json"))
        self._set_up(path, path.read_text(encoding="utf-8", errors="replace"), declared)

    def _set_up(self, path: Path, definition: str, declared: Mapping[str, str]) -> None:
        import tokenizers  # only where it is used: workers start faster

        eod_names, bos_names = (
            [declared[name]] if name in declared else customary
            for name, customary in (("eos_token", EOD_NAMES), ("bos_token", BOS_NAMES))
        )
        self.path = path
        self.eod_named_in = path.with_name("tokenizer_config.json")
        try:
            self._model: Any = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception for every parse failure
            raise ValueError(
                f"{path} is not a Hugging Face tokenizer file ({error}); give the tokenizer.json itself."
            ) from None
        content = json.loads(self._model.to_str())
        self.cutting = cutting_of(content)
        self._model.encode_special_tokens = True  # text never yields control ids
        self._model.no_truncation()
        self._model.no_padding()
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        eod_token = next((name for name in eod_names if name in ids), None)
        if eod_token is None:
            raise ValueError(
                f"{path} has no end-of-document token: none of {', '.join(eod_names)} is in its vocabulary; "
                "put a tokenizer_config.json that names eos_token beside it."
            )
        self.eod_token, self.eod_id = eod_token, (eod := ids[eod_token])
        self.bos_id = next((ids[name] for name in bos_names if name in ids), None)
        added = self._model.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self.control_ids = frozenset({eod, *special, eod if self.bos_id is None else self.bos_id})
        for token in json.loads(definition).get("added_tokens") or []:
            if (given := ids.get(token["content"])) != token["id"]:
                raise ValueError(
                    f"{path} gives the added token {token['content']!r} the id {token['id']}, but the "
                    f"library reads it as {given}; put it into the model's vocab as well."
                )
        _refuse_holes(path, {*ids.values()}, special)
        _refuse_lost_bytes(path, content)
        self._refuse_leaks()

    @property
    def spelled_out(self) -> tuple[str, ...]:
        added = {token.content for token in self._model.get_added_tokens_decoder().values()}
        return tuple(sorted(added | {self._model.id_to_token(number) for number in self.control_ids}))

    def _refuse_leaks(self) -> None:
        """Probe that text spelling a control token does not become it, as in word-level vocabularies."""
        texts = [text for name in self.spelled_out for text in (name, f"a{name}b", f" {name} ")]
        for text, ids in zip(texts, self._encode_short(texts), strict=True):
            leaked = ids[self._is_control[ids]]
            if leaked.size:
                raise ValueError(
                    f"{self.path} turns the plain text {text!r} into control id {leaked.min()}: documents "
                    "could end themselves; use a tokenizer with byte or sub-word pieces."
                )

    def _encode_short(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def gigatoken_definition(self) -> tuple[bytes, tuple[str, ...]]:
        """The same tokenizer without its added tokens, and those of them that are looked for in text.

        Special ones are plain text here, as with ``encode_special_tokens``.
        """
        definition = json.loads(self._model.to_str())
        symbols = tuple(token["content"] for token in definition["added_tokens"] if not token["special"])
        if definition["model"]["type"] != "BPE":
            raise NotSupportedError("it is not a BPE model")
        if symbols and definition["normalizer"]:
            raise NotSupportedError("it looks for added tokens in normalized text")
        definition["added_tokens"] = []
        return json.dumps(definition, ensure_ascii=False).encode(), symbols

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,), {"name": self.name, "max_uncut_bytes": self.max_uncut_bytes}


class VocabularyAndMergesTokenizer(HuggingFaceTokenizer):
    """GPT-2's ``vocab.json`` with the ``merges.txt`` beside it."""

    name = "tokenizers (vocabulary and merges)"

    def __init__(self, path: Path) -> None:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        file = merges_file(path)
        if not file.is_file():
            raise ValueError(f"{path} is a vocabulary whose merges, {file}, are missing; put them beside it.")
        merges = _read_merges(file, path, vocabulary)
        declared = declared_tokens(path.with_name("tokenizer_config.json"))
        names = [name for name in vocabulary if name in {*declared.values(), *EOD_NAMES, *BOS_NAMES}]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        }
        definition = {
            "version": "1.0",
            "added_tokens": [special_token(name, vocabulary[name]) for name in names],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        }
        self._set_up(path, json.dumps(definition), declared)


def _refuse_holes(path: Path, ids: set[int], special: set[int]) -> None:
    """Refuse ids without a token below one that text yields; above those, models keep ids in reserve."""
    last = max(ids - special, default=0)
    if holes := [number for number in range(last) if number not in ids]:
        raise ValueError(
            f"{path} has no token for {len(holes):,} ids below {last:,}, such as {holes[0]:,}; fetch it "
            "again, or name them as added tokens."
        )


def _refuse_lost_bytes(path: Path, definition: dict[str, Any]) -> None:
    """Refuse a byte-level vocabulary that lacks bytes: the library drops those of a text and says nothing."""
    model, words = definition["model"], definition.get("pre_tokenizer") or {}
    steps = [step["type"] for step in words.get("pretokenizers", [words]) if step]
    if model["type"] != "BPE" or "ByteLevel" not in steps or model.get("unk_token") is not None:
        return
    if missing := [byte for byte, text in enumerate(BYTE_CHARACTERS) if text not in model["vocab"]]:
        raise ValueError(
            f"{path} has no token for {len(missing)} of the 256 single bytes, such as {missing[0]:#04x}, "
            "which would be dropped from texts; fetch it again, or train it with ByteLevel.alphabet()."
        )


def _read_merges(file: Path, path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges of a vocabulary.

    Raises:
        ValueError: a line is none, or names a token that the vocabulary does not have; or merges are missing.
    """
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not right or " " in right:
            raise ValueError(f"{file}, line {number}: {line[:60]!r} is no two tokens; fetch the file again.")
        if unknown := next((token for token in (left, right, left + right) if token not in vocabulary), None):
            raise ValueError(
                f"{file}, line {number}: the token {unknown!r} is not in {path}; fetch both files of one "
                "model."
            )
        merges.append((left, right))
    made = {left + right for left, right in merges}
    for token in vocabulary.keys() - made:
        if not _NAME.fullmatch(token) and any(
            token[:at] in vocabulary and token[at:] in vocabulary for at in range(1, len(token))
        ):
            raise ValueError(
                f"{file} has no merge that makes the token {token!r} of {path}: it was cut, or is another "
                "model's; fetch both files of one model."
            )
    return merges


def merges_file(vocabulary: Path) -> Path:
    """Where the merges of a vocabulary are looked for."""
    return vocabulary.with_name(vocabulary.name.replace("vocab", "merges")).with_suffix(".txt")


def special_token(content: str, number: int) -> dict[str, Any]:
    """A token of a tokenizer.json that no text yields."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **plain}


def cutting_of(definition: dict[str, Any]) -> Cutting | None:
    """Where a tokenizer.json lets long texts be cut."""
    model: dict[str, Any] = definition["model"]
    words, normalizer = definition.get("pre_tokenizer"), definition.get("normalizer")
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    symbols = [token for token in definition["added_tokens"] if not token["special"]]
    if model.get("dropout"):
        return None
    if words is not None:
        careless = [
            token
            for token in symbols
            if token["lstrip"] or token["rstrip"] or token["single_word"] or {" ", "\n"} & {*token["content"]}
        ]
        known = _pattern_of(words) in KNOWN_PATTERNS and all(step["type"] == "NFC" for step in steps)
        return BetweenWords() if known and not careless else None
    space = {"type": "Prepend", "prepend": SPACE}
    others = [
        s
        for s in steps
        if s not in (space, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    ]
    unfit = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")]
    if model["type"] != "BPE" or not model["byte_fallback"] or any(unfit) or others or symbols:
        return None
    return BetweenPieces.of(model["vocab"], adds_space=space in steps)


def _pattern_of(words: dict[str, Any]) -> str | None:
    """The pattern that cuts text into words for a byte-level vocabulary; None for other ways."""
    if words["type"] == "ByteLevel" and not words["add_prefix_space"]:
        return GPT2 if words["use_regex"] else None
    parts = words.get("pretokenizers", [])
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    plain = split["behavior"] == "Isolated" and not split["invert"] and not byte_level["add_prefix_space"]
    return split["pattern"].get("Regex") if plain and not byte_level["use_regex"] else None


def declared_tokens(config: Path) -> dict[str, str]:
    """eos_token and bos_token of a tokenizer_config.json, whether given as strings or as objects."""
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not valid JSON ({error}); repair or remove it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds a {type(content).__name__}, not an object; repair or remove it.")
    tokens = {name: content.get(name) for name in ("eos_token", "bos_token")}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
        if token
    }
