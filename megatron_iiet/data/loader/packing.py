"""Best-fit packing of pieces of documents into bins of equal size.

Best-fit decreasing: the longest pieces first, each into the fullest bin that still has room for it. The rooms
left in all bins are the bits of one integer, where the smallest sufficient one is a shift and a lowest set
bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_iiet.data.corpora.mmididx import Int64Array


class Packing(NamedTuple):
    """Pieces by bin: bin b holds the pieces from ``bounds[b]`` to ``bounds[b + 1]``, one behind the other."""

    starts: Int64Array  # first token of each piece, [pieces]
    lengths: Int64Array  # tokens of each piece, [pieces]
    bounds: Int64Array  # [bins + 1]


def cut(starts: Int64Array, start: int, stop: int, capacity: int) -> tuple[Int64Array, Int64Array]:
    """Tokens [start, stop) in pieces of at most ``capacity`` tokens that end where a document starts.

    ``starts``: documents that start inside, int64 [documents]. Returns first token and length of each piece,
    int64 [pieces], in order.
    """
    first = np.unique(np.append(start, starts))
    documents = np.diff(np.append(first, stop))
    pieces = -(-documents // capacity)
    which = np.repeat(np.arange(len(first)), pieces)
    number = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = number * capacity
    return first[which] + offsets, np.minimum(documents[which] - offsets, capacity)


def pack(starts: Int64Array, lengths: Int64Array, bins: int, capacity: int) -> Packing:
    """Put pieces of 1 to ``capacity`` tokens, at most bins x capacity in all, into ``bins`` bins.

    A piece that fits nowhere is cut: its head fills the emptiest bin, the rest is placed in the same way.
    Every token gets a place."""
    order = np.argsort(-lengths, kind="stable")
    homes, heads, sizes = [], [], []  # of the pieces placed: bin, first token, tokens
    rooms = {capacity: list(range(bins - 1, -1, -1))}  # bins by the tokens they have room for
    mask = 1 << capacity  # bit r: there is a bin with room for r > 0 tokens
    for start, size in zip(starts[order].tolist(), lengths[order].tolist(), strict=True):
        while size:
            fitting = mask >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else mask.bit_length() - 1
            taken = min(size, room)
            home = rooms[room].pop()
            if not rooms[room]:
                mask ^= 1 << room
            if left := room - taken:
                rooms.setdefault(left, []).append(home)
                mask |= 1 << left
            homes.append(home)
            heads.append(start)
            sizes.append(taken)
            start, size = start + taken, size - taken
    by_bin = np.argsort(homes, kind="stable")
    bounds = np.cumsum(np.bincount(np.array(homes, dtype=np.int64) + 1, minlength=bins + 1))
    return Packing(np.array(heads, dtype=np.int64)[by_bin], np.array(sizes, dtype=np.int64)[by_bin], bounds)
