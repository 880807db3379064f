"""Training samples: windows of T + 1 tokens cut from a range of documents.

The documents of a split form one stream; window i is tokens [i T, i T + T + 1) of it, so neighbours share
one token and every token but the first is predicted once. Nothing is built or cached: a window's place is
arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_iiet.data.indexed import IndexedDataset

_SPLIT_NAMES = ("train", "validation", "test")


class TokenWindows(Dataset[torch.Tensor]):
    """Windows over tokens [start, stop) of a shard's stream; a torch map-style dataset.

    Args:
        indexed: the shard.
        start, stop: token range of the split.
        sequence_length: T; each item is int64 [T + 1].
    """

    def __init__(self, indexed: IndexedDataset, start: int, stop: int, sequence_length: int) -> None:
        self.indexed = indexed
        self.start = start
        self.stop = stop
        self.sequence_length = sequence_length

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, those of an incomplete last window included."""
        return self.stop - self.start

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Window ``index``, int64 [T + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = self.start + int(index) * self.sequence_length
        return torch.from_numpy(self.indexed.read(first, first + self.sequence_length + 1))


@dataclass(frozen=True)
class Splits:
    """The three parts of a shard, in document order."""

    train: TokenWindows
    validation: TokenWindows
    test: TokenWindows


def build_splits(prefix: str | os.PathLike[str], sequence_length: int, split: Sequence[float]) -> Splits:
    """Cut the shard ``prefix`` into train, validation and test by shares of its documents.

    Raises:
        ValueError: the shard is unreadable, ``split`` is not three shares summing to 1, or a part with a
            share has too few tokens for one window.
    """
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length is {sequence_length}; it must be at least 1.")
    shares = np.asarray(split, dtype=np.float64)
    if shares.shape != (3,) or not np.all(shares >= 0) or abs(float(shares.sum()) - 1) > 1e-6:
        raise ValueError(
            f"data.split is {list(split)}; give three shares (train, validation, test), none negative, sum 1."
        )
    indexed = IndexedDataset(prefix)
    bounds = np.rint(np.append(0.0, np.cumsum(shares)) * indexed.num_documents).astype(np.int64)
    starts = [indexed.document_start(int(document)) for document in bounds]
    parts = {}
    for i, name in enumerate(_SPLIT_NAMES):
        part = TokenWindows(indexed, starts[i], starts[i + 1], sequence_length)
        if shares[i] > 0 and len(part) == 0:
            raise ValueError(
                f"The {name} split of {indexed.prefix} has {bounds[i + 1] - bounds[i]} documents with "
                f"{part.num_tokens} tokens, too few for a window of {sequence_length + 1}; give it a larger "
                "share in data.split (or 0), shorten data.sequence_length, or use more text."
            )
        parts[name] = part
    return Splits(**parts)
