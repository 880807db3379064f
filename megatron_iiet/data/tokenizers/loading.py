"""Tokenizers behind one small protocol: SentencePiece, Hugging Face ``tokenizer.json``, tiktoken ranks.

All encode text only: whatever is written in a document, also a literal ``</s>``, becomes ordinary tokens.
Control ids (begin and end of document) are added by callers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.tokenizers.base import (
    MAX_PART_CHARACTERS,
    NotSupportedError,
    TextTokenizer,
    TokenIds,
    file_digest,
    split_text,
)
from megatron_iiet.data.tokenizers.fast import fast_encoder
from megatron_iiet.data.tokenizers.hugging_face import HuggingFaceTokenizer, declared_tokens
from megatron_iiet.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_iiet.data.tokenizers.tiktoken import TiktokenTokenizer, looks_like_ranks, ranks_side_file

__all__ = [
    "MAX_PART_CHARACTERS",
    "TokenIds",
    "Tokenizer",
    "load_encoder",
    "load_tokenizer",
    "split_text",
    "tokenizer_digest",
]


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def name(self) -> str:
        """How it works, for people: "sentencepiece", "gigatoken (checked against sentencepiece)", ..."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """Id put behind every document."""

    @property
    def bos_id(self) -> int | None:
        """Id put in front of a prompt; None where the tokenizer has none."""

    def encode(self, text: str) -> TokenIds:
        """Ids of ``text``, int32 [tokens], without control ids.

        Raises:
            ValueError: the text holds a lone surrogate.
            RuntimeError: a control id came of it, against all precautions.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """:meth:`encode` of every text, in the calling thread."""

    def encode_parts(self, parts: Iterable[str]) -> TokenIds:
        """:meth:`encode` of one text given in the parts that :func:`split_text` cuts it into."""

    def encode_packed(
        self, texts: Sequence[str], append_eod: bool = False, dtype: npt.DTypeLike = np.int32
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """:meth:`encode` of all texts, joined: ids [all tokens] and lengths [texts].

        Args:
            append_eod: ``eod_id`` behind every text that gives tokens, counted in its length.
            dtype: of the ids; wide enough for ``vocab_size``.
        """

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of ids [tokens]; control ids give nothing."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a SentencePiece ``.model``, a Hugging Face ``tokenizer.json``, or a file of tiktoken ranks.

    Raises:
        ValueError: the file is missing, unreadable, of no such kind, or has no end-of-document token.
    """
    return _load(Path(path))


def load_encoder(path: str | os.PathLike[str], sample: Iterable[str] = ()) -> Tokenizer:
    """:func:`load_tokenizer` for encoding much text: through gigatoken where that is proven to be the same.

    Proven on hard texts, the vocabulary and the first million characters of ``sample``; otherwise the result
    is what :func:`load_tokenizer` gives, and its ``name`` says why. It pickles without the proof.

    Raises:
        ValueError: as :func:`load_tokenizer`.
    """
    exact = _load(Path(path))
    try:
        return fast_encoder(exact, sample)
    except NotSupportedError as reason:
        exact.name = f"{exact.name} (not gigatoken: {reason})"
        return exact


def tokenizer_digest(path: str | os.PathLike[str]) -> str:
    """Digest, 32 hexadecimal digits, of all that decides which ids a text gets and which id ends it.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    file = Path(path)
    content = _read(file)
    kind = _kind(file, content)
    if kind is HuggingFaceTokenizer:
        declared = declared_tokens(file.with_name("tokenizer_config.json"))
        return file_digest(content, *([json.dumps(declared, sort_keys=True).encode()] if declared else []))
    if kind is TiktokenTokenizer and ranks_side_file(file).is_file():
        return file_digest(content, _read(ranks_side_file(file)))
    return file_digest(content)


def _load(path: Path) -> TextTokenizer:
    return _kind(path, _read(path))(path)


def _kind(path: Path, content: bytes) -> type[SentencePieceTokenizer | HuggingFaceTokenizer]:
    """By content: LLaMA-3's ranks are called tokenizer.model as well."""
    if path.suffix == ".tiktoken" or looks_like_ranks(content):
        return TiktokenTokenizer
    if path.suffix == ".json" or content.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer
    return SentencePieceTokenizer


def _read(path: Path) -> bytes:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is missing"
        raise ValueError(
            f"The tokenizer {path} {found}; give a SentencePiece .model, a tokenizer.json or a file of "
            "tiktoken ranks."
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"The tokenizer {path} cannot be read: {error.strerror}; make it readable."
        ) from None
