"""Where a run's numbers go: ``log.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"


class MetricWriter:
    """Writes one line a step to ``output_dir/log.jsonl``, and events to ``output_dir/tensorboard``.

    A resumed run repeats the steps after its checkpoint: readers take the last line of a step.
    """

    def __init__(self, output_dir: str | Path, *, tensorboard: bool, first_step: int) -> None:
        folder = Path(output_dir)
        path = folder / LOG
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
        self._log = path.open("a")
        self._log.write("\n" * bool(torn))  # half a line stays one of its own
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
    counts. A line that is no record, as a crash leaves half of one, is told and left out.

    Raises:
        ValueError: the run has no log.
    """
    path = Path(output_dir) / LOG
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so {output_dir} is not the folder of a run")
    steps: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            print(f"warning: {path} (line {number}) is not a whole record; it is left out", file=sys.stderr)
            continue
        steps[step] = {name: value for name, value in values.items() if value is not None}
    return dict(sorted(steps.items()))
