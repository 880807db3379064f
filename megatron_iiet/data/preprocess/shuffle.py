"""A keyed shuffle of all documents of an output, once its units are finished.

The shards of units, which are kept as a corpus of their own in ``unshuffled/``, are read in the order of a
permutation that seed and number of documents determine, and written as new shards. What is finished of
them stands in ``shuffled/``, as for units; ``marks`` tells of which corpus and seed a shard was made.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.mmididx import Int64Array, new_digest, token_dtype
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.corpora.streams import ShardedDataset
from megatron_iiet.data.loader.order import EpochPermutations
from megatron_iiet.data.preprocess.finished import shards_exist
from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.records import Counts, JobRecords, UnitRecord, exclusive, read_records
from megatron_iiet.data.preprocess.tasks import Recipe, Report, Task, output_record
from megatron_iiet.data.preprocess.work import Failure
from megatron_iiet.data.reading.sources import InputFile

_DOCUMENTS_AT_A_TIME = 1 << 12
_TOKENS_AT_A_TIME = 1 << 18

Run = Callable[[Sequence[Task], JobRecords], list[Failure]]
_Key = tuple[str, int, str]


@dataclass(frozen=True)
class ShuffleShard(Task):
    """Task: one shuffled shard."""

    output: str
    layout: Layout
    places: tuple[int, int]  # the first in the new order, and the one behind the last
    seed: int
    vocab_size: int
    marks: str

    @property
    def key(self) -> _Key:
        """Tells the shard from all others."""
        return self.output, self.unit, self.marks

    def __call__(self, recipe: Recipe | None, report: Report) -> UnitRecord:
        corpus = ShardedDataset(self.inputs[0].path)
        order = EpochPermutations(corpus.num_documents, self.seed)
        claims = Claims(self.layout)
        with claims.open_shard(self.layout, self.output, self.unit, self.vocab_size) as writer:
            for first in range(*self.places, _DOCUMENTS_AT_A_TIME):
                numbers = np.arange(first, min(first + _DOCUMENTS_AT_A_TIME, self.places[1]))
                _copy(corpus, order(numbers), writer)
                report(len(numbers))
            shard = writer.close()
        record = output_record(writer.prefix, shard)
        return UnitRecord(self.unit, [], {self.output: record}, Counts(), marks=self.marks)


def _copy(corpus: ShardedDataset, documents: Int64Array, writer: IndexedDatasetWriter) -> None:
    """Write documents in the order of their numbers; a few, or a piece of a long one, are held at a time."""
    held: list[Int64Array] = []
    size = 0

    def write() -> None:
        if held:
            writer.add_documents(np.concatenate(held), list(map(len, held)))
        held.clear()

    for document in documents.tolist():
        start, stop = corpus.document_start(document), corpus.document_start(document + 1)
        size += stop - start
        if size > _TOKENS_AT_A_TIME:
            write()
            size = stop - start
        if size > _TOKENS_AT_A_TIME:
            pieces = range(start, stop, _TOKENS_AT_A_TIME)
            blocks = (corpus.read(at, min(at + _TOKENS_AT_A_TIME, stop)) for at in pieces)
            writer.add_blocks(blocks, [stop - start])
            size = 0
        else:
            held.append(corpus.read(start, stop))
    write()


def shuffle(
    layout: Layout, seed: int, vocab_size: int, info: Mapping[str, Any], outputs: Sequence[str], run: Run
) -> tuple[list[Failure], dict[str, range]]:
    """Make the shuffled shards of outputs that are missing, then the lists of all.

    Args:
        info: what lists say.
        run: does tasks and records them; gives the failures.

    Returns:
        Failures, because of which no list was written, and the numbers of the shards of each output.
    """
    folder = _folder(layout)
    folder.mkdir(exist_ok=True)
    with exclusive(folder / "lock"), closing(JobRecords(folder, 0, 1)) as records:
        tasks = [task for output in outputs for task in _tasks(layout, seed, vocab_size, output)]
        made = _made(layout)
        failures = run([task for task in tasks if task.key not in made], records)
        if failures:
            return failures, {}
        made, numbers = _made(layout), {}
        Claims(layout).refuse_foreign_lists(layout, outputs)
        for output in outputs:
            found = [made[task.key] for task in tasks if task.output == output]
            numbers[output] = range(found[0].unit, found[-1].unit + 1)
            shards = [
                record.outputs[output].listed(layout.shard_name(output, record.unit)) for record in found
            ]
            write_shards(layout.list_prefix(output), shards, token_dtype(vocab_size), info)
        return [], numbers


def forget(layout: Layout) -> None:
    """Remove what is known of shuffled shards."""
    if _folder(layout).exists():
        with closing(JobRecords(_folder(layout), 0, 1)) as records:
            records.remove_all()


def _folder(layout: Layout) -> Path:
    return layout.records / "shuffled"


def _made(layout: Layout) -> dict[_Key, UnitRecord]:
    """What is finished, by output, number and marks."""
    records = read_records(_folder(layout))
    return {
        (output, record.unit, record.marks): record
        for record in records
        if shards_exist(layout, record)
        for output in record.outputs
    }


def _tasks(layout: Layout, seed: int, vocab_size: int, output: str) -> Iterator[ShuffleShard]:
    """All shards of an output, as many as its units have, under numbers that no other order of it was given:
    what is listed of that stays until there is a new list."""
    source = layout.units.list_prefix(output)
    corpus = ShardedDataset(source)
    marks = new_digest(corpus.shards.content_digest() + struct.pack("<q", seed)).hexdigest()
    count = 1 if layout.folder is None else len(corpus.shards)
    others = (
        record.unit
        for record in read_records(_folder(layout))
        if output in record.outputs and record.marks != marks
    )
    first = 1 + max(others, default=-1)
    for number in range(count):
        yield ShuffleShard(
            unit=first + number,
            inputs=[InputFile(source, 0, "")],
            output=output,
            layout=layout,
            places=(corpus.num_documents * number // count, corpus.num_documents * (number + 1) // count),
            seed=seed,
            vocab_size=vocab_size,
            marks=marks,
        )
