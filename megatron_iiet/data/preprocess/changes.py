"""How a plan changes as its inputs do: what is finished of unchanged inputs stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_iiet.data.preprocess.dedup import Duplicates
from megatron_iiet.data.preprocess.finished import as_now, finished_records, is_of
from megatron_iiet.data.preprocess.plan import Plan, Wanted, first_inputs, grouped
from megatron_iiet.data.preprocess.records import Unit, read_records
from megatron_iiet.data.reading.sources import InputFile


@dataclass
class Changes:
    """What happened to inputs since a plan was made."""

    stale: set[int] = field(default_factory=set)  # units that were finished of other inputs
    paths: dict[str, set[str]] = field(default_factory=dict)  # by what happened

    def describe(self, plan: Plan, after: Plan) -> str:
        """One line."""
        kept = {unit.id for unit in plan.units} & {unit.id for unit in after.units}
        what = ", ".join(f"{len(paths):,} {verb}" for verb, paths in self.paths.items() if paths)
        rate = "" if plan.rate is None else f"; the sample's rate stays {plan.rate:.4g}"
        return (
            f"inputs: {what or 'in another order'}; {len(after.units) - len(kept):,} units to make, "
            f"{len(kept):,} kept{rate}"
        )


def find_changes(wanted: Wanted, plan: Plan) -> Changes:
    now = {file.path for file in wanted.inputs}
    before = {file.path for file in plan.inputs}
    changes = Changes(paths={"added": now - before, "removed": before - now})
    changed, left_out = (changes.paths.setdefault(verb, set()) for verb in ("changed", "left out before"))
    units = {unit.id: unit for unit in as_now(plan, wanted.inputs)}
    good = set()
    for record in read_records(wanted.layout.records):
        unit = units.get(record.unit)
        if unit is None or len(unit.inputs) < len(record.inputs):
            continue
        if is_of(wanted, record, unit):
            good.add(unit.id)
            continue
        changes.stale.add(unit.id)
        pairs = zip(record.inputs, unit.inputs, strict=True)
        changed |= {now.path for then, now in pairs if then.identity != now.identity}
        left_out |= record.skipped.keys() - changed
    changes.stale -= good
    return changes


def renewed(plan: Plan, inputs: Sequence[InputFile], stale: set[int]) -> Plan:
    """A plan for the inputs as they are now; units whose inputs are all there stay, if they are not stale."""
    place = {file.path: number for number, file in enumerate(inputs)}
    next_unit, units = plan.next_unit, []
    for unit in plan.units:
        rest = [inputs[place[file.path]] for file in unit.inputs if file.path in place]
        if rest and (len(rest) < len(unit.inputs) or unit.id in stale):
            units.append(Unit(next_unit, rest))
            next_unit += 1
        elif rest:
            units.append(Unit(unit.id, rest))
    known = {file.path for file in plan.inputs}
    new = [file for file in inputs if file.path not in known]
    if plan.options["inputs_per_shard"] is not None:
        units += grouped(new, plan.options, next_unit)
    elif [file for unit in units for file in unit.inputs] != list(inputs):
        units = grouped(inputs, plan.options, next_unit)
    units.sort(key=lambda unit: min(place[file.path] for file in unit.inputs))
    next_unit = max([next_unit, *(unit.id + 1 for unit in units)])
    return replace(plan, units=units, next_unit=next_unit)


def with_other_marks(wanted: Wanted, plan: Plan) -> set[int]:
    """Units that were finished when other lines of theirs were duplicates than are by what is known now."""
    units, records = as_now(plan, wanted.inputs), wanted.layout.records
    inputs = [file for unit in units for file in unit.inputs]
    if not wanted.options.deduplicate or not Duplicates.are_of(records, inputs):
        return set()
    marks = Duplicates(records)
    starts = first_inputs(units)
    counts = {unit.id: len(unit.inputs) for unit in units}
    return {
        record.unit
        for record in finished_records(wanted, units)
        if record.marks != marks.digest(starts[record.unit], counts[record.unit])
    }
