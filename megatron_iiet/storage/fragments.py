"""The checkpoint store: what every rank holds of every parameter, readable under any other layout.

A rank holds of a parameter a *fragment*: an interval of its flattened tensor-parallel shard (ZeRO cuts flat
buffers anywhere), as master weight and the moments that the parameter's optimizer keeps. A checkpoint folder
has one safetensors file for each rank that wrote, with tensors ``kind/name``, and ``index.json``, which says
where everything is::

    {"format": 5, "save": {"save": id, "step": n, "config": digest}, "block_bytes": n,
     "files": {file: {"bytes": n, "digests": {"kind/name": digests of its blocks}}},
     "parameters": {name: {"shape": [...], "shard": null | {"dim": d, "blocks": [...]}, "tensor_size": k,
                           "kinds": [...], "pieces": [[file, tensor_rank, start, numel], ...]}},
     "digest": of all that}

Format 1, of older checkpoints, had neither saves nor digests, and one list of kinds for all parameters.
Offsets and lengths count elements unless they say bytes; memory is little-endian, as is the format.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.storage.integrity import (
    BLOCK_BYTES,
    REMEDY,
    Blocks,
    DamagedError,
    SaveIdentity,
    check_seal,
    misfit,
    read_json,
    write_sealed,
)
from megatron_iiet.storage.safetensors_stream import SafetensorsFile, TensorToWrite, write_safetensors

MASTER = "fp32"
"""The kind that every parameter has: its master weight. Moments go by the names of their optimizer."""
FORMAT = 5
"""That of checkpoints, see :mod:`megatron_iiet.storage.checkpoint`; indexes had one of their own before."""
_BARE_FORMAT = 1
"""Of an index without digests: of checkpoints of format 2 to 4."""
INDEX = "index.json"
SCRATCH_BYTES = 64 << 20
"""Bound of the temporary of one read, which is never less than a row of a stored shard."""
OPEN_FILES = 64
_VERIFIED = 16 << 20
"""Elements that are read at a time to be compared; whole blocks of any size up to 64 MiB."""
_BARE_FORM = {
    "kinds": [str],
    "files": {str: {"bytes": int}},
    "parameters": {
        str: {
            "shape": [int],
            "shard": (None, {"dim": int, "blocks": [int]}),
            "tensor_size": int,
            "pieces": [[str, int, int, int]],
        }
    },
}
"""What nothing else says of an index without digests, see :func:`megatron_iiet.storage.integrity.misfit`."""


@dataclass(frozen=True)
class Place:
    """Where in a whole parameter an interval of a rank's flattened local shard begins."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    shard: Shard | None
    tensor_size: int
    tensor_rank: int
    """Of the rank, out of the ``tensor_size`` that share the parameter by ``shard``; 0 if replicated."""
    start: int
    """First element of the interval in the local shard."""


@dataclass(frozen=True)
class Fragment:
    """What one rank holds of one parameter."""

    name: str
    place: Place
    """In the parameter; of a replicated one tensor rank 0 alone writes."""
    numel: int
    """Length of the interval; may be 0."""
    tensors: Mapping[str, Tensor]
    """Kind → [numel] fp32 on any device: :data:`MASTER`, and the moments that the parameter has."""


def place_of(shard: Shard | None, local: Sequence[int], tensor: Group, start: int = 0) -> Place:
    """The place of this rank's shard of shape ``local``, or of its elements from ``start`` on."""
    if shard is None:
        return Place(tuple(local), None, 1, 0, start)
    shape = [sum(shard.blocks) if dim == shard.dim else size for dim, size in enumerate(local)]
    return Place(tuple(shape), shard, tensor.size, tensor.rank, start)


class Piece(NamedTuple):
    """The file that holds an interval of a rank's flattened local shard."""

    file: str
    tensor_rank: int
    start: int
    numel: int


