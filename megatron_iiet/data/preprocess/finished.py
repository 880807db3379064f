"""Which units are finished: what records say of inputs as they are now, with shards that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def finished_records(wanted: Wanted, units: Sequence[Unit], seen: bool = False) -> Iterator[UnitRecord]:
    """The record of each unit that is finished, of these very inputs, in no order.

    Args:
        seen: the shards were looked at a moment ago; a file system of many servers takes long to do so.
    """
    by_id = {unit.id: unit for unit in units}

    def records() -> Iterator[UnitRecord]:
        for record in read_records(wanted.layout.records):
            if record.unit in by_id and is_of(wanted, record, by_id[record.unit]):
                yield record

    made: dict[int, set[tuple[str, ...]]] = {}
    for record in records():
        made.setdefault(record.unit, set()).add(tuple(o.bin_digest for o in record.outputs.values()))
    for record in records():
        if record.unit not in by_id:
            continue
        # Lost shards were made again of other text: one of the records is of those that are there.
        again = len(made[record.unit]) > 1
        if (seen and not again) or shards_exist(wanted.layout.units, record, content=again):
            del by_id[record.unit]
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
