"""Whose an output is: a file ``outputs/NAME`` in the records, made before anything of the output is written.

A claim keeps other runs away. Removed or replaced under its name is only what was made here, by its content
(:mod:`megatron_iiet.data.corpora.making`): a fitting name alone tells nothing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.making import Identity, Making, listed
from megatron_iiet.data.corpora.mmididx import bin_path, shards_path
from megatron_iiet.data.preprocess.layout import Layout, Output
from megatron_iiet.data.preprocess.records import UnitRecord, read_records
from megatron_iiet.durable import sync_folder, write_text

_FOLDER = "outputs"
_BEGUN = ".begun"
_ENDINGS = (".shards", ".idx", ".bin")


class Claims:
    """The outputs that are a place's own."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.folder = layout.records / _FOLDER
        self.making = Making(layout.records / "making", self._recorded)

    def names(self) -> set[str]:
        """Names of the outputs."""
        return {path.name for path in self.folder.glob("*_document")}

    def found(self, name: str) -> Path | None:
        """Something that is there of an output of that name, whoever made it."""
        prefix = self._layout.list_prefix(name)
        for ending in _ENDINGS:
            if os.path.lexists(prefix + ending):
                return Path(prefix + ending)
        folder = Path(prefix)
        if self._layout.folder is None or not os.path.lexists(folder):
            return None
        return next(iter(sorted(folder.iterdir())), None) if folder.is_dir() else folder

    def _begun(self, name: str) -> bool:
        """Whether anything of a claimed output was ever made."""
        marker = self.folder / f"{name}{_BEGUN}"
        records = read_records(self._layout.records)
        if not marker.exists() and any(name in record.outputs for record in records):
            marker.touch()  # older runs left none
        return marker.exists()

    def refuse_foreign(self, name: str) -> None:
        """Raise a ValueError where an output cannot be this place's: something is there that was not made
        here, another place, whose outputs have such names, has claimed it, or it is on another file system
        than the records, where its files are written first."""
        prefix = self._layout.list_prefix(name)
        self.making.refuse_elsewhere(bin_path(self._layout.shard_prefix(name, 0)))
        if self._begun(name):
            endings = _ENDINGS if self._layout.folder is None else _ENDINGS[:1]
            self.making.refuse_foreign(*(Path(prefix + ending) for ending in endings))
        elif (path := self.found(name)) is not None and not self._begun(name):  # nor by a faster process
            raise ValueError(
                f"{path} is there already, and no plan in {self._layout.records} names it; choose another "
                "output, or remove it yourself if nobody needs it."
            )
        for claim in claims_to(prefix):
            if claim != self.folder / name and claim.exists():
                raise ValueError(
                    f"{prefix} is an output of another run, which claimed it by {claim}; choose "
                    "another output."
                )

    def take(self, output: Output) -> None:
        """Make an output this place's, or see that it is.

        Raises:
            ValueError: somebody else's files are there, or another output of this run has the name.
        """
        claim = self.folder / output.name
        if (holder := _read(claim)) is None or not self._begun(output.name):
            self.refuse_foreign(output.name)
        if holder is None:
            self.folder.mkdir(exist_ok=True)
            _place(claim, json.dumps(asdict(output)))
            others = (other for other in claims_to(self._layout.list_prefix(output.name)) if other != claim)
            if any(other.exists() for other in others):
                # Of two places that claim at the same moment one sees the other, or both do.
                if self.found(output.name) is None:
                    claim.unlink(missing_ok=True)
                self.refuse_foreign(output.name)
            holder = _read(claim)
        if holder != output:
            raise ValueError(
                f"The output {output.name} would hold both {_say(holder)} and {_say(output)}; rename a "
                "source or a key, or make them in outputs of their own."
            )

    def release(self, name: str) -> None:
        """Give an output back, unless it is a folder in which something is left that is not of this tool:
        then what follows may still write beside it."""
        folder, marker = Path(self._layout.list_prefix(name)), self.folder / f"{name}{_BEGUN}"
        is_ours = self._layout.folder is not None and marker.exists()
        if is_ours and folder.is_dir() and not folder.is_symlink():
            if any(folder.iterdir()):
                return
            folder.rmdir()
        for path in (marker, self.folder / name):
            path.unlink(missing_ok=True)

    def open_shard(self, place: Layout, output: str, number: int, vocab_size: int) -> IndexedDatasetWriter:
        """A writer for a shard of a claimed output.

        Raises:
            ValueError: there is a file of its name that was not made here.
        """
        prefix = Path(place.shard_prefix(output, number))
        (self.folder / f"{output}{_BEGUN}").touch()
        prefix.parent.mkdir(parents=True, exist_ok=True)
        return IndexedDatasetWriter(prefix, vocab_size, self.making)

    def _recorded(self) -> Iterator[Identity]:
        """Every file of finished shards, of units and shuffled; also of lists: records may be lost."""
        digests = set()
        for folder in (self._layout.records, self._layout.records / "shuffled"):
            for record in read_records(folder):
                for shard in record.outputs.values():
                    digests.add(shard.bin_digest)
                    yield Identity(shard.bin_bytes, shard.bin_digest, shard.bin_changed)
                    yield Identity(shard.idx_bytes, shard.idx_digest, shard.idx_changed)
        for place in (self._layout, self._layout.unshuffled):
            for output in self.names():
                entries = list(listed(shards_path(place.list_prefix(output))))
                if any(entry.digest in digests for entry in entries):
                    yield from entries

    def refuse_foreign_lists(self, place: Layout, outputs: Iterable[str]) -> None:
        """Raise a ValueError where the list of one of some outputs was not made here."""
        self.making.refuse_foreign(*(shards_path(place.list_prefix(output)) for output in outputs))

    def recorded(self, place: Layout, record: UnitRecord) -> None:
        """What a record tells need not be noted any more."""
        for output in record.outputs:
            self.making.forget(bin_path(place.shard_prefix(output, record.unit)))


def _say(output: Output | None) -> str:
    if output is None:
        return "another"
    source = f"source {output.source!r} with " if output.source else ""
    split = f"split {output.split} of " if output.split else ""
    return f"{source}{split}key {output.key!r}"


def _read(claim: Path) -> Output | None:
    try:
        return Output(**json.loads(claim.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{claim} is damaged; remove it if the output of that name is this run's.") from None


def _place(claim: Path, text: str) -> None:
    """Make a file with its content in one step, unless there is one: of several processes the first wins."""
    own = claim.with_name(f"{claim.name}.{secrets.token_hex(4)}.tmp")
    write_text(own, text)
    try:
        os.link(own, claim)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        own.replace(claim)
    finally:
        own.unlink(missing_ok=True)
    sync_folder(claim.parent)


def claims_to(prefix: str) -> Iterator[Path]:
    """Where others would have claimed a corpus of this prefix: a folder of many, or shorter prefixes."""
    folder, name = os.path.split(prefix)
    yield Path(folder, "preprocess", _FOLDER, name)
    for at, letter in enumerate(name):
        if letter == "_":
            yield Path(folder, f"{name[:at]}.preprocess", _FOLDER, name[at + 1 :])
