"""The end of a run: shard lists over the shards of all units, and what is told."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_iiet.data.corpora.mmididx import Shard, shards_path, token_dtype
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.preprocess.dedup import DigestFiles
from megatron_iiet.data.preprocess.finished import finished_records, remade_units
from megatron_iiet.data.preprocess.layout import Layout, known_outputs
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.plan import Plan, Wanted
from megatron_iiet.data.preprocess.records import Counts, Total, Unit, UnitRecord
from megatron_iiet.data.preprocess.work import Failure

_TOLD_INPUTS = 20  # the records and lists name all
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")
WAITING = 75  # EX_TEMPFAIL of sysexits.h: start it again later


@dataclass
class Summary:
    """What some finished units amount to."""

    units: int = 0
    outputs: dict[str, Total] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    skipped: dict[str, str] = field(default_factory=dict)  # inputs that were left out, and why

    def add(self, record: UnitRecord) -> None:
        """Add a unit."""
        self.units += 1
        self.counts.add(record.counts)
        self.skipped |= record.skipped
        for output, shard in record.outputs.items():
            self.outputs.setdefault(output, Total()).add(shard)

    @property
    def total(self) -> Total:
        """Over all outputs."""
        total = Total()
        for output in self.outputs.values():
            total.add(output)
        return total


def summarize(wanted: Wanted, units: Sequence[Unit]) -> Summary:
    """All finished units."""
    summary = Summary()
    for record in finished_records(wanted, units):
        summary.add(record)
    return summary


def write_lists(
    wanted: Wanted, plan: Plan, units: Sequence[Unit], summary: Summary
) -> dict[str, Container[int]]:
    """Write the lists of all outputs over the shards of units, once all are finished; their ids by output. A
    list that is there as it should be stays.

    Raises:
        ValueError: there is no document at all.
    """
    place = wanted.layout.units
    _refuse_none(plan, summary)
    dtype = token_dtype(plan.tokenizer["vocab_size"])
    listed: dict[str, Container[int]] = {}
    remade = remade_units(wanted, units)
    Claims(wanted.layout).refuse_foreign_lists(place, summary.outputs)
    for output in sorted(summary.outputs):
        shards = _shards(wanted, units, output, remade)
        in_order = [shards[unit.id] for unit in units if unit.id in shards]
        write_shards(place.list_prefix(output), in_order, dtype, list_info(plan, summary))
        listed[output] = set(shards)
    return listed


def _shards(wanted: Wanted, units: Sequence[Unit], output: str, remade: Container[int]) -> dict[int, Shard]:
    """Shards of an output by their units. Records are read for each, so that memory holds one at a time."""
    return {
        record.unit: shard.listed(wanted.layout.units.shard_name(output, record.unit))
        for record in finished_records(wanted, units, remade)
        if (shard := record.outputs.get(output)) is not None
    }


def list_info(plan: Plan, summary: Summary) -> dict[str, Any]:
    """What lists say of how they were made."""
    return {
        "tokenizer": plan.tokenizer,
        "append_eod": plan.options["append_eod"],
        "made_by": "tools/preprocess_data.py",
        "options": plan.options,
        "sampling": plan.sampling,
        **({"bad_inputs": dict(sorted(summary.skipped.items()))} if summary.skipped else {}),
    }


def _refuse_none(plan: Plan, summary: Summary) -> None:
    if not summary.outputs and summary.skipped:
        path, reason = next(iter(sorted(summary.skipped.items())))
        raise ValueError(
            f"The inputs hold no documents: {len(summary.skipped):,} of them cannot be read, such as {path}: "
            f"{reason}"
        )
    if not summary.outputs:
        keys = " and ".join(map(repr, plan.options["json_keys"]))
        told = [offender for some in summary.counts.offenders.values() for offender in some[:1]]
        such_as = f", such as {told[0]}" if told else ""
        found = [f"{number:,} {what}" for number, what in _numbers(summary.counts) if number]
        raise ValueError(
            f"The inputs hold no documents: every text under {keys} is empty or left out"
            f" ({', '.join(found) or 'there is none'}){such_as}; give others, or change what leaves them out."
        )


def _numbers(counts: Counts) -> list[tuple[int, str]]:
    return [
        (counts.empty, "empty documents"),
        (counts.duplicates, "duplicates"),
        (counts.wrong_length, "documents shorter or longer than wanted"),
        (counts.other_language, "documents in other languages, or in none that can be told"),
        (counts.sampled_out, "documents outside the sample"),
    ]


def refuse_empty(layout: Layout, plan: Plan, summary: Summary) -> None:
    """Refuse an output, of others that are listed, which was asked for and has no document; of sources nobody
    knows which there are.

    Raises:
        ValueError: there is one.
    """
    if plan.options["split_by"] is not None:
        return
    asked = {split for split in ("validation", "test") if plan.options[f"holdout_{split}"]}
    for output in known_outputs(plan.options):
        is_asked = output.split in (None, "train") or output.split in asked
        if is_asked and output.name not in summary.outputs:
            raise ValueError(
                f"There is no document for {layout.list_prefix(output.name)}: every text under "
                f"{output.key!r} is empty, left out or of another split; the other outputs are whole."
            )


def clear_up(
    layout: Layout,
    plan: Plan,
    units: Sequence[Unit],
    places: Sequence[tuple[Layout, Mapping[str, Container[int]]]],
) -> None:
    """Remove what of this place's own outputs no list names; nobody is at work any more.

    Args:
        units: the plan's, with the inputs as they are now.
        places: where shards are, and what is listed of each output.
    """
    claims, known = Claims(layout), {output.name for output in known_outputs(plan.options)}
    for output in claims.names():
        for place, listed in places:
            if output not in listed:
                claims.making.remove(shards_path(place.list_prefix(output)))
            for unit, path in place.files(output):
                if not (output in listed if unit is None else unit in listed.get(output, ())):
                    claims.making.remove(path)
        if output not in listed and output not in known:
            claims.release(output)
    claims.making.clear()
    DigestFiles(layout.records).remove_all(but=(unit.inputs for unit in units))
    for path in layout.records.rglob("*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@dataclass
class PreprocessReport:
    """What was done, and what is not."""

    all_units: Summary  # all finished units, of this and earlier runs and all jobs
    this_run: Summary  # units finished by this run
    missing: int  # units that nobody has finished; the lists are written when it is 0
    mine_missing: int = 0  # those of them that belong to this job
    failures: Sequence[Failure] = field(default_factory=list)
    waiting: str = ""  # what the other jobs have to do first; empty if nothing
    wanted_tokens: int | None = None  # tokens of the sample that was asked for
    rate: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0: this job is done; 1: something failed; 75: start it again when the other jobs are as far."""
        if self.failures or self.waiting or self.mine_missing:
            return WAITING if self.waiting and not self.failures else 1
        return 0

    def __str__(self) -> str:
        lines = []
        if not self.missing:
            lines += self._outputs()
            lines += self._left_out(self.all_units)
        elif self.this_run.units:
            lines += self._left_out(self.this_run)
        if self.this_run.units:
            total = self.this_run.total
            per_second, per_cpu_second = (
                f"{total.tokens / max(seconds, 1e-9):,.0f}" for seconds in (self.seconds, self.cpu_seconds)
            )
            lines.append(
                f"this run: {self.this_run.units:,} shards of {total.documents:,} documents, "
                f"{total.tokens:,} tokens in {self.seconds:.1f} s ({per_second} tokens/s, "
                f"{per_cpu_second} tokens/CPU-s)"
            )
        if self.missing and not self.failures and not self.waiting:
            lines.append(
                f"{self.missing:,} shards of other jobs are missing; the job that finishes last "
                "writes the lists."
            )
        return "\n".join(lines)

    def _outputs(self) -> list[str]:
        lines = [
            f"{output}: {total.documents:,} documents, {total.tokens:,} tokens, "
            f"{total.bin_bytes / 1e6:,.1f} MB"
            for output, total in sorted(self.all_units.outputs.items())
        ]
        if self.wanted_tokens is not None:
            kept = self.all_units.total.tokens
            lines.append(
                f"kept {_big(kept)} tokens of {_big(self.wanted_tokens)} wanted (rate {self.rate:.4g})"
            )
        return lines

    @staticmethod
    def _left_out(summary: Summary) -> list[str]:
        counts = summary.counts
        lines = [f"left out: {number:,} {what}" for number, what in _numbers(counts) if number]
        for reason, number in sorted(counts.rejected.items()):
            lines.append(f"left out: {number:,} rows, {reason}, such as")
            lines += [f"    {offender}" for offender in counts.offenders[reason]]
        if summary.skipped:
            lines.append(f"left out: {len(summary.skipped):,} inputs that cannot be read, such as")
            reasons = sorted(summary.skipped.items())[:_TOLD_INPUTS]
            lines += [f"    {reason if path in reason else f'{path}: {reason}'}" for path, reason in reasons]
        return lines


def _big(number: int) -> str:
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:.4g} {letter}"
    return str(number)
