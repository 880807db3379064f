"""Which units are finished: what records say of inputs as they are now, with shards that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_iiet.data.corpora.mmididx import bin_path, idx_path
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


def finished_records(wanted: Wanted, units: Sequence[Unit], seen: bool = False) -> Iterator[UnitRecord]:
    """The record of each unit that is finished, of these very inputs, in no order.

    Args:
        seen: the shards were looked at a moment ago; a file system of many servers takes long to do so.
    """
    missing = {unit.id: unit for unit in units}
    for record in read_records(wanted.layout.records):
        unit = missing.get(record.unit)
        if unit is None or not is_of(wanted, record, unit):
            continue
        if seen or shards_exist(wanted.layout.units, record):
            del missing[record.unit]
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


def shards_exist(layout: Layout, record: UnitRecord) -> bool:
    """Whether the shards of a record are there in full size."""
    for output, shard in record.outputs.items():
        prefix = layout.shard_prefix(output, record.unit)
        for path, size in ((bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)):
            if not path.exists() or path.stat().st_size != size:
                return False
    return True
