"""A checkpoint: a folder that is complete with its ``state.json``, which is written last; and which one the
``latest`` of a run names. What else there is to go on from says ``selection``, what may go ``retention``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet import durable
from megatron_iiet.config import ConfigError, RunConfig, config_from_file, config_to_yaml
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.storage.fragments import FORMAT, FragmentReader
from megatron_iiet.storage.integrity import (
    REMEDY,
    SEAL,
    DamagedError,
    SaveIdentity,
    check_seal,
    digest_of,
    misfit,
    read_json,
    write_sealed,
)

_WITHOUT_SAVES = (2, 3, 4)
# 4 had no digests; 3 had no iteration plan; 2 had a place in the data of another form, which the reader of
# samples understands.

CONFIG, STATE = "config.yaml", "state.json"
LATEST = "latest"
Lineage = list[tuple[int, str]]
"""Checkpoints that each led to the next, oldest first: step and save ("" of a format without saves)."""
_FORM = {
    "step": int,
    "data": dict,
    "layout": {str: int},
    "plan": (None, dict),
    "loss_scale": (None, {"scale": float, "steady": int, "hysteresis": int}),
    "serial": (None, int),
    "before": (None, [[int, str]]),
}


@dataclass(frozen=True)
class TrainState:
    """Everything outside weights and optimizer that the next step depends on."""

    step: int
    """Finished optimizer steps."""
    data: dict[str, Any]
    """State of the sample reader, and what the corpora hold that it is a place in."""
    layout: dict[str, int]
    """How the writing processes were laid out; only told to the user."""
    plan: dict[str, Any] | None = None
    """The iteration plan in force, as :meth:`IterationPlan.to_data` has it."""
    loss_scale: dict[str, Any] | None = None
    """An fp16 run's loss scale and what moves it."""
    serial: int | None = None
    """How many saves of this run there had been, of all its branches, with this one; None of older ones."""
    before: Lineage | None = None
    """What led here and was still there; None of older ones."""
    save: SaveIdentity | None = field(default=None, compare=False)
    """Which save it was read from; None of a format without."""


def checkpoints_folder(output_dir: str | Path) -> Path:
    """Where the checkpoints of a run live."""
    return Path(output_dir) / "checkpoints"


def tag_of(step: int) -> str:
    """Name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def complete_tags(output_dir: str | Path) -> list[str]:
    """Names of the complete checkpoints of a run, by step; copies under other names are none."""
    folder = checkpoints_folder(output_dir)
    if not os.path.lexists(folder):  # False of what is no path at all, too
        return []
    names = [file.parent.name for file in folder.glob("step_*/state.json")]
    return sorted((name for name in names if re.fullmatch(r"step_\d{8,}", name)), key=lambda n: int(n[5:]))


def read_latest(output_dir: str | Path) -> str | None:
    """What the ``latest`` of a run says, be it the name of a checkpoint or not; None if there is none.

    Raises:
        ConfigError: it is a folder.
    """
    marker = checkpoints_folder(output_dir) / LATEST
    if not os.path.lexists(marker.parent):
        return None
    if marker.is_dir():
        raise ConfigError(f"{marker} is a folder, not a file that names a checkpoint; remove it")
    return marker.read_text(errors="replace", encoding="utf-8").strip() if marker.is_file() else None


def latest_tag(output_dir: str | Path) -> str | None:
    """Name of the newest complete checkpoint of a run, or None: what ``latest`` says, and without it, as a
    kill before it was written or an unfinished copy leaves a run, the one of most steps.

    Raises:
        ConfigError: ``latest`` names a checkpoint that is not there, or is no file.
    """
    tag = read_latest(output_dir)
    if tag is None:
        return next(reversed(complete_tags(output_dir)), None)
    folder = checkpoints_folder(output_dir)
    if not os.path.isfile(folder / tag / STATE):  # no path at all may stand there
        shown = repr(tag)[1:-1][:80]
        raise ConfigError(
            f"{folder / LATEST} names '{shown}', but {folder / shown} is not a complete checkpoint; "
            f"tools/checkpoints.py {output_dir} shows those that are, and sets a run back to one"
        )
    return tag


def read_config(folder: Path) -> RunConfig:
    """The configuration that a checkpoint was made with.

    Raises:
        DamagedError: it is missing, or not the one that was written.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DamagedError(
            f"{folder} has no {CONFIG}, so it is not a complete checkpoint; choose another step"
        )
    save = read_state(folder).save
    if save is not None and digest_of(path.read_bytes()) != save.config:
        raise DamagedError(
            f"{path} was edited or damaged: its digest is not the one in {STATE} beside it; copy the whole "
            "checkpoint again, or use another one"
        )
    return config_from_file(path)


