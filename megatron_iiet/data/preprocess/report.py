"""What a run tells at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_iiet.data.preprocess.lists import Summary
from megatron_iiet.data.preprocess.workshop import Failure

WAITING = 75  # EX_TEMPFAIL of sysexits.h: start it again later


@dataclass
class PreprocessReport:
    """What was done, and what is not."""

    all_units: Summary
    """All finished units, of this and earlier runs and all jobs."""
    this_run: Summary
    """Units finished by this run."""
    missing: int
    """Units that nobody has finished; the lists are written when it is 0."""
    mine_missing: int = 0
    """Those of them that belong to this job."""
    failures: Sequence[Failure] = field(default_factory=list)
    waiting: str = ""
    """What the other jobs have to do first; empty if nothing."""
    wanted_tokens: int | None = None
    """Tokens of the sample that was asked for."""
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
