"""The end of a run: shard lists over the shards of all units, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_iiet.data.corpora.mmididx import Shard, shards_path, token_dtype
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.preprocess.layout import Layout, output_name
from megatron_iiet.data.preprocess.plan import Plan, shards_exist
from megatron_iiet.data.preprocess.records import Counts, Total, UnitRecord, read_records
from megatron_iiet.data.preprocess.workshop import Failure

WAITING = 75  # EX_TEMPFAIL of sysexits.h: start it again later


@dataclass
class Summary:
    """What some finished units amount to."""

    units: int = 0
    outputs: dict[str, Total] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def add(self, record: UnitRecord) -> None:
        """Add a unit."""
        self.units += 1
        self.counts.add(record.counts)
        for output, shard in record.outputs.items():
            self.outputs.setdefault(output, Total()).add(shard)

    @property
    def total(self) -> Total:
        """Over all outputs."""
        total = Total()
        for output in self.outputs.values():
            total.add(output)
        return total


def write_lists(layout: Layout, plan: Plan, rewrite: bool) -> tuple[Summary, int]:
    """Write the lists of all outputs if all units are finished; a summary, and how many units are missing.

    Lists that are there stay unless ``rewrite``.

    Raises:
        ValueError: an output that is not one of several sources has no document.
    """
    summary = Summary()
    seen = set()
    for record in read_records(layout.records):
        if record.unit not in seen and shards_exist(layout, record):
            seen.add(record.unit)
            summary.add(record)
    missing = len(plan.units()) - summary.units
    if missing:
        return summary, missing
    _refuse_empty(plan, summary)
    outputs = sorted(summary.outputs)
    if rewrite or not all(shards_path(layout.list_prefix(output)).exists() for output in outputs):
        dtype = token_dtype(plan.tokenizer["vocab_size"])
        for output in outputs:
            shards = _shards(layout, output)
            in_order = [shards[unit] for unit in sorted(shards)]
            write_shards(layout.list_prefix(output), in_order, dtype, _info(plan))
    _remove_leftovers(layout, set(outputs))
    return summary, 0


def _shards(layout: Layout, output: str) -> dict[int, Shard]:
    """Shards of an output by their units. Records are read for each, so that memory holds one at a time."""
    return {
        record.unit: Shard(
            name=layout.shard_name(output, record.unit),
            tokens=shard.tokens,
            documents=shard.documents,
            bin_digest=bytes.fromhex(shard.bin_digest),
            idx_digest=bytes.fromhex(shard.idx_digest),
        )
        for record in read_records(layout.records)
        if (shard := record.outputs.get(output)) is not None
    }


def _info(plan: Plan) -> dict[str, Any]:
    return {
        "tokenizer": plan.tokenizer,
        "append_eod": plan.options["append_eod"],
        "made_by": "tools/preprocess_data.py",
        "options": plan.options,
        "sampling": plan.sampling,
    }


def _refuse_empty(plan: Plan, summary: Summary) -> None:
    if not summary.outputs:
        keys = " and ".join(map(repr, plan.options["json_keys"]))
        raise ValueError(f"The inputs hold no documents: every text under {keys} is empty or left out.")
    if plan.options["split_by"] is not None:
        return
    split = "train" if plan.options["holdout_validation"] or plan.options["holdout_test"] else None
    for key in plan.options["json_keys"]:
        if output_name(None, split, key) not in summary.outputs:
            raise ValueError(f"The inputs hold no documents: every text under {key!r} is empty or left out.")


def _remove_leftovers(layout: Layout, outputs: set[str]) -> None:
    """Temporary files of runs that were killed; nobody is at work any more."""
    for _, path in layout.files(outputs, discover=True):
        if path.suffix == ".partial":
            path.unlink(missing_ok=True)
    for path in layout.records.rglob("*.tmp"):
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
        if self.failures or self.mine_missing:
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
        numbers = [
            (counts.empty, "empty documents"),
            (counts.duplicates, "duplicates"),
            (counts.wrong_length, "documents shorter or longer than wanted"),
            (counts.sampled_out, "documents outside the sample"),
        ]
        lines = [f"left out: {number:,} {what}" for number, what in numbers if number]
        for reason, number in sorted(counts.rejected.items()):
            lines.append(f"left out: {number:,} rows, {reason}, such as")
            lines += [f"    {offender}" for offender in counts.offenders[reason]]
        return lines


def _big(number: int) -> str:
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:.4g} {letter}"
    return str(number)
