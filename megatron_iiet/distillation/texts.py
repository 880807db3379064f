"""What influence is measured on: a run's held-out text, a prepared corpus, or a file of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_iiet.config.schema import DataConfig
from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.data.corpora.streams import TokenStream
from megatron_iiet.data.loader.samples import KINDS, Samples, build_splits
from megatron_iiet.data.reading.kinds import format_of
from megatron_iiet.data.reading.sources import list_inputs
from megatron_iiet.data.reading.text import iter_documents
from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.training.corpora import check_tokenizers, open_corpora


@dataclass(frozen=True)
class TextSet:
    """Sequences to measure on."""

    description: str
    """What they are."""
    sources: list[Samples]
    weights: list[float]


def open_text_set(path: str, data: DataConfig, vocab_size: int, samples: int) -> TextSet:
    """Open a file of text or a corpus; empty: what ``data`` validates on.

    A corpus is read as a whole. ``data`` says how samples are cut, and names the tokenizer.

    Raises:
        ValueError: there is no such text, too little of it, or it or its tokenizer belongs to another model.
    """
    if format_of(path):
        return _text_set(path, data, vocab_size, samples)
    tokenizer_file = _tokenizer_of(data)
    if path:
        splits = build_splits(
            path, data.sequence_length, [0.0, 1.0, 0.0], data.documents, vocab_size=vocab_size
        )
        check_tokenizers([splits.validation], tokenizer_file)
        return TextSet(f"corpus {path}", [splits.validation], [1.0])
    if not (data.prefix or data.blend):
        raise ValueError("the model's configuration names no corpus; give --data one, or a file of text")
    if not (data.split[1] or data.validation_prefix):
        raise ValueError(
            f"the model was validated on nothing (data.split is {data.split}); give --data a corpus, or a "
            "file of text"
        )
    corpora = open_corpora(data, vocab_size)
    kind = "corpus" if data.validation_prefix else "validation split of"
    names = data.validation_prefix or ", ".join(corpora.prefixes)
    return TextSet(f"{kind} {names}", corpora.validation, corpora.validation_weights)


def _text_set(path: str, data: DataConfig, vocab_size: int, samples: int) -> TextSet:
    tokenizer = load_tokenizer(_tokenizer_of(data))
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, but the model's vocabulary "
            f"{vocab_size}; give --tokenizer the one it was trained with"
        )
    stream = read_text(path, tokenizer, samples * (data.sequence_length + 1) + 1)
    cut = KINDS[data.documents](stream, 0, stream.num_tokens, data.sequence_length)
    if len(cut) == 0:
        raise ValueError(
            f"{path} has {stream.num_tokens} tokens, too few for a sequence of {data.sequence_length}; give "
            "more text, or a smaller --sequence-length"
        )
    return TextSet(f"text {path}", [cut], [1.0])


def _tokenizer_of(data: DataConfig) -> str:
    if not data.tokenizer:
        raise ValueError("the model's configuration names no tokenizer; give --tokenizer its file")
    return data.tokenizer


class TokensInMemory(TokenStream):
    """Documents as a stream."""

    dtype: np.dtype[Any] = np.dtype(np.int32)

    def __init__(self, prefix: str, tokens: np.ndarray[Any, Any], lengths: Sequence[int]) -> None:
        """``prefix``: how messages name them; ``tokens``: of all documents; ``lengths``: of each."""
        self.prefix = prefix
        self._tokens = tokens
        self._starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.num_tokens, self.num_documents = len(tokens), len(lengths)

    def document_start(self, document: int) -> int:
        return int(self._starts[document])

    def document_starts(self, start: int, stop: int) -> Int64Array:
        first, last = np.searchsorted(self._starts[:-1], (start, stop))
        return self._starts[first:last]

    def read_into(self, start: int, out: Int64Array) -> None:
        out[:] = self._tokens[start : start + len(out)]


def read_text(path: str, tokenizer: Tokenizer, enough: int) -> TokenStream:
    """Tokens of a file's documents, each with the end-of-document id behind it; reading ends with the
    document that makes ``enough`` tokens.

    Raises:
        ValueError: the file is missing, damaged or no text.
    """
    parts, lengths, total = [], [], 0
    for text in iter_documents(list_inputs([path])):
        tokens = tokenizer.encode(text)
        if len(tokens):
            tokens = np.append(tokens, np.int32(tokenizer.eod_id))
            parts.append(tokens)
            lengths.append(len(tokens))
        total += len(tokens)
        if total >= enough:
            break
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return TokensInMemory(path, tokens, lengths)
