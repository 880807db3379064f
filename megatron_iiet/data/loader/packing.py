"""Best-fit packing of pieces of documents into bins of equal size.

Best-fit decreasing: the longest pieces first, each into the fullest bin that still has room for it, of
several the one filled last. A rank packs a block for nearly every sample that it reads, so the extension has
it in C++; :func:`cut` and :func:`pack` say what comes of it, and do it where the extension is not built.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.ops.extension import load_extension


class Packing(NamedTuple):
    """Pieces by bin: bin b holds the pieces from ``bounds[b]`` to ``bounds[b + 1]``, one behind the other."""

    starts: Int64Array  # first token of each piece, [pieces]
    lengths: Int64Array  # tokens of each piece, [pieces]
    bounds: Int64Array  # [bins + 1]


def pack_documents(documents: Int64Array, start: int, stop: int, bins: int, capacity: int) -> Packing:
    """Tokens [start, stop) in ``bins`` bins; ``documents``: those that start inside, int64 [documents],
    ascending, each once."""
    native = operator()
    if native is None:
        return pack(*cut(documents, start, stop, capacity), bins, capacity)
    found: Int64Array = native(torch.from_numpy(documents), start, stop, bins, capacity).numpy()
    middle = (bins + 1 + len(found)) // 2
    return Packing(found[bins + 1 : middle], found[middle:], found[: bins + 1])


@cache
def operator() -> Callable[..., Any] | None:
    """The extension's, which gives the same pieces in the same order; None: it is not built, or too old."""
    if not load_extension().loaded:
        return None
    found: Callable[..., Any] | None = getattr(torch.ops.megatron_iiet, "pack_documents", None)
    return found


def cut(starts: Int64Array, start: int, stop: int, capacity: int) -> tuple[Int64Array, Int64Array]:
    """Tokens [start, stop) in pieces of at most ``capacity`` tokens that end where a document starts.

    ``starts``: documents that start inside, int64 [documents], ascending, each once. Returns first token and
    length of each piece, int64 [pieces], in order.
    """
    inside = len(starts) and starts[0] == start
    first = starts if inside else np.concatenate((np.array([start]), starts))
    documents = np.append(first[1:], stop) - first
    pieces = -(-documents // capacity)
    ends = pieces.cumsum()
    offsets = capacity * (np.arange(ends[-1]) - np.repeat(ends - pieces, pieces))
    return np.repeat(first, pieces) + offsets, np.minimum(np.repeat(documents, pieces) - offsets, capacity)


def pack(starts: Int64Array, lengths: Int64Array, bins: int, capacity: int) -> Packing:
    """Put pieces of 1 to ``capacity`` tokens, at most bins x capacity in all, into ``bins`` bins.

    A piece that fits nowhere is cut: its head fills the emptiest bin, the rest is placed in the same way.
    Every token gets a place."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    # A piece of more than half a bin gets an empty one, as long as there are any.
    alone = min(bins, int(np.count_nonzero(2 * lengths > capacity)))
    left = capacity - lengths[:alone]
    by_room = alone - 1 - np.argsort(left[::-1], kind="stable")
    by_room = by_room[np.count_nonzero(left == 0) :]
    # Bins with room, ascending; of equal ones the one filled last comes first.
    rooms = left[by_room].tolist() + [capacity] * (bins - alone)
    open_bins = by_room.tolist() + list(range(alone, bins))
    homes = list(range(alone))
    heads, sizes = starts[alone:].tolist(), lengths[alone:].tolist()
    for number, size in enumerate(sizes):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            at = bisect_left(rooms, rooms[-1])
            heads.insert(number + 1, heads[number] + rooms[at])
            sizes.insert(number + 1, size - rooms[at])
            sizes[number] = size = rooms[at]
        room, home = rooms.pop(at) - size, open_bins.pop(at)
        homes.append(home)
        if room:
            at = bisect_left(rooms, room)
            rooms.insert(at, room)
            open_bins.insert(at, home)
    if len(homes) > len(starts):  # some were cut
        starts = np.concatenate((starts[:alone], np.array(heads, dtype=np.int64)))
        lengths = np.concatenate((lengths[:alone], np.array(sizes, dtype=np.int64)))
    places = np.array(homes)
    by_bin = places.argsort(kind="stable")
    bounds = np.zeros(bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(places, minlength=bins), out=bounds[1:])
    return Packing(starts[by_bin], lengths[by_bin], bounds)
