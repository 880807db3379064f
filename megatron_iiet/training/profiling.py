"""Where the time of some steps goes, by the phases that the engines label for torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.engine.phases import PHASES, STEP, label_of
from megatron_iiet.training.run import Run

FOLDER = "profile"
"""In the run's folder."""
_COLLECTIVES = ("gloo:", "nccl")
"""How the names of collectives begin, as gloo's threads and NCCL's kernels have them."""
_OPERATORS = 25
"""Lines of the table of operators."""


class Profiling(Callback):
    """Profiles the steps from ``first`` to ``last``: a trace of every rank, and a table of the main one's."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._profiler: profile | None = None

    def on_start(self, run: Run) -> None:
        if run.step >= self.first:
            run.say(f"nothing is profiled: step {self.first} (logging.profile) is behind step {run.step}")
        self._start_before(run.step + 1)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._profiler is not None and run.step == self.last:
            self._finish(run)
        self._start_before(run.step + 1)

    def on_end(self, run: Run) -> None:
        if self._profiler is not None:
            self._finish(run)

    def _start_before(self, step: int) -> None:
        if step != self.first or self._profiler is not None:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _finish(self, run: Run) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        if run.context.device.type == "cuda":
            torch.cuda.synchronize(run.context.device)  # what the last step started belongs to it
        profiler.stop()
        steps = range(self.first, run.step + 1)
        folder = Path(run.config.output_dir) / FOLDER
        stem = f"steps_{steps[0]}_to_{steps[-1]}.rank_{run.context.rank}"
        table = table_of(profiler.events(), len(steps))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{stem}.json.gz"))
            operators = profiler.key_averages().table(
                sort_by=f"self_{run.context.device.type}_time_total", row_limit=_OPERATORS
            )
            (folder / f"{stem}.txt").write_text(f"{table}\n\n{operators}\n", encoding="utf-8")
        except OSError as error:  # a full disk must not end a run that was only looked at
            run.say(f"warning: the profile of steps {steps[0]} to {steps[-1]} is not kept: {error}")
            return
        run.say(f"{table}\ntraces and tables: {folder}")


def table_of(events: Iterable[Any], steps: int) -> str:
    """Milliseconds a step of each phase, from a profiler's events: on the host, and of the kernels that the
    host started meanwhile. Communication runs beside the phases, or within them, and is counted twice."""
    listed = list(events)
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in (STEP, *PHASES)}
    for event in listed:
        for name, found in spans.items():
            if event.name == label_of(name):
                found.append((event.time_range.start, event.time_range.end))
    host = {name: sum(end - start for start, end in found) for name, found in spans.items()}
    device = dict.fromkeys(spans, 0.0)
    communication = [0.0, 0.0]
    for event in listed:
        kernels = sum(kernel.duration for kernel in event.kernels)
        if event.name.startswith(_COLLECTIVES[0]):
            communication[0] += event.time_range.end - event.time_range.start
        communication[1] += sum(k.duration for k in event.kernels if k.name.startswith(_COLLECTIVES[1]))
        for name, found in spans.items():
            if kernels and any(start <= event.time_range.start <= end for start, end in found):
                device[name] += kernels
    rows = {name: (host[name], device[name]) for name in PHASES if host[name]}
    rows["other"] = (
        host[STEP] - sum(host[name] for name in PHASES),
        device[STEP] - sum(device[name] for name in PHASES),
    )
    rows["step"] = host[STEP], device[STEP]
    rows["communication"] = communication[0] or communication[1], communication[1]
    return _table(rows, steps, on_device=device[STEP] > 0)


def _table(rows: Mapping[str, tuple[float, float]], steps: int, *, on_device: bool) -> str:
    column = int(on_device)
    whole = rows["step"][column] or 1.0
    lines = [f"{'phase':<14} {'ms a step':>10} {'share':>7}" + (f" {'on device':>10}" if on_device else "")]
    for name, times in rows.items():
        line = f"{name:<14} {times[0] / 1000 / steps:>10.2f} {times[column] / whole:>7.1%}"
        lines.append(line + (f" {times[1] / 1000 / steps:>10.2f}" if on_device else ""))
    return "\n".join(lines)
