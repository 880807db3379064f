"""Where a run's numbers go: ``log.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricWriter:
    """Writes one line a step to ``output_dir/log.jsonl``, and events to ``output_dir/tensorboard``.

    A resumed run repeats the steps after its checkpoint: readers take the last line of a step.
    """

    def __init__(self, output_dir: str | Path, *, tensorboard: bool, first_step: int) -> None:
        folder = Path(output_dir)
        self._log = (folder / "log.jsonl").open("a")
        self._events = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
            if tensorboard
            else None
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of one step; nothing if there are none. What is no number is null in the log."""
        if not values:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **numbers}
        self._log.write(json.dumps(record, allow_nan=False) + "\n")
        self._log.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._log.close()
        if self._events is not None:
            self._events.close()


def read_log(output_dir: str | Path) -> dict[int, dict[str, float]]:
    """``log.jsonl`` as step → values, those apart that were no numbers; of a repeated step the last line
    counts.

    Raises:
        ValueError: the run has no log.
    """
    path = Path(output_dir) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so {output_dir} is not the folder of a run")
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        steps[step] = {name: value for name, value in values.items() if value is not None}
    return dict(sorted(steps.items()))
