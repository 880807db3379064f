"""Whether every byte of a corpus is as it was written, as far as that can be known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.mmididx import DocumentIndex, Shard, TokenFile, file_digest, new_digest
from megatron_iiet.data.corpora.streams import (
    IndexedDataset,
    OpenShard,
    ShardedDataset,
    TokenStream,
    open_corpus,
)
from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.loading import load_tokenizer, tokenizer_digest

MAX_DEFECTS = 20  # told of one corpus; the rest is counted


@dataclass
class Verification:
    """What :func:`verify` compared, and what was wrong; ``str()`` is for a terminal."""

    prefix: str
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    num_defects: int = 0

    def add(self, defect: object) -> None:
        """Count a defect, and keep it unless there are many."""
        self.num_defects += 1
        if len(self.defects) < MAX_DEFECTS:
            self.defects.append(str(defect))

    def __str__(self) -> str:
        lines = [f"  checked    {line}" for line in self.checked]
        lines += [f"  unchecked  {line}" for line in self.unchecked]
        lines += [f"  DEFECT     {line}" for line in self.defects]
        if self.num_defects > len(self.defects):
            lines.append(f"  and {self.num_defects - len(self.defects):,} more")
        verdict = f"{self.num_defects:,} defect(s)" if self.num_defects else "verified, no defect"
        return "\n".join([f"{self.prefix}: {verdict}", *lines])


class _Ids(NamedTuple):
    """What is known of the ids a corpus may hold."""

    vocab_size: int | None
    eod_id: int | None  # expected at the end of every document


def verify(prefix: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Verification:
    """Read every byte of a corpus and compare whatever can be compared, in bounded memory.

    Never raises for a damaged corpus: all defects are in the result.

    Args:
        tokenizer: file of the tokenizer that made it; without one, what the list says about it is used.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    result = Verification(os.fspath(prefix))
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    try:
        corpus = open_corpus(prefix)
    except (ValueError, OSError) as error:
        result.add(error)
        return result
    ids = _expected_ids(corpus.info, loaded)
    if tokenizer is not None and loaded is not None:
        _compare_tokenizer(corpus.info, Path(tokenizer), loaded, result)
    if isinstance(corpus, ShardedDataset):
        _verify_list(corpus, ids, result)
    else:
        _verify_pair(corpus, ids, result)
        result.unchecked.append("digests: a pair without a list has none")
    _tell_checks(corpus, ids, result)
    return result


def _expected_ids(info: dict[str, Any], loaded: Tokenizer | None) -> _Ids:
    said = info.get("tokenizer")
    said = said if isinstance(said, dict) else {}
    known = (loaded.vocab_size, loaded.eod_id) if loaded else (said.get("vocab_size"), said.get("eod_id"))
    vocab_size, eod_id = (value if isinstance(value, int) else None for value in known)
    return _Ids(vocab_size, eod_id if info.get("append_eod") is True else None)


def _compare_tokenizer(info: dict[str, Any], file: Path, loaded: Tokenizer, result: Verification) -> None:
    said = info.get("tokenizer")
    if not isinstance(said, dict):
        result.unchecked.append("the tokenizer's digest: the corpus does not name its tokenizer")
        return
    found = {"digest": tokenizer_digest(file), "vocab_size": loaded.vocab_size, "eod_id": loaded.eod_id}
    for key, value in found.items():
        if key in said and said[key] != value:
            result.add(
                f"The corpus was made with the tokenizer {said.get('file')} with {key} {said[key]}; "
                f"{file} has {key} {value}."
            )
    result.checked.append(f"tokenizer {file} against the one that made the corpus")


def _verify_list(corpus: ShardedDataset, ids: _Ids, result: Verification) -> None:
    for i in range(len(corpus.shards)):
        with _noting(result):
            _verify_pair(corpus.open_shard(i), ids, result)
    result.checked.append(f"digests of the list and of the files of its {len(corpus.shards):,} shard(s)")


def _verify_pair(pair: IndexedDataset | OpenShard, ids: _Ids, result: Verification) -> None:
    sound = False
    with _noting(result):
        before = result.num_defects
        for defect in pair.index.defects():
            result.add(defect)
        sound = result.num_defects == before
        if pair.listed and file_digest(pair.index.path) != pair.listed.idx_digest:
            result.add(f"{pair.index.path}: the digest is not the one in the list.")
    with _noting(result):
        _verify_tokens(pair.tokens, pair.index if sound else None, pair.listed, ids, result)


@contextmanager
def _noting(result: Verification) -> Iterator[None]:
    """What is wrong with a file, or a disk's read error, is a defect."""
    try:
        yield
    except (ValueError, OSError) as error:
        result.add(error)


def _verify_tokens(
    tokens: TokenFile, index: DocumentIndex | None, listed: Shard | None, ids: _Ids, result: Verification
) -> None:
    """One pass over the token file: digest, range of the ids, end of every document."""
    digest, lowest, highest = new_digest(), 0, 0
    endless, first = 0, ""
    for start, block in tokens.blocks():
        digest.update(block.data)
        lowest, highest = min(lowest, int(block.min())), max(highest, int(block.max()))
        if index is not None and ids.eod_id is not None:
            ends = _document_ends(index, start, start + block.size)
            last = block[ends - 1 - start]
            wrong = np.flatnonzero(last != ids.eod_id)
            if wrong.size and not endless:
                first = f"before token {ends[wrong[0]]}, where one ends with id {last[wrong[0]]}"
            endless += wrong.size
    if listed and digest.digest() != listed.bin_digest:
        result.add(f"{tokens.path}: the digest is not the one in the list.")
    if lowest < 0 or (ids.vocab_size is not None and highest >= ids.vocab_size):
        limit = "no id is negative" if ids.vocab_size is None else f"the tokenizer has {ids.vocab_size}"
        result.add(f"{tokens.path}: token ids go from {lowest} to {highest}, but {limit}.")
    if endless:
        result.add(f"{tokens.path}: {endless} documents do not end with {ids.eod_id}, the first {first}.")


def _document_ends(index: DocumentIndex, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Ends e of documents, start < e <= stop, int64."""
    if stop < index.num_tokens:
        return index.document_starts(start + 1, stop + 1)
    return np.append(index.document_starts(start + 1, stop), stop)


def _tell_checks(corpus: TokenStream, ids: _Ids, result: Verification) -> None:
    result.checked.append(f"lengths, pointers and entries of {corpus.num_documents:,} documents")
    if ids.vocab_size is None:
        result.unchecked.append("range of the ids: no tokenizer is known (give --tokenizer)")
    else:
        result.checked.append(f"range of {corpus.num_tokens:,} token ids: [0, {ids.vocab_size})")
    if ids.eod_id is not None:
        result.checked.append(f"end of every document: id {ids.eod_id}")