@dataclass(frozen=True)
class ParameterEntry:
    """What a checkpoint says of one parameter."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    shard: Shard | None
    tensor_size: int
    """Tensor-parallel ranks it is stored for; 1 if replicated."""
    kinds: tuple[str, ...]
    """What there is of it: :data:`MASTER` and moments."""
    pieces: tuple[Piece, ...]
    """By tensor rank, then start; none is empty."""

    def local_numel(self, tensor_size: int) -> int:
        """Elements that each of ``tensor_size`` ranks holds."""
        return prod(self.shard.local_shape(self.shape, tensor_size) if self.shard else self.shape)


class WrittenFile(NamedTuple):
    """What one rank wrote, plain JSON data for :func:`write_index`."""

    entries: list[dict[str, Any]]
    """A fragment each."""
    digests: dict[str, str]
    """Of the blocks of every tensor."""


def write_fragments(path: Path, fragments: Sequence[Fragment], save: SaveIdentity) -> WrittenFile:
    """Write one rank's fragments to ``path``, whole and on disk or not at all; one tensor at a time.

    Raises:
        ValueError: a name comes twice, or a fragment's tensors do not fit its interval.
    """
    tensors: dict[str, TensorToWrite] = {}
    entries: dict[str, dict[str, Any]] = {}
    for f in fragments:
        for kind, tensor in f.tensors.items():
            if tensor.shape != (f.numel,) or tensor.dtype != torch.float32:
                raise ValueError(
                    f"cannot write {kind} of {f.name} to {path}: it is {tensor.dtype} of "
                    f"{list(tensor.shape)}; give torch.float32 of [{f.numel}]"
                )
        if f.name in entries:
            raise ValueError(f"cannot write {path}: {f.name} comes twice; give one fragment a parameter")
        for kind in f.tensors if f.numel else ():
            make = partial(f.tensors.__getitem__, kind)
            tensors[f"{kind}/{f.name}"] = TensorToWrite.whole((f.numel,), make)
        place, shard = f.place, f.place.shard
        parameter = {
            "shape": list(place.shape),
            "shard": shard and {"dim": shard.dim, "blocks": list(shard.blocks)},
            "tensor_size": place.tensor_size if shard else 1,
            "kinds": list(f.tensors),
        }
        piece = [place.tensor_rank, place.start, f.numel]
        entries[f.name] = {"name": f.name, "parameter": parameter, "piece": piece}
    digests = write_safetensors(path, tensors, _header_of(save))
    return WrittenFile(list(entries.values()), digests)


def write_index(folder: Path, written: Mapping[str, WrittenFile], save: SaveIdentity) -> None:
    """Write ``index.json`` of a folder from what every :func:`write_fragments` into it returned, by file.

    Raises:
        ValueError: the fragments contradict each other or do not cover every parameter exactly once, or a
            file is not there.
    """
    parameters: dict[str, dict[str, Any]] = {}
    for file, (entries, _) in written.items():
        for e in entries:
            name, (rank, start, numel) = e["name"], e["piece"]
            known = parameters.setdefault(name, e["parameter"] | {"pieces": []})
            for key, value in e["parameter"].items():
                if value != known[key]:
                    raise ValueError(
                        f"{folder / file} has {name} with {key} {value}, another file of the checkpoint has "
                        f"{known[key]}; write all of a checkpoint from one model and layout"
                    )
            if numel:
                known["pieces"].append(Piece(file, rank, start, numel))
    for name, parameter in parameters.items():
        parameter["pieces"].sort(key=lambda piece: piece[1:])
        _check_coverage(folder, name, _entry_from_json(parameter))
    files = {
        file: {"bytes": _size_of(folder / file), "digests": written[file].digests} for file in sorted(written)
    }
    index = {
        "format": FORMAT,
        "save": asdict(save),
        "block_bytes": BLOCK_BYTES,
        "files": files,
        "parameters": parameters,
    }
    write_sealed(folder / INDEX, index)


class FragmentReader:
    """Reads a checkpoint folder under any layout; from disk comes what is asked for and little more. What is
    read is compared with its digests.

    ``save``: what the rest of the checkpoint says it is of; None for one of before there were saves.

    Raises:
        ValueError: the index or a file is missing, damaged, of another save or of an unknown format.
    """

    parameters: Mapping[str, ParameterEntry]

    def __init__(self, folder: Path, save: SaveIdentity | None) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}  # the open ones, longest unused first
        index = _read_index(folder / INDEX)
        if index.save != save:
            raise DamagedError(
                f"{folder / INDEX} is {_of(index.save)}, but the checkpoint {_of(save)}; {REMEDY}"
            )
        self.parameters, self._blocks = index.parameters, index.blocks
        self._header = _header_of(save) if save else None
        for file, size in index.sizes.items():
            if (found := _size_of(folder / file)) != size:
                raise DamagedError(
                    f"{folder / file} has {found} bytes, but {INDEX} says {size}: it is truncated or of "
                    "another checkpoint; copy it again, or use another one"
                )
        for name, entry in self.parameters.items():
            _check_coverage(folder, name, entry)
            if unlisted := {piece.file for piece in entry.pieces} - index.sizes.keys():
                raise DamagedError(
                    f"{folder / INDEX} has no size of {min(unlisted)}, which has {name}; {REMEDY}"
                )

    def read(self, name: str, kind: str, place: Place, numel: int, out: Tensor | None = None) -> Tensor:
        """[numel] fp32: an interval of the reader's flattened local shard, which begins at ``place``.

        ``out``, [numel] fp32 on any device, is filled instead of a new CPU tensor.

        Raises:
            ValueError: there is no such thing in the checkpoint, it has another shape or split, or its file
                is damaged.
        """
        entry = self._entry(name, kind)
        shard, tensor_size, tensor_rank, start = (
            place.shard,
            place.tensor_size,
            place.tensor_rank,
            place.start,
        )
        if shard != entry.shard or place.shape != entry.shape:
            raise ValueError(
                f"{name} in {self.folder} has shape {list(entry.shape)} split by {entry.shard}, but the "
                f"model's has {list(place.shape)} split by {shard}; use the checkpoint's model"
            )
        held = entry.local_numel(tensor_size)
        if not (0 <= start <= start + numel <= held and 0 <= tensor_rank < tensor_size):
            raise ValueError(
                f"cannot read elements [{start}, {start + numel}) of {name} for tensor-parallel rank "
                f"{tensor_rank} of {tensor_size}: each holds {held} of {self.folder}; ask for a part of them"
            )
        out = torch.empty(numel) if out is None else out
        if out.shape != (numel,) or out.dtype != torch.float32:
            raise ValueError(
                f"cannot read {name} into {out.dtype} of {list(out.shape)}; give torch.float32 of [{numel}]"
            )
        direct = out.device.type == "cpu" and out.is_contiguous()
        target = out.detach() if direct else torch.empty(numel)
        if shard is None or tensor_size == entry.tensor_size:
            self._read_stored(name, kind, tensor_rank if shard else 0, start, target)
        elif numel:
            self._read_resharded(name, kind, shard.slices(tensor_size, tensor_rank), start, target)
        if not direct:
            out.detach().copy_(target)
        return out

    def check_headers(self) -> None:
        """Whether every file is of this save and has the tensors that it should have.

        Raises:
            DamagedError: one is not, or has not.
        """
        for _ in self._stored():
            pass

    def verify(self) -> int:
        """Read everything; how many bytes that is. Without digests only damaged headers are found.

        Raises:
            DamagedError: a block is not what was written.
        """
        read = 0
        for file, key, numel, blocks in self._stored():
            for start in range(0, numel, _VERIFIED):
                part = torch.empty(min(_VERIFIED, numel - start))
                if blocks is None:
                    file.read(key, start, part)
                else:
                    file.read_verified(key, start, part, blocks)
            read += 4 * numel
        return read

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> FragmentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str, kind: str) -> ParameterEntry:
        if name not in self.parameters:
            raise ValueError(f"{self.folder} has no parameter {name}; use a checkpoint of this model")
        entry = self.parameters[name]
        if kind not in entry.kinds:
            raise ValueError(
                f"{self.folder} has no {kind} of {name}, only {', '.join(entry.kinds)}; read one of these"
            )
        return entry

    def _read_resharded(self, name: str, kind: str, held: list[slice], start: int, target: Tensor) -> None:
        """Fill ``target`` from element ``start`` on of the flattened local shard made of the slices ``held``.

        What is before the split dimension counts as rows, the rest as columns; a split by rows is then one of
        a single long row. Intervals of one row go straight where they belong. Of many rows, those of a stored
        shard are read whole, because only so they are contiguous, and what is shared is copied from there.
        """
        entry = self.parameters[name]
        assert entry.shard is not None
        inner = prod(entry.shape[entry.shard.dim + 1 :])
        width = inner * sum(s.stop - s.start for s in held)
        stored = [entry.shard.slices(entry.tensor_size, rank) for rank in range(entry.tensor_size)]
        stored_width = inner * sum(s.stop - s.start for s in stored[0])
        shared = [list(_shared(held, slices, inner)) for slices in stored]
        most = max(1, SCRATCH_BYTES // (4 * stored_width))
        for row, rows, first, last in _rectangles(start, len(target), width, most):
            offset = row * width + first - start
            view = target[offset : offset + rows * (last - first)].view(rows, last - first)
            for rank, runs in enumerate(shared):
                # (from, to, first column in the stored rows) of what this rectangle and that rank share
                spans = [(max(here, first), min(here + n, last), there - here) for here, there, n in runs]
                spans = [(low, high, low + shift) for low, high, shift in spans if low < high]
                if rows > 1 and spans:
                    scratch = torch.empty(rows, stored_width)
                    self._read_stored(name, kind, rank, row * stored_width, scratch.view(-1))
                for low, high, there in spans:
                    wanted = view[:, low - first : high - first]
                    if rows > 1:
                        wanted.copy_(scratch[:, there : there + high - low])
                    else:
                        self._read_stored(name, kind, rank, row * stored_width + there, wanted[0])

    def _read_stored(self, name: str, kind: str, rank: int, start: int, target: Tensor) -> None:
        """Fill ``target`` from element ``start`` on of the flattened local shard that ``rank`` stored."""
        pieces, end = self.parameters[name].pieces, start + len(target)
        i = bisect_right(pieces, (rank, start), key=lambda piece: piece[1:3]) - 1
        while start < end:  # pieces are without gaps
            piece = pieces[i]
            stop = min(end, piece.start + piece.numel)
            part, target = target[: stop - start], target[stop - start :]
            file, key, blocks = self._find(name, kind, piece)
            if blocks is None:
                file.read(key, start - piece.start, part)
            else:
                file.read_verified(key, start - piece.start, part, blocks)
            start, i = stop, i + 1

    def _stored(self) -> Iterator[tuple[SafetensorsFile, str, int, Blocks | None]]:
        """Every stored tensor, by file: the file, its name there, its elements and digests."""
        pieces = [(piece, name) for name, entry in self.parameters.items() for piece in entry.pieces]
        for piece, name in sorted(pieces):
            for kind in self.parameters[name].kinds:
                file, key, blocks = self._find(name, kind, piece)
                yield file, key, piece.numel, blocks

    def _find(self, name: str, kind: str, piece: Piece) -> tuple[SafetensorsFile, str, Blocks | None]:
        """The file of a piece, the tensor's name there, and its digests, if there are any."""
        file, key = self._open(piece.file), f"{kind}/{name}"
        file.require(key, "F32", (piece.numel,))
        blocks = None if self._header is None else self._blocks.get((piece.file, key))
        if self._header is not None and (blocks is None or not blocks.cover(4 * piece.numel)):
            raise DamagedError(f"{self.folder / INDEX} has no digests of {key} in {piece.file}; {REMEDY}")
        return file, key, blocks

    def _open(self, file: str) -> SafetensorsFile:
        stored = self._files.pop(file, None) or SafetensorsFile(self.folder / file)
        if self._header is not None and stored.metadata != self._header:
            stored.close()
            found, wanted = (
                f"save {header.get('save')} of step {header.get('step')}"
                for header in (stored.metadata, self._header)
            )
            raise DamagedError(
                f"{self.folder / file} is of another save than {INDEX} beside it: of {found}, not of "
                f"{wanted}; {REMEDY}"
            )
        self._files[file] = stored
        if len(self._files) > OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return stored


