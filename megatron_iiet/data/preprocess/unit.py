"""One unit: its chunks in order, the results of them written down in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.mmididx import Shard, bin_path, idx_path
from megatron_iiet.data.preprocess.chunks import DigestChunk, EncodeChunk, EncodedChunk, Recipe, Report
from megatron_iiet.data.preprocess.dedup import DigestFiles, Duplicates
from megatron_iiet.data.preprocess.records import Counts, OutputRecord, UnitRecord
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.data.reading.text import read_chunks

_MAX_OUTPUTS = 256  # each holds files open


@dataclass(frozen=True)
class UnitTask(ABC):
    """Task: all of a unit. Its chunks may be done elsewhere, in parallel, as tasks of their own."""

    unit: int
    inputs: Sequence[InputFile]

    @abstractmethod
    def chunks(self, recipe: Recipe) -> Iterator[EncodeChunk | DigestChunk]:
        """A task for each chunk, in order."""

    @abstractmethod
    def write(self, recipe: Recipe, results: Iterable[Any]) -> UnitRecord | None:
        """Write down the results of all chunks, which come in order; the record of what was published."""

    def __call__(self, recipe: Recipe, report: Report) -> UnitRecord | None:
        """Run the task in this process."""
        return self.write(recipe, (task(recipe, report) for task in self.chunks(recipe)))


@dataclass(frozen=True)
class DigestUnit(UnitTask):
    """First pass of deduplication."""

    def chunks(self, recipe: Recipe) -> Iterator[DigestChunk]:
        for file in self.inputs:
            for chunk in read_chunks(file, recipe.options.chunk_bytes):
                yield DigestChunk(chunk)

    def write(self, recipe: Recipe, results: Iterable[tuple[str, int, bytes]]) -> None:
        numbers = {file.path: number for number, file in enumerate(self.inputs)}
        pieces = ((numbers[path], first_line, digests) for path, first_line, digests in results)
        DigestFiles(recipe.layout.records).write(self.unit, self.inputs, pieces)


@dataclass(frozen=True)
class EncodeUnit(UnitTask):
    """Text to shards."""

    def chunks(self, recipe: Recipe) -> Iterator[EncodeChunk]:
        duplicates = Duplicates(recipe.layout.records) if recipe.options.deduplicate else None
        for number, file in enumerate(self.inputs, start=self.unit * recipe.options.inputs_per_shard):
            for chunk in read_chunks(file, recipe.options.chunk_bytes):
                if duplicates is None:
                    yield EncodeChunk(chunk)
                else:
                    lines = chunk.data.count(b"\n") + 1
                    yield EncodeChunk(chunk, duplicates.marks(number, chunk.first_line, lines))

    def write(self, recipe: Recipe, results: Iterable[EncodedChunk]) -> UnitRecord:
        counts = Counts()
        writers: dict[str, IndexedDatasetWriter] = {}
        with ExitStack() as stack:
            for result in results:
                counts.add(result.counts)
                for output, packed in result.outputs.items():
                    if output not in writers:
                        writers[output] = stack.enter_context(self._open(recipe, output, len(writers)))
                    tokens = np.frombuffer(packed.tokens, dtype=recipe.dtype)
                    writers[output].add_documents(tokens, packed.lengths)
            shards = {output: writers[output].close() for output in sorted(writers)}
        outputs = {output: _output_record(writers[output].prefix, shard) for output, shard in shards.items()}
        return UnitRecord(self.unit, list(self.inputs), outputs, counts)

    def _open(self, recipe: Recipe, output: str, others: int) -> IndexedDatasetWriter:
        if others == _MAX_OUTPUTS:
            raise ValueError(
                f"{self.inputs[0].path} and what follows have more than {_MAX_OUTPUTS} outputs; does "
                f"{recipe.options.split_by!r} name sources?"
            )
        prefix = Path(recipe.layout.shard_prefix(output, self.unit))
        if recipe.layout.folder is not None:
            prefix.parent.mkdir(exist_ok=True)
        return IndexedDatasetWriter(prefix, recipe.encoder.vocab_size)


def _output_record(prefix: str, shard: Shard) -> OutputRecord:
    return OutputRecord(
        documents=shard.documents,
        tokens=shard.tokens,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_digest=shard.bin_digest.hex(),
        idx_digest=shard.idx_digest.hex(),
    )
