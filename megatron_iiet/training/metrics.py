"""Where a run's numbers go: ``log.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_iiet import durable
from megatron_iiet.data.loader.validation import FIRST, RULES

LOG, EVENTS = "log.jsonl", "tensorboard"

Values = dict[str, float | None]


class MetricWriter:
    """Writes one line a step to ``output_dir/log.jsonl``, and events to ``output_dir/tensorboard``.

    What the log has of steps that this run has not taken, as a kill leaves it beside an older checkpoint, is
    set aside in a file of its own, and half a line is cut.
    """

    def __init__(self, output_dir: str | Path, *, tensorboard: bool, first_step: int) -> None:
        """``first_step``: that of the checkpoint which the run goes on from; 0: from scratch."""
        self._path = Path(output_dir) / LOG
        self._last = self._keep_up_to(first_step)
        self._log = self._path.open("ab")
        events = self._path.parent / EVENTS
        self._events = (
            SummaryWriter(str(events), purge_step=first_step + 1 if first_step else None)
            if tensorboard
            else None
        )

    def recorded(self, step: int) -> frozenset[str]:
        """Names of the values that the log has of a step, if that is the last one in it."""
        return frozenset(self._last[1]) if self._last is not None and self._last[0] == step else frozenset()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of one step; nothing if there are none. What is no number is null in the log.
        Those of a step that has a line already, be it from before a resume, are added to it."""
        if not values:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self.recorded(step):
            assert self._last is not None
            self._last = (step, self._last[1] | numbers)
            self._replace_last(_line(*self._last))
        else:
            self._last = (step, {"time": round(time.time(), 3), **numbers})
            with durable.naming(self._path):
                self._log.write(_line(*self._last))
                self._log.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put everything written to the log on disk."""
        with durable.naming(self._path):
            durable.sync_file(self._log)
        durable.sync_folder(self._path.parent)

    def close(self) -> None:
        """Flush and close both."""
        self._log.close()
        if self._events is not None:
            self._events.close()

    def _replace_last(self, line: bytes) -> None:
        self._log.close()
        lines = self._path.read_bytes().removesuffix(b"\n").split(b"\n")
        last = max(n for n, each in enumerate(lines) if _record_of(each) is not None)
        lines[last] = line.removesuffix(b"\n")
        durable.write_bytes(self._path, b"\n".join(lines) + b"\n")
        self._log = self._path.open("ab")

    def _keep_up_to(self, step: int) -> tuple[int, Values] | None:
        """Leave the log with one line a step, up to ``step`` (none: from scratch); its last record. What is
        no record stays: who reads the log says so."""
        if not self._path.is_file():
            return None
        there = self._path.read_bytes()
        lines = there.split(b"\n")
        torn = lines.pop()
        if torn and _record_of(torn) is not None:
            lines, torn = [*lines, torn], b""  # only the end of the line is missing
        if torn:
            print(
                f"{self._path} (line {len(lines) + 1}): half a line, which a crash left, is cut", flush=True
            )
        records = [_record_of(line) for line in lines]
        newest = {record[0]: n for n, record in enumerate(records) if record is not None}
        kept: list[bytes] = []
        aside: list[bytes] = []
        for n, (line, record) in enumerate(zip(lines, records, strict=True)):
            of_this_run = record is None or (step > 0 and record[0] <= step and newest[record[0]] == n)
            (kept if of_this_run else aside).append(line + b"\n")
        if aside:
            self._set_aside(aside)
        if b"".join(kept) != there:
            durable.write_bytes(self._path, b"".join(kept))
        found = [record for line in kept if (record := _record_of(line)) is not None]
        return found[-1] if found else None

    def _set_aside(self, lines: list[bytes]) -> None:
        content = b"".join(lines)
        # Of its content: a kill before they are gone from the log must not leave them in two files.
        path = self._path.with_name(f"log.abandoned-{sha256(content).hexdigest()[:12]}.jsonl")
        durable.write_bytes(path, content)
        print(f"{self._path}: {len(lines)} record(s) of steps that this run has not taken are now in {path}")


def _line(step: int, values: Values) -> bytes:
    return json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _record_of(line: bytes) -> tuple[int, Values] | None:
    """Step and values of a line; None if it is no record."""
    try:
        values = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not _is_step(step := values.pop("step", None)):
        return None
    return (step, values) if all(v is None or _is_number(v) for v in values.values()) else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


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
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        record = _record_of(line)
        if record is None:
            print(f"warning: {path} (line {number}) is not a whole record; it is left out", file=sys.stderr)
            continue
        steps[record[0]] = {name: value for name, value in record[1].items() if value is not None}
    return dict(sorted(steps.items()))


def validation_rules(log: Mapping[int, Mapping[str, float]]) -> list[str]:
    """By which rules the windows of a log's validation losses were chosen; what does not say is older."""
    names = {number: name for name, number in RULES.items()}
    found = {v.get("validation_rule", RULES[FIRST]) for v in log.values() if "validation_loss" in v}
    return [names.get(int(number), f"number {number:g}") for number in sorted(found)]


def incomparable(logs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """A sentence where validation losses of these runs, by label, are over windows of two rules; else ""."""
    rules = {label: " and ".join(validation_rules(log)) for label, log in logs.items()}
    if len(set(filter(None, rules.values()))) < 2 and not any(" and " in each for each in rules.values()):
        return ""
    listed = ", ".join(f"{label}: {rule}" for label, rule in rules.items() if rule)
    return f"the validation losses are over windows of different rules and cannot be compared ({listed})"
