"""What a corpus holds: counts, lengths of documents, decoded samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.streams import IndexedDataset, ShardedDataset, TokenStream, open_corpus
from megatron_iiet.data.tokenizers.base import Tokenizer

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_SAMPLE_TOKENS = 100
_EXACT_BITS = 12  # lengths below 2**12 are counted exactly, longer ones to 12 binary digits
_BAR_WIDTH = 40


class LengthCounts:
    """How many documents have which length, in memory that does not grow with the corpus."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.longest = 0
        self.shortest = 2**63
        self._counts: Counter[int] = Counter()

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Count lengths, int64 [n]."""
        surplus = np.maximum(np.frexp(lengths)[1] - _EXACT_BITS, 0)
        rounded, counts = np.unique((lengths >> surplus) << surplus, return_counts=True)
        self._counts.update(dict(zip(rounded.tolist(), counts.tolist(), strict=True)))
        self.documents += lengths.size
        self.tokens += int(lengths.sum())
        self.shortest = min(self.shortest, int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))

    def percentile(self, percent: float) -> int:
        """Smallest length that ``percent`` % of the documents do not exceed; above 4096 within 0.1 %."""
        wanted, seen = max(1.0, self.documents * percent / 100), 0
        for length in sorted(self._counts):
            seen += self._counts[length]
            if seen >= wanted:
                return length
        return self.longest

    def buckets(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, documents) by powers of two, without gaps: 0, 1, 2-3, 4-7, ..."""
        counts: Counter[int] = Counter()
        for length, count in self._counts.items():
            counts[length.bit_length()] += count
        return [
            (1 << bits >> 1, (1 << bits) - 1, counts[bits]) for bits in range(min(counts), max(counts) + 1)
        ]


@dataclass(frozen=True)
class Sample:
    """A document to look at: its number, tokens, and the text of its first tokens."""

    document: int
    tokens: int
    text: str


@dataclass
class Summary:
    """What :func:`summarize` found; ``str()`` is for a terminal, :meth:`as_dict` for JSON."""

    prefix: str
    corpus: ShardedDataset | IndexedDataset
    lengths: LengthCounts
    samples: list[Sample]

    @property
    def num_bytes(self) -> int:
        """Of all tokens."""
        return self.corpus.num_tokens * self.corpus.dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        corpus, lengths = self.corpus, self.lengths
        return {
            "prefix": self.prefix,
            "dtype": corpus.dtype.name,
            "shards": len(corpus.shards) if isinstance(corpus, ShardedDataset) else 1,
            "has_list": isinstance(corpus, ShardedDataset),
            "tokens": corpus.num_tokens,
            "documents": corpus.num_documents,
            "bytes": self.num_bytes,
            "info": corpus.info,
            "lengths": {
                "min": lengths.shortest,
                "mean": corpus.num_tokens / corpus.num_documents,
                "max": lengths.longest,
                "percentiles": {str(p): lengths.percentile(p) for p in PERCENTILES},
                "histogram": [
                    {"from": low, "to": high, "documents": count} for low, high, count in lengths.buckets()
                ],
            },
            "samples": [vars(sample) for sample in self.samples],
        }

    def __str__(self) -> str:
        corpus = self.corpus
        source = "1, without a list"
        if isinstance(corpus, ShardedDataset):
            source = f"{len(corpus.shards):,} in {self.prefix}.shards"
        lines = [
            self.prefix,
            f"  tokens     {corpus.num_tokens:,} ({corpus.dtype.name}, {self.num_bytes:,} bytes)",
            f"  documents  {corpus.num_documents:,}",
            f"  shards     {source}",
            *(f"  {line}" for line in _describe_info(corpus.info)),
            f"  tokens per document: {self.lengths.shortest:,} to {self.lengths.longest:,}, "
            f"mean {corpus.num_tokens / corpus.num_documents:,.1f}",
            "    " + ", ".join(f"{p} % up to {self.lengths.percentile(p):,}" for p in PERCENTILES),
            *_bars(self.lengths.buckets()),
        ]
        for sample in self.samples:
            more = " ..." if sample.tokens > _SAMPLE_TOKENS else ""
            lines += [f"  document {sample.document:,} ({sample.tokens:,} tokens):"]
            lines += [f"    {sample.text!r}{more}"]
        return "\n".join(lines)


def _describe_info(info: dict[str, Any]) -> Iterator[str]:
    tokenizer = info.get("tokenizer")
    if isinstance(tokenizer, dict):
        yield (
            f"tokenizer  {tokenizer.get('file')}, {tokenizer.get('vocab_size')} ids, "
            f"eod {tokenizer.get('eod_id')}, digest {tokenizer.get('digest')}"
        )
    if "append_eod" in info:
        yield f"eod        {'at the end of every document' if info['append_eod'] else 'not appended'}"
    if "made_by" in info:
        yield f"made by    {info['made_by']}"


def _bars(buckets: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    most = max(count for _, _, count in buckets)
    for low, high, count in buckets:
        bar = "█" * (-(-count * _BAR_WIDTH // most))
        yield f"    {f'{low:,}-{high:,}' if high > low else f'{low:,}':>23} {count:>14,} {bar}".rstrip()


def summarize(
    prefix: str | os.PathLike[str], tokenizer: Tokenizer | None = None, samples: int = 3
) -> Summary:
    """Count, and with a tokenizer decode ``samples`` documents spread from the first to the last.

    Reads every index, and of the tokens only the samples'.

    Raises:
        ValueError: the corpus is missing or damaged, or the tokenizer does not know its ids.
    """
    corpus = open_corpus(prefix)
    lengths = LengthCounts()
    for pair in corpus.pairs():
        for block in pair.index.document_lengths():
            lengths.add(block)
    shown = list(_samples(corpus, tokenizer, samples)) if tokenizer is not None else []
    return Summary(os.fspath(prefix), corpus, lengths, shown)


def _samples(corpus: TokenStream, tokenizer: Tokenizer, count: int) -> Iterator[Sample]:
    spread = np.linspace(0, corpus.num_documents - 1, max(count, 0)).astype(np.int64)
    for document in np.unique(spread).tolist():
        start, stop = corpus.document_start(document), corpus.document_start(document + 1)
        ids = corpus.read(start, min(stop, start + _SAMPLE_TOKENS))
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ValueError(
                f"Document {document} of {corpus.prefix} has ids {ids.min()} to {ids.max()}, the tokenizer "
                f"{tokenizer.vocab_size}: it is not the one that made the corpus."
            )
        yield Sample(document, stop - start, tokenizer.decode(ids))