def read_plan(folder: Path) -> IterationPlan | None:
    """The iteration plan in force when a checkpoint was written, if there was one.

    Raises:
        ValueError: it is damaged or of another version.
    """
    plan = read_state(folder).plan
    if plan is None:
        return None
    layers = read_config(folder).model.num_layers
    return IterationPlan.from_data(plan, layers=layers, source=f"'plan' in {folder / STATE}")


def open_weights(folder: Path) -> FragmentReader:
    """The weights and moments of a checkpoint.

    Raises:
        ValueError: files are missing, damaged, or of different saves.
    """
    return FragmentReader(folder, read_state(folder).save)


def lacks(folder: Path) -> str:
    """What a checkpoint of an older format does not have; "" of the present one."""
    if read_state(folder).save is not None:
        return ""
    return "of a format without digests: damage to its files is not noticed"


def write_metadata(folder: Path, config: RunConfig, state: TrainState, save: SaveIdentity) -> None:
    """Write ``config.yaml`` and ``state.json`` into a checkpoint folder; with the latter it is complete."""
    durable.write_text(folder / CONFIG, config_to_yaml(config))
    content = {"format": FORMAT, "save": save.save, "config": save.config}
    content |= {name: getattr(state, name) for name in _FORM}
    write_sealed(folder / STATE, content, indent=2)


def read_state(folder: Path) -> TrainState:
    """The training state stored in a checkpoint folder.

    Raises:
        DamagedError: it is missing, not what was written, or in another checkpoint's folder.
        ConfigError: it is of a format that is not known here.
    """
    path = folder / STATE
    content = read_json(path)
    found = content.get("format")
    save = None
    if found == FORMAT or SEAL in content:
        content = check_seal(path, content)
    if type(found) is not int:
        raise DamagedError(f"{path} is damaged: its format is {found!r}; {REMEDY}")
    if found not in (*_WITHOUT_SAVES, FORMAT):
        raise ConfigError(f"{path} is of format {found!r}, not {FORMAT}; use the version that wrote it")
    try:
        if found == FORMAT:
            save = SaveIdentity(content.pop("save"), content["step"], content.pop("config"))
        del content["format"]
        if wrong := misfit(content, _FORM):
            raise DamagedError(f"{path} is damaged: {wrong}; {REMEDY}")
        if content.get("before") is not None:
            content["before"] = [tuple(one) for one in content["before"]]
        state = TrainState(**content, save=save)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}); use another checkpoint") from None
    if re.fullmatch(r"step_\d+", folder.name) and folder.name != tag_of(state.step):
        raise DamagedError(
            f"{folder} holds the checkpoint of step {state.step}, not the one that its name says; give "
            f"it the name {tag_of(state.step)}"
        )
    return state


def readable_states(folder: Path) -> dict[str, TrainState]:
    """The states of a run's complete checkpoints, by name, but for those that cannot be read."""
    states = {}
    for tag in complete_tags(folder.parent):
        with suppress(ConfigError):
            states[tag] = read_state(folder / tag)
    return states


def lineage_of(tag: str, states: Mapping[str, TrainState]) -> Lineage:
    """A checkpoint, unless its state cannot be read, and after what led to it, of ``states``; where its state
    does not say that, all of fewer steps."""
    step = int(tag.removeprefix("step_"))
    saves = {state.step: state.save.save if state.save else "" for state in states.values()}
    before = states[tag].before if tag in states else None
    if before is None:
        before = [(other, saves[other]) for other in sorted(saves) if other < step]
    own = [(step, saves[step])] if tag in states else []
    return [(other, save) for other, save in before if saves.get(other) == save] + own


def check_whole(folder: Path) -> None:
    """What can be known of a checkpoint without reading what its tensors hold.

    Raises:
        DamagedError: a file is missing, of another save or size, or not what was written.
    """
    read_config(folder)
    with open_weights(folder) as reader:
        reader.check_headers()


def verify(folder: Path) -> int:
    """Read all of a checkpoint; how many bytes its tensors have.

    Raises:
        DamagedError: something is not as it was written.
    """
    read_config(folder)
    read_plan(folder)
    with open_weights(folder) as reader:
        return reader.verify()
