"""Which units are finished: what records say of inputs as they are now, with shards that are there."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from megatron_iiet.data.corpora.mmididx import bin_path, file_digest, idx_path
from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.plan import Plan, Wanted
from megatron_iiet.data.preprocess.records import Total, Unit, UnitRecord, identities, read_records
from megatron_iiet.data.reading.sources import InputFile


def as_now(plan: Plan, inputs: Sequence[InputFile]) -> list[Unit]:
    """A plan's units with their inputs as they are now, those that are gone left out."""
    now = {file.path: file for file in inputs}
    return [
        Unit(unit.id, [now[file.path] for file in unit.inputs if file.path in now]) for unit in plan.units
    ]


def finished_records(
    wanted: Wanted, units: Sequence[Unit], remade: Container[int] | None = None
) -> Iterator[UnitRecord]:
    """The record of each unit that is finished, of these very inputs, in no order.

    Args:
        remade: what :func:`remade_units` gives, where the shards of all units were looked at a moment ago; a
            file system of many servers takes long to do so.
    """
    left, seen = {unit.id: unit for unit in units}, remade is not None
    again = remade_units(wanted, units) if remade is None else remade
    for record in _records_of(wanted, left):
        is_again = record.unit in again
        if (seen and not is_again) or shards_exist(wanted.layout.units, record, content=is_again):
            del left[record.unit]
            yield record


def remade_units(wanted: Wanted, units: Sequence[Unit]) -> set[int]:
    """Units with several records: lost shards were made again of other text, and one of the records is of
    those that are there."""
    made: dict[int, tuple[str, ...]] = {}
    again = set()
    for record in _records_of(wanted, {unit.id: unit for unit in units}):
        digests = tuple(output.bin_digest for output in record.outputs.values())
        if made.setdefault(record.unit, digests) != digests:
            again.add(record.unit)
    return again


def _records_of(wanted: Wanted, units: Mapping[int, Unit]) -> Iterator[UnitRecord]:
    for record in read_records(wanted.layout.records):
        if record.unit in units and is_of(wanted, record, units[record.unit]):
            yield record


def is_of(wanted: Wanted, record: UnitRecord, unit: Unit) -> bool:
    """Whether a record is of a unit's inputs as they are now, none left out that must not be."""
    accepted = not record.skipped or wanted.options.bad_inputs == "skip"
    return accepted and identities(record.inputs) == identities(unit.inputs)


def finished_work(wanted: Wanted, plan: Plan) -> str:
    """What would be lost with a plan's shards."""
    ids, total = {unit.id for unit in plan.units}, Total()
    count = 0
    for record in read_records(wanted.layout.records):
        if record.unit in ids and shards_exist(wanted.layout.units, record):
            ids.remove(record.unit)
            count += 1
            for shard in record.outputs.values():
                total.add(shard)
    return f"{count:,} finished shards of {total.documents:,} documents, {total.tokens:,} tokens"


def shards_exist(layout: Layout, record: UnitRecord, content: bool = False) -> bool:
    """Whether the shards of a record are there in full size; with ``content`` every byte is compared."""
    for output, shard in record.outputs.items():
        prefix = layout.shard_prefix(output, record.unit)
        for path, size, digest in (
            (bin_path(prefix), shard.bin_bytes, shard.bin_digest),
            (idx_path(prefix), shard.idx_bytes, shard.idx_digest),
        ):
            if not path.exists() or path.stat().st_size != size:
                return False
            if content and file_digest(path).hex() != digest:
                return False
    return True
