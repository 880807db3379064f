"""SentencePiece models: exact encoding, and the same vocabulary in a form that gigatoken loads."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.tokenizers.base import NotSupportedError, TextTokenizer

_SPACE = "▁"


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model; its eos ends documents."""

    name = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor  # only where it is used: workers start faster

        self.path = path
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({error}); give a SentencePiece .model, "
                "a tokenizer.json or a file of tiktoken ranks."
            ) from None
        self.vocab_size = int(self._model.vocab_size())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise ValueError(f"{path} has no eos piece to end documents with; train it with an eos_id.")
        bos = int(self._model.bos_id())
        self.bos_id = bos if bos >= 0 else None
        is_control = self._model.is_control(list(range(self.vocab_size)))
        self.control_ids = frozenset(number for number, control in enumerate(is_control) if control)
        if self._model.normalize("a").startswith(_SPACE):
            self.prefix_id = int(self._model.piece_to_id(_SPACE))

    @cached_property
    def spelled_out(self) -> tuple[str, ...]:
        pieces = SentencePieceModel.parse(self.path.read_bytes()).pieces
        special = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
        return tuple(text for text, _, kind in pieces if kind in special)

    def _encode_short(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        return [np.array(ids, dtype=np.int32) for ids in self._model.encode(texts, num_threads=1)]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._model.decode(np.asarray(ids).tolist()))

    def gigatoken_definition(self) -> tuple[bytes, tuple[str, ...]]:
        return gigatoken_definition(self.path.read_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self.path,), {"name": self.name}


class PieceType(IntEnum):
    """``SentencePiece.Type`` of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class SentencePieceModel:
    """The parts of a ``.model`` file that decide how text is encoded (sentencepiece_model.proto)."""

    pieces: list[tuple[str, float, PieceType]] = field(default_factory=list)
    """(text, score, type) of every id; a higher score is merged first."""
    model_type: int = 1
    byte_fallback: bool = False
    space_as_suffix: bool = False
    normalization: bytes = b""
    """Compiled character map; empty for ``identity``."""
    adds_space: bool = True
    removes_spaces: bool = True
    escapes_spaces: bool = True

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(text for text, _, kind in self.pieces if kind is PieceType.USER_DEFINED)

    @classmethod
    def parse(cls, content: bytes) -> SentencePieceModel:
        model = cls()
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                model.pieces.append((piece.get(1, b"").decode(), score, PieceType(piece.get(3, 1))))
            elif number == 2:
                trainer = dict(_fields(value))
                model.model_type = trainer.get(3, 1)
                model.space_as_suffix = bool(trainer.get(24, 0))
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                model.normalization = normalizer.get(2, b"")
                model.adds_space = bool(normalizer.get(3, 1))
                model.removes_spaces = bool(normalizer.get(4, 1))
                model.escapes_spaces = bool(normalizer.get(5, 1))
        return model


def gigatoken_definition(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A SentencePiece ``.model`` as a tokenizer.json for gigatoken, and the pieces it must not see in text.

    Only pieces that text may yield can result from a merge, and no token is looked for in the text: what
    SentencePiece keeps apart as control pieces and bytes is out of a text's reach here as well. User-defined
    symbols, which SentencePiece does look for in the text, are returned; texts with one need SentencePiece.

    Raises:
        NotSupportedError: the model does something that this form cannot express.
    """
    model = SentencePieceModel.parse(content)
    _refuse_unsupported(model)
    # A name that no merge and no character can reach keeps the id of a piece that text never yields.
    names = {PieceType.NORMAL, PieceType.BYTE}
    vocabulary = {
        text if kind in names else f"\0{number}": number
        for number, (text, _, kind) in enumerate(model.pieces)
    }
    unknown = next(f"\0{i}" for i, (_, _, kind) in enumerate(model.pieces) if kind is PieceType.UNKNOWN)
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.adds_space else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(model),
        },
    }
    return json.dumps(definition, ensure_ascii=False).encode(), model.symbols


def _refuse_unsupported(model: SentencePieceModel) -> None:
    normal = {text for text, _, kind in model.pieces if kind is PieceType.NORMAL}
    types = [kind for _, _, kind in model.pieces]
    complaints = {
        "it is not a BPE model": model.model_type != 2,
        "it has no byte fallback": not model.byte_fallback or types.count(PieceType.BYTE) != 256,
        "it normalizes text": bool(model.normalization),
        "it removes extra spaces": model.removes_spaces,
        "it does not write spaces as ▁": not model.escapes_spaces,
        "it writes spaces behind words": model.space_as_suffix,
        "a user-defined symbol has a space": any({_SPACE, " "} & set(symbol) for symbol in model.symbols),
        "it has unused pieces": PieceType.UNUSED in types,
        "a piece has a character without a piece of its own": not set("".join(normal)) <= normal,
    }
    for complaint, applies in complaints.items():
        if applies:
            raise NotSupportedError(complaint)


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, in the order in which SentencePiece would merge them."""
    scores = {text: score for text, score, kind in model.pieces if kind is PieceType.NORMAL}
    merges = [
        (-score, -cut, cut - len(text), text)
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort()
    return [(text[:-cut], text[-cut:]) for _, cut, _, text in merges]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: int, or bytes for everything longer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + length]
        at += length
