"""How often the host waits for the GPU in a training step: between two lines of the log, never."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gpu_checks import host_waits
from gpu_checks.base import Figure, Setting
from gpu_checks.deepspeed_runs import STAGES, configuration, folder_of
from gpu_checks.pretraining import command, need_deepspeed, run

STEPS = 16
WARM_UP = 3
"""First steps, which allocate, compile and choose algorithms."""
OPTIONS = {
    "training.steps": STEPS, "logging.interval": 10 * STEPS, "logging.solver_interval": 0,
    "checkpoint.interval": 0,
}  # fmt: skip


def check(setting: Setting) -> Iterator[Figure]:
    """A run of each ZeRO stage whose numbers nobody wants before its end."""
    need_deepspeed()
    config = configuration(setting)
    for name in ("ZeRO-1",) if setting.toy else ("ZeRO-1", "ZeRO-2", "ZeRO-3"):
        if not setting.time_for(name, 12):
            continue
        steps = count(setting, config, name)[WARM_UP:-1]  # the last one is logged
        if not steps:
            raise RuntimeError(f"{name}: no step was counted; has the training loop another one now?")
        waits = [sum(step.values()) for step in steps]
        places = sum(steps, Counter[str]()).most_common(3)
        note = ", ".join(f"{times / len(steps):.2g} at {place}" for place, times in places)
        # The median: now and then the ranks ask each other whether to stop, which may wait.
        where = f"{name}: waits of the host in a step, median"
        yield Figure(where, statistics.median(waits), "", "none", "== 0", note)
        yield Figure(f"{name}: in the step with most", max(waits), "", f"{len(waits)} steps")


def count(setting: Setting, config: Path, name: str) -> list[Counter[str]]:
    """Where each step of a run waited, and how often."""
    folder = setting.folder / folder_of(name)
    counts = folder.with_suffix(".json")
    options = [word for key, value in OPTIONS.items() for word in (f"--{key}", str(value))]
    options += ["--output_dir", str(folder), "--training.precision", "bf16"]
    python, _, *arguments = command(config, {"zero_optimization": STAGES[name]}, 1, setting.device, *options)
    counted = [python, host_waits.__file__, str(counts), setting.device, *arguments]
    run(folder, counted, setting.device, setting.left - 1)
    return [Counter(step) for step in json.loads(counts.read_text(encoding="utf-8"))]
