"""Which units are finished: one file of JSON lines a job, appended when a unit's shards are published.

A line is written and synced after the shards it names, and is believed only if it is whole: a run that is
killed leaves at most a torn last line, which the next run of the job cuts off. Every job reads the files of
all jobs, so the number of jobs may change between runs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet.data.corpora.indexed_writer import lock
from megatron_iiet.data.corpora.mmididx import Shard
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.durable import open_own, sync_folder

_OFFENDERS = 5
_START = b'{"unit":'
_RECORD_FILE = re.compile(r"job-\d{5,}-of-\d{5,}\.jsonl")


@dataclass
class Counts:
    """What became of the rows of some text."""

    text_bytes: int = 0  # UTF-8 bytes of the documents written
    empty: int = 0  # texts that gave no token
    wrong_length: int = 0  # rows of too few or too many characters
    other_language: int = 0  # rows in another language than wanted, or in none that can be told
    sampled_out: int = 0  # rows outside the sample
    duplicates: int = 0  # rows with the text of an earlier one
    rejected: dict[str, int] = field(default_factory=dict)  # defective rows a reason
    offenders: dict[str, list[str]] = field(default_factory=dict)  # the first few, with file and line

    def reject(self, reason: str, message: str) -> None:
        """Count a defective row."""
        self.add(Counts(rejected={reason: 1}, offenders={reason: [message]}))

    def add(self, other: Counts) -> None:
        """Add the counts of text that follows."""
        self.text_bytes += other.text_bytes
        self.empty += other.empty
        self.wrong_length += other.wrong_length
        self.other_language += other.other_language
        self.sampled_out += other.sampled_out
        self.duplicates += other.duplicates
        for reason, count in other.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
            kept = self.offenders.setdefault(reason, [])
            kept += other.offenders[reason][: _OFFENDERS - len(kept)]


@dataclass
class Total:
    """What one shard, an output or all amount to."""

    documents: int = 0
    tokens: int = 0
    bin_bytes: int = 0

    def add(self, other: Total) -> None:
        """Add what follows."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bin_bytes += other.bin_bytes


@dataclass(kw_only=True)
class OutputRecord(Total):
    """One shard of a finished unit."""

    idx_bytes: int
    bin_digest: str
    idx_digest: str
    bin_changed: int = 0  # nanoseconds, as file systems tell; 0 in older records
    idx_changed: int = 0

    def listed(self, name: str) -> Shard:
        """The entry of a list."""
        digests = bytes.fromhex(self.bin_digest), bytes.fromhex(self.idx_digest)
        return Shard(name, self.tokens, self.documents, *digests)


@dataclass(frozen=True)
class Unit:
    """The inputs of one shard of every output, in the order of their documents."""

    id: int  # names the shards; that of a unit which is gone is never given again
    inputs: list[InputFile]


@dataclass
class UnitRecord:
    """A finished unit."""

    unit: int
    inputs: list[InputFile]  # as they were when the unit was begun
    outputs: dict[str, OutputRecord]  # by output name; outputs without a document are absent
    counts: Counts
    skipped: dict[str, str] = field(default_factory=dict)  # inputs that were left out, and why
    marks: str = ""  # digest of which lines were duplicates; empty where they were not looked for

    def to_json(self) -> str:
        """One line."""
        content = asdict(self) | {"inputs": [file.identity for file in self.inputs]}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: bytes | str) -> UnitRecord:
        """The inverse of :meth:`to_json`."""
        content: dict[str, Any] = json.loads(line)
        content["inputs"] = [InputFile(*entry) for entry in content["inputs"]]
        content["outputs"] = {name: OutputRecord(**values) for name, values in content["outputs"].items()}
        content["counts"] = Counts(**content["counts"])
        return cls(**content)


def identities(inputs: Sequence[InputFile]) -> list[list[str | int]]:
    """What is to be compared of inputs, in their order."""
    return [file.identity for file in inputs]


class JobRecords:
    """The record file of this job, held for as long as this object is open.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, folder: Path, job: int, num_jobs: int) -> None:
        self.folder = folder
        self.path = folder / f"job-{job:05d}-of-{num_jobs:05d}.jsonl"
        self._file = os.fdopen(open_own(self.path, os.O_CREAT | os.O_APPEND), "ab", buffering=0)
        try:
            if not lock(self._file):
                raise ValueError(
                    f"{self.path} is in use: the same job is running; wait for it, stop it, or choose "
                    "another output."
                )
            self._cut_torn_line()
        except BaseException:
            self._file.close()
            raise
        sync_folder(folder)

    def _cut_torn_line(self) -> None:
        with self.path.open("rb") as file:
            intact = sum(len(line) for line in file if line.endswith(b"\n"))
        if intact < self.path.stat().st_size:
            _refuse_foreign([self.path])
            self._file.truncate(intact)

    def append(self, record: UnitRecord) -> None:
        """Put a finished unit on disk. Where that fails, the file stays as it was."""
        size = self._file.seek(0, os.SEEK_END)
        line = record.to_json().encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(size)
            raise

    def others_running(self) -> bool:
        """Whether a process holds the record file of another job."""
        for path in _record_files(self.folder):
            if path != self.path:
                with path.open("rb") as file:
                    if not lock(file):
                        return True
        return False

    def remove_all(self) -> None:
        """Forget every job's finished units.

        Raises:
            ValueError: a file of such a name is something else.
        """
        files = _record_files(self.folder)
        _refuse_foreign(files)
        for path in files:
            if path != self.path:
                path.unlink(missing_ok=True)
        self._file.truncate(0)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let other processes have it."""
        self._file.close()


def read_records(folder: Path) -> Iterator[UnitRecord]:
    """Finished units in the records of all jobs, in no order; a unit may come twice.

    Raises:
        ValueError: a whole line is no record.
    """
    for path in _record_files(folder):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    continue
                try:
                    record = UnitRecord.from_json(line)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number} is damaged ({error}); remove the line: its unit will be made "
                        "again."
                    ) from None
                yield record


def _refuse_foreign(files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            for line in file:
                if not line.startswith(_START[: len(line)]):
                    raise ValueError(f"{path} holds {line[:40]!r}, which is no record; move it away.")


def _record_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("job-*-of-*.jsonl") if _RECORD_FILE.fullmatch(path.name))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time gets past the lock file ``path``."""
    with path.open("ab") as file:
        lock(file, wait=True)
        yield