class _Index(NamedTuple):
    """What ``index.json`` says."""

    save: SaveIdentity | None
    parameters: dict[str, ParameterEntry]
    sizes: dict[str, int]
    """Bytes of every file."""
    blocks: dict[tuple[str, str], Blocks]
    """Of every tensor, by file and name there."""


def _read_index(path: Path) -> _Index:
    index = read_json(path)
    found = index.get("format")
    if found not in (_BARE_FORMAT, FORMAT):
        raise DamagedError(f"{path} is damaged: it is of format {found!r}, not {FORMAT}; {REMEDY}")
    bare = found == _BARE_FORMAT
    if not bare:
        index = check_seal(path, index)
    elif wrong := misfit(index, _BARE_FORM):
        raise DamagedError(f"{path} is damaged: {wrong}; {REMEDY}")
    try:
        if bare:  # one list of kinds for all
            for parameter in index["parameters"].values():
                parameter["kinds"] = index["kinds"]
        return _Index(
            None if bare else SaveIdentity(**index["save"]),
            {name: _entry_from_json(p) for name, p in index["parameters"].items()},
            {file: entry["bytes"] for file, entry in index["files"].items()},
            {
                (file, key): Blocks(index["block_bytes"], digests)
                for file, entry in index["files"].items()
                for key, digests in entry.get("digests", {}).items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"cannot read {path} as an index of format {found}: {error!r}; use another checkpoint, or the "
            "version of this program that wrote it"
        ) from None


def _header_of(save: SaveIdentity) -> dict[str, str]:
    return {"format": f"megatron_iiet.fragments.{FORMAT}", **save.as_metadata()}


def _of(save: SaveIdentity | None) -> str:
    return "of a format without saves" if save is None else f"of {save}"


def _shared(held: list[slice], stored: list[slice], inner: int) -> Iterator[tuple[int, int, int]]:
    """What two local tensors share: (first column in the one, in the other, columns), ``inner`` an index."""
    here = 0
    for a in held:
        there = 0
        for b in stored:
            low, high = max(a.start, b.start), min(a.stop, b.stop)
            if low < high:
                yield inner * (here + low - a.start), inner * (there + low - b.start), inner * (high - low)
            there += b.stop - b.start
        here += a.stop - a.start


def _rectangles(start: int, numel: int, width: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut an interval of a flattened matrix into (first row, rows, first column, column after the last).

    Parts of a row come alone, whole rows up to ``most`` at a time.
    """
    end = start + numel
    while start < end:
        row, first = divmod(start, width)
        last = min(width, first + end - start)
        rows = 1 if last - first < width else min(most, (end - start) // width)
        yield row, rows, first, last
        start += rows * (last - first)


def _check_coverage(folder: Path, name: str, entry: ParameterEntry) -> None:
    """Every element that a rank must hold is in exactly one piece."""
    try:
        held = entry.local_numel(entry.tensor_size)
    except ValueError as error:
        raise DamagedError(f"{name} in {folder}: {error}") from None
    pieces: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(entry.tensor_size)}
    for piece in entry.pieces:
        pieces.setdefault(piece.tensor_rank, []).append((piece.start, piece.numel))
    for rank, intervals in pieces.items():
        end = 0
        for start, numel in [*intervals, (held if rank < entry.tensor_size else 0, 0)]:
            if start != end:
                raise DamagedError(
                    f"{folder} has {'an overlap' if start < end else 'a gap'} between elements {start} and "
                    f"{end} of {name} on tensor-parallel rank {rank} of {entry.tensor_size}, which holds "
                    f"{held}; use a checkpoint of which every rank wrote its part once"
                )
            end = start + numel


def _entry_from_json(data: Mapping[str, Any]) -> ParameterEntry:
    shard = data["shard"] and Shard(data["shard"]["dim"], tuple(data["shard"]["blocks"]))
    pieces = tuple(Piece(*piece) for piece in data["pieces"])
    return ParameterEntry(tuple(data["shape"]), shard, data["tensor_size"], tuple(data["kinds"]), pieces)


def _size_of(path: Path) -> int:
    if not path.is_file():
        raise DamagedError(f"{path} is {'no file' if path.exists() else 'missing'}; {REMEDY}")
    return path.stat().st_size
