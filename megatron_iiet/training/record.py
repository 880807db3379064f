"""What a run leaves to say how it was made: its configuration, and a line of ``starts.jsonl`` a start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_iiet import __version__, durable
from megatron_iiet.config import ConfigError, RunConfig, config_to_yaml
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage.checkpoint import CONFIG, checkpoints_folder
from megatron_iiet.training.lock import LOCK
from megatron_iiet.training.metrics import EVENTS, LOG
from megatron_iiet.training.resume import Resumption

DS_CONFIG, STARTS = "ds_config.json", "starts.jsonl"
_GIT_SECONDS = 10.0


def check_output_dir(output_dir: str | Path) -> None:
    """Refuse a folder that a run could not write into, before it begins: a folder and a file in it are made
    where the run's first ones will be, and removed again; what it will go on with is opened.

    Raises:
        ConfigError: saying why not.
    """
    run = Path(output_dir)
    for path in (run, checkpoints_folder(run), run / EVENTS):
        there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        try:
            with TemporaryDirectory(prefix=".probe", dir=there) as probe:
                place = Path(probe) / os.path.relpath(path, there)
                place.mkdir(parents=True, exist_ok=True)
                (place / STARTS).write_text("\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"output_dir is {output_dir}, where nothing can be written ({there}: {error.strerror}); make "
                "room for it there, or choose another one"
            ) from None
    for name in (CONFIG, DS_CONFIG, STARTS, LOG, LOCK):
        if (run / name).is_dir():
            raise ConfigError(
                f"output_dir is {output_dir}, where {run / name} is a folder, not the file that the run "
                "writes; remove it, or choose another output_dir"
            )
    for name in (STARTS, LOG):
        try:
            if (run / name).exists():
                (run / name).open("ab").close()
        except OSError as error:
            raise ConfigError(
                f"output_dir is {output_dir}, where {run / name} cannot be gone on with ({error.strerror}); "
                "give this user the right to write it, or choose another output_dir"
            ) from None


def write_configurations(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Write the resolved configurations into the run's folder."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_text(folder / CONFIG, config_to_yaml(config))
    durable.write_text(folder / DS_CONFIG, json.dumps(ds_config, indent=2) + "\n")


def restore_configuration(output_dir: str | Path, folder: Path) -> None:
    """Make a run's ``config.yaml`` that of the checkpoint in ``folder``: a kill after a save, before it was
    written, or a person may have left another."""
    there, here = folder / CONFIG, Path(output_dir) / CONFIG
    if not here.is_file() or here.read_bytes() != there.read_bytes():
        durable.write_text(here, there.read_text(encoding="utf-8"))


def start_of(
    context: ParallelContext,
    layout: dict[str, int],
    found: Resumption | None,
    held_out: ValidationBatches | None = None,
) -> dict[str, Any]:
    """The record of a start; ``held_out``: what is validated on. Every rank calls it: each says on which host
    it is."""
    hosts = context.world.gather_objects(socket.gethostname())
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git": {"commit": commit, "dirty": dirty},
        "versions": {
            "megatron_iiet": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "cuda": torch.version.cuda,
        },
        "hosts": list(dict.fromkeys(hosts)),
        "layout": {"world_size": context.world_size, **layout},
        "validation": None
        if held_out is None
        else {
            "rule": held_out.rule,
            "samples": {
                source.stream.prefix: count
                for source, count in zip(held_out.sources, held_out.counts, strict=True)
            },
        },
        "resumed_step": None if found is None else found.state.step,
        "changed": [] if found is None else [difference.as_data() for difference in found.changed],
        "accepted": [] if found is None else [difference.as_data() for difference in found.accepted],
    }


def append_start(output_dir: str | Path, start: dict[str, Any]) -> None:
    """Add a line to the run's ``starts.jsonl``; on disk when this returns."""
    durable.append_line(Path(output_dir) / STARTS, json.dumps(start))


def copy_starts(output_dir: Path, folder: Path) -> None:
    """Put a copy of the run's ``starts.jsonl``, if nobody has removed it, into a checkpoint's folder."""
    if (output_dir / STARTS).is_file():
        durable.write_text(
            folder / STARTS, (output_dir / STARTS).read_text(errors="replace", encoding="utf-8")
        )


def read_starts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The starts that a ``starts.jsonl`` holds, and a sentence for each line that a crash left half."""
    starts, broken = [], []
    lines = path.read_text(errors="replace", encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            start = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            start = None
        if isinstance(start, dict):
            starts.append(start)
        else:
            broken.append(f"{path} (line {number}) is not a whole line; it is left out")
    return starts, broken


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out around ``folder``, and whether tracked files differ from it; None where
    its files are not tracked, or git is not there."""
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None, None
    commit, status = (
        _git(folder, *arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    return (commit.strip() if commit else None), (None if status is None else bool(status.strip()))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            encoding="utf-8",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
