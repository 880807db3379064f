"""What checks are made of: figures with bounds, reasons why one cannot run, clocks that wait for the GPU."""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet import durable

BOUNDS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
OK, FAILED, REFUSED, NEEDS, LATE = "ok", "FAILED", "refused", "needs a GPU", "out of time"


class NeedsGpuError(Exception):
    """The check has nothing to look at without a GPU; the message is what it would look at."""


class RefusedError(Exception):
    """Something the check needs is missing here; the message is what, and how to get it."""


OUTCOME, SO_FAR = "outcome.json", "so_far.json"
"""Files in the folder of a check: how it ended, and what it knew until then."""


@dataclass(frozen=True)
class Figure:
    """One number of a report."""

    name: str
    value: float | None
    unit: str = ""
    against: str = ""
    """The limit or peer it was measured against, in the same run."""
    bound: str = ""
    """``>= 0.85``, ``<= 1e-5`` or ``== 0``; empty: the number is told and not judged."""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value keeps its bound. NaN and a value that is missing do not."""
        if not self.bound:
            return True
        sign, limit = self.bound.split()
        return self.value is not None and bool(BOUNDS[sign](self.value, float(limit)))


@dataclass
class Outcome:
    """How a check ended."""

    status: str
    reason: str = ""
    """Why it is not ok; of one that is, what it had no time for."""
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: such a figure has no value, and a note."""
        figures = []
        for figure in self.figures:
            stored = {**asdict(figure), "holds": figure.holds}
            if figure.value is not None and not math.isfinite(figure.value):
                stored |= {"value": None, "note": f"{figure.value} {figure.note}".strip()}
            figures.append(stored)
        return {**asdict(self), "figures": figures}

    def write(self, path: Path) -> None:
        """Whole or not at all: the writer may be killed."""
        durable.write_text(path, json.dumps(self.as_dict(), indent=1, allow_nan=False))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Outcome:
        figures = [Figure(**{k: v for k, v in f.items() if k != "holds"}) for f in stored["figures"]]
        return cls(stored["status"], stored["reason"], figures, stored["seconds"])


@dataclass
class Setting:
    """Where a check runs and how much time it has."""

    device: str
    toy: bool
    folder: Path
    """Its own, for logs and pictures."""
    seconds: float
    shard: str | None = None
    """A corpus for the training at the end, with its tokenizer."""
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self.skipped: list[str] = []
        """What there was no time for."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self._start)

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether that much is left; if not, the report names ``what`` as not done."""
        if self.left > seconds:
            return True
        self.skipped.append(what)
        return False

    def judged(self, bound: str) -> str:
        """A bound for speed or memory; on a CPU, and of toys, such figures are told and not judged."""
        return bound if self.device == "cuda" and not self.toy else ""


CheckFunction = Callable[["Setting"], Iterable[Figure]]


def outcome_of(
    check: CheckFunction, setting: Setting, keep: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Run one. Whatever it raises is its outcome, and ends it; figures it had by then are kept and judged.

    Args:
        keep: called with each figure: what is known so far, for when the process does not live to tell.
    """
    start = time.monotonic()
    figures: list[Figure] = []
    status, reasons = OK, []
    try:
        for figure in check(setting):
            figures.append(figure)
            keep(verdict(LATE, [], figures, time.monotonic() - start))
    except NeedsGpuError as needed:
        status, reasons = NEEDS, [str(needed)]
    except RefusedError as refusal:
        status, reasons = REFUSED, [str(refusal)]
    except TimeoutError as late:
        status, reasons = LATE, [str(late)]
    except Exception as error:  # the report is where it belongs
        traceback.print_exc()
        status, reasons = FAILED, [f"{type(error).__name__}: {error}"]
    if setting.skipped:
        reasons.append(f"no time was left for {', '.join(setting.skipped)}")
    if status == OK and not figures:
        status, reasons = LATE, reasons or ["no time was left for any figure"]
    return verdict(status, reasons, figures, time.monotonic() - start)


def verdict(status: str, reasons: list[str], figures: list[Figure], seconds: float) -> Outcome:
    """What it is without a look at the figures; FAILED if one of them does not keep its bound."""
    broken = [f"{f.name} is {shown(f.value)}, expected {f.bound}" for f in figures if not f.holds]
    return Outcome(FAILED if broken else status, "; ".join(broken + reasons), list(figures), seconds)


def shown(value: float | None) -> str:
    """A number as the report prints it."""
    if value is None or not math.isfinite(value):
        return "none" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def largest(values: Iterable[float]) -> float:
    """NaN if one of them is."""
    found = list(values)
    return next((value for value in found if math.isnan(value)), max(found))


def with_package() -> dict[str, str]:
    """The environment for another Python that imports this checkout, installed or not."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and they in turn."""
    found, waiting = [], [pid]
    while waiting:
        for children in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with suppress(OSError):  # it is gone
                below = [int(child) for child in children.read_text(encoding="utf-8").split()]
                found += below
                waiting += below
    return found


def synchronize(device: str) -> None:
    """Wait for what was started on the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def race(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int,
    until: Callable[[], bool] = lambda: True,
) -> dict[str, float]:
    """Median seconds of each; rounds interleave them, and the first two warm up.

    Args:
        until: asked after the fifth round and each later one; no further round once it says no.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        if round_ >= 5 and not until():
            break
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    import platform

    import torch

    from megatron_iiet.installed import version

    names = ("megatron-iiet", "torch", "triton", "deepspeed", "transformers", "numpy")
    found = {
        "python": platform.python_version(),
        **{name: version(name) or "not installed" for name in names},
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": str(torch.cuda.device_count())}
        found |= {
            "cuda": str(torch.version.cuda),
            "memory": f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB",
        }
    return found
