"""What is to be done, settled while the output's lock is held: jobs that start together agree on one plan.

Other options than the plan's are refused; other inputs change it, by :func:`follow`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_iiet.data.corpora.mmididx import shards_path
from megatron_iiet.data.preprocess.changes import find_changes, renewed, with_other_marks
from megatron_iiet.data.preprocess.dedup import DigestFiles, Duplicates, duplicates_path, remove_marks
from megatron_iiet.data.preprocess.estimate import sampling
from megatron_iiet.data.preprocess.finished import as_now, finished_records, finished_work, shards_exist
from megatron_iiet.data.preprocess.layout import Layout, known_outputs
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.plan import Plan, Wanted, differences, grouped
from megatron_iiet.data.preprocess.records import JobRecords, Unit, read_records
from megatron_iiet.data.preprocess.shuffle import forget
from megatron_iiet.durable import replacing

_RECORD = re.compile(
    r"lock|job-\d{5,}-of-\d{5,}\.jsonl|outputs|making|digests|unshuffled|shuffled|duplicates\.(bin|lock)|.*\.tmp"
)


@dataclass(frozen=True)
class Settled:
    """What is to be done."""

    plan: Plan
    units: list[Unit]  # the plan's, with the inputs as they are now
    finished: set[int]  # ids of units
    told: list[str] = field(default_factory=list)  # how the plan had to change

    def marks_due(self, wanted: Wanted) -> bool:
        """Whether duplicates are to be looked for before anything is listed."""
        inputs = [file for unit in self.units for file in unit.inputs]
        return wanted.options.deduplicate and not Duplicates.are_of(wanted.layout.records, inputs)


def check_place(wanted: Wanted) -> None:
    """Refuse a place with files of somebody else's, before anything is written.

    Raises:
        ValueError: an output that is wanted is there and not this place's, or the folder of the records is
            something else's.
    """
    layout, claims = wanted.layout, Claims(wanted.layout)
    has_plan = layout.plan.exists()
    if has_plan and not _looks_like_plan(layout.plan):
        raise ValueError(
            f"{layout.plan} was not written by this tool; choose another output, or remove it yourself."
        )
    if not has_plan and layout.records.is_dir():
        for path in sorted(layout.records.iterdir()):
            if not _RECORD.fullmatch(path.name):
                raise ValueError(
                    f"{path} is not of this tool, whose records belong in {layout.records}; choose another "
                    "output, or move it away."
                )
    for output in known_outputs(wanted.deciding):
        claims.refuse_foreign(output.name)
    if not has_plan and not wanted.options.overwrite:
        for name in claims.names():
            if (found := claims.found(name)) is not None:
                raise ValueError(
                    f"{found} is there already, but no {layout.plan}; use another output or --overwrite."
                )


def _looks_like_plan(path: Path) -> bool:
    try:
        return {"format", "options", "units"} <= json.loads(path.read_bytes()).keys()
    except (ValueError, AttributeError):
        return False


def settle(wanted: Wanted, records: JobRecords) -> Settled:
    """What is to be done: by the plan that is there, as changed inputs change it, else by a new one.

    While no unit was ever finished and nobody is at work, a plan makes room for another.

    Raises:
        ValueError: the plan is of other options, or the inputs changed while other jobs run.
    """
    layout = wanted.layout
    if not layout.plan.exists():
        return _start(wanted, records)
    plan, others = Plan.read(layout.plan), records.others_running()
    found = differences(plan, wanted.deciding)
    other_inputs = [file.path for file in plan.inputs] != [file.path for file in wanted.inputs]
    if (found or other_inputs) and not others and next(read_records(layout.records), None) is None:
        remove_everything(wanted, records)
        return _start(wanted, records)
    if found:
        raise ValueError(
            f"{layout.plan} was made with other settings: {'; '.join(found)}; give the former ones, or use "
            f"another output: --overwrite would remove {finished_work(wanted, plan)}."
        )
    _refuse_streams(wanted, plan)
    return follow(wanted, plan, others)


def follow(wanted: Wanted, plan: Plan, others: bool) -> Settled:
    """Change a plan as its inputs changed; what is finished of unchanged inputs stays.

    An input may change until a unit of it is finished: a truncated file can be fetched again. Then, or when
    one of several is gone, the unit is replaced by a new one with shards of its own; those of the old stay
    until there are new lists.

    Raises:
        ValueError: other jobs work by the plan as it is.
    """
    layout = wanted.layout
    changes = find_changes(wanted, plan)
    after = renewed(plan, wanted.inputs, changes.stale)
    told = []
    if after.shape() != plan.shape():
        told.append(changes.describe(plan, after))
        if others:
            raise ValueError(
                f"{told[0]}; other jobs of {layout.records} are running: wait for them or stop them, then "
                "start again."
            )
        _write(layout, after)
    elif stale := with_other_marks(wanted, plan):
        # Other jobs look as well before they tokenize, so none works by the plan as it was.
        after = renewed(plan, wanted.inputs, stale)
        _write(layout, after)
        told.append(
            f"duplicates: {len(stale):,} finished units are made again, as other lines of theirs repeat "
            "earlier ones now"
        )
    else:
        after = plan
    settled = _settled(wanted, after, told)
    if settled.marks_due(wanted) and duplicates_path(layout.records).exists():
        if others:
            raise ValueError(
                f"The inputs changed since other jobs of {layout.records}, which are running, looked for "
                "duplicates; wait for them or stop them, then start again."
            )
        remove_marks(layout.records)
    return settled


def _settled(wanted: Wanted, plan: Plan, told: list[str]) -> Settled:
    units = as_now(plan, wanted.inputs)
    finished = {record.unit for record in finished_records(wanted, units)}
    return Settled(plan, units, finished, told)


def _refuse_streams(wanted: Wanted, plan: Plan) -> None:
    for record in read_records(wanted.layout.records):
        streams = [file.path for file in record.inputs if file.is_stream]
        if streams and shards_exist(wanted.layout.units, record):
            raise ValueError(
                f"{wanted.layout.plan} is of shards that were made of {streams[0]}, which can be read only "
                "once, so there is nothing to compare; use another output: --overwrite would remove "
                f"{finished_work(wanted, plan)}."
            )


def remove_everything(wanted: Wanted, records: JobRecords) -> None:
    """Remove what earlier runs wrote: lists first, so that nothing names what is no longer there.

    Raises:
        ValueError: other jobs are writing.
    """
    layout, claims = wanted.layout, Claims(wanted.layout)
    if records.others_running():
        raise ValueError(f"Other jobs of {layout.records} are running; stop them before --overwrite.")
    outputs = claims.names()
    for place in (layout, layout.unshuffled):
        for output in outputs:
            claims.making.remove(shards_path(place.list_prefix(output)))
        for output in outputs:
            for _, path in place.files(output):
                claims.making.remove(path)
    claims.making.clear()
    forget(layout)
    remove_marks(layout.records)
    DigestFiles(layout.records).remove_all()
    records.remove_all()
    for output in outputs:
        claims.release(output)
    layout.plan.unlink(missing_ok=True)


def _start(wanted: Wanted, records: JobRecords) -> Settled:
    """A new plan; what a start that was killed left in the records says nothing."""
    if records.others_running():
        raise ValueError(
            f"{wanted.layout.plan} is gone while other jobs work by it; stop them, then start again."
        )
    records.remove_all()
    encoder, claims = wanted.encoder(), Claims(wanted.layout)
    units = grouped(wanted.inputs, wanted.deciding)
    plan = Plan(
        options=wanted.deciding,
        tokenizer={
            "file": os.path.basename(wanted.options.tokenizer_model),
            "digest": wanted.tokenizer_digest,
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
        sampling=sampling(wanted.options, wanted.inputs, encoder),
        units=units,
        next_unit=len(units),
    )
    for name in claims.names():
        claims.release(name)
    for output in known_outputs(plan.options):
        claims.take(output)
    _write(wanted.layout, plan)
    return Settled(plan, units, set())


def _write(layout: Layout, plan: Plan) -> None:
    with replacing(layout.plan) as file:
        file.write(plan.to_json())
