"""What a run achieved and what it left on disk, in a few lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_iiet.config import config_from_file
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import incomparable, read_log, validation_rules
from megatron_iiet.training.record import STARTS, read_starts


def summarize_run(folder: str | Path) -> str:
    """Validation before and after, training loss, time; how often it was started, and last with which code.

    Raises:
        ValueError: it is not the folder of a run, or the run has not validated yet.
    """
    folder = Path(folder)
    log = read_log(folder)
    config = config_from_file(folder / "config.yaml")
    validation = {s: v["validation_loss"] for s, v in log.items() if "validation_loss" in v}
    losses = {s: v["loss"] for s, v in log.items() if "loss" in v}
    if not validation or not losses:
        raise ValueError(f"{folder} holds no validated steps yet; let the run go on")
    first, last = min(validation), max(validation)
    tokens = max(losses) * config.training.global_batch_size * config.data.sequence_length
    rates = [v["tokens_per_second"] for v in log.values() if "tokens_per_second" in v]
    speed = f", median {sorted(rates)[len(rates) // 2]:,.0f} tokens/s" if rates else ""
    lines = [
        f"{max(losses)} of {config.training.steps} steps, {tokens / 1e6:.2f} M tokens{speed}",
        f"validation perplexity {math.exp(validation[first]):.1f} at step {first} → "
        f"{math.exp(validation[last]):.2f} at step {last} (loss {validation[last]:.4f} nats per token; "
        f"windows: rule {' and '.join(validation_rules(log))})",
    ]
    if warning := incomparable({str(folder): log}):
        lines.append(f"warning: {warning}")
    starts, broken = read_starts(folder / STARTS)
    if starts:
        lines.append(f"started {len(starts)} x, last {_describe_start(starts[-1])}")
    return "\n".join(lines + [f"warning: {sentence}" for sentence in broken])


def check_complete(folder: str | Path) -> None:
    """Refuse a run that has not saved all its steps, whatever its launcher said: one whose ranks are
    gone may exit with 0.

    Raises:
        ValueError: it is not the folder of a run, or steps are missing.
    """
    folder = Path(folder)
    steps = config_from_file(folder / "config.yaml").training.steps
    tag = checkpoint.latest_tag(folder)
    taken = 0 if tag is None else checkpoint.read_state(checkpoint.checkpoints_folder(folder) / tag).step
    if taken < steps:
        raise ValueError(f"{folder} has a checkpoint of {taken} of {steps} steps; the same command goes on")


def _describe_start(start: dict[str, Any]) -> str:
    commit, dirty = start["git"]["commit"], start["git"]["dirty"]
    code = "no known commit" if commit is None else f"commit {commit[:10]}{' with changes' if dirty else ''}"
    step = "" if start["resumed_step"] is None else f" from step {start['resumed_step']}"
    return f"{start['time']}{step}, {code}, on {start['layout']['world_size']} process(es)"


def list_files(*paths: str | Path) -> list[str]:
    """``path  size`` of files and of every file under folders, checkpoints' shards summed up by folder."""
    rows: dict[str, int] = {}
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            in_checkpoint = "checkpoints" in file.parts and file.parent.name.startswith("step_")
            name = f"{file.parent}/" if in_checkpoint else str(file)
            rows[name] = rows.get(name, 0) + file.stat().st_size
    return [f"{size / 1e6:9.2f} MB  {name}" for name, size in rows.items()]
