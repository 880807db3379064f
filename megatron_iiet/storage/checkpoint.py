"""The checkpoints of a run, and which of them is in force. ``latest`` is replaced atomically after every
rank's shards are on disk: a kill at any moment leaves the previous checkpoint in force."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet import durable
from megatron_iiet.config import ConfigError, RunConfig, config_from_file, config_to_yaml
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.storage.fragments import FORMAT, INDEX, FragmentReader
from megatron_iiet.storage.integrity import (
    REMEDY,
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
_FORM = {"step": int, "data": dict, "layout": {str: int}, "plan": (None, dict)}

# What a checkpoint holds, temporary names of a save that was killed included, and what NFS leaves of a file
# that a reader has open.
_OWN_FILE = re.compile(
    r"(config\.yaml|starts\.jsonl|state\.json|index\.json|rank_\d+\.safetensors)(\.[0-9a-f]+\.tmp)?|\.nfs\w+"
)


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
    names = [file.parent.name for file in checkpoints_folder(output_dir).glob("step_*/state.json")]
    return sorted((name for name in names if re.fullmatch(r"step_\d{8,}", name)), key=lambda n: int(n[5:]))


def latest_tag(output_dir: str | Path) -> str | None:
    """Name of the newest complete checkpoint of a run, or None: what ``latest`` says, and without it, as a
    kill before it was written or an unfinished copy leaves a run, the one of most steps.

    Raises:
        ConfigError: ``latest`` names a checkpoint that is not there, or is no file.
    """
    folder = checkpoints_folder(output_dir)
    marker = folder / "latest"
    if not os.path.lexists(folder):  # False of what is no path at all, too
        return None
    if marker.is_dir():
        raise ConfigError(f"{marker} is a folder, not a file that names a checkpoint; remove it")
    if not marker.is_file():
        return next(reversed(complete_tags(output_dir)), None)
    tag = marker.read_text(errors="replace", encoding="utf-8").strip()
    if not os.path.isfile(folder / tag / STATE):  # no path at all may stand there
        shown = repr(tag)[1:-1][:80]
        raise ConfigError(
            f"{marker} names '{shown}', but {folder / shown} is not a complete checkpoint; "
            "write the name of one that is into 'latest', or choose another output_dir"
        )
    return tag


def read_config(folder: Path) -> RunConfig:
    """The configuration that a checkpoint was made with.

    Raises:
        ConfigError: it is missing, or not the one that was written.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {CONFIG}, so it is not a complete checkpoint; choose another step"
        )
    save = read_state(folder).save
    if save is not None and digest_of(path.read_bytes()) != save.config:
        raise ConfigError(
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
        ConfigError: it is missing, damaged or of another format.
    """
    path = folder / STATE
    try:
        content = read_json(path)
        found = content.get("format")
        if found not in (*_WITHOUT_SAVES, FORMAT):
            raise ValueError(f"{path} is of format {found!r}, not {FORMAT}; use the version that wrote it")
        save = None
        if found == FORMAT:
            content = check_seal(path, content)
            save = SaveIdentity(content.pop("save"), content["step"], content.pop("config"))
        del content["format"]
        if wrong := misfit(content, _FORM):
            raise ValueError(f"{path} is damaged: {wrong}; {REMEDY}")
        state = TrainState(**content, save=save)
        if re.fullmatch(r"step_\d+", folder.name) and folder.name != tag_of(state.step):
            raise ValueError(
                f"{folder} holds the checkpoint of step {state.step}, not the one that its name says; give "
                f"it the name {tag_of(state.step)}"
            )
        return state
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); use another checkpoint") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def invalidate(folder: Path) -> None:
    """Make an older checkpoint of the same step incomplete, before its files are replaced one by one.

    A kill in between must not leave a mixture that looks whole. A link of that name goes: what it names is
    somebody's."""
    if folder.is_symlink():
        folder.unlink()
    for name in (STATE, INDEX):
        (folder / name).unlink(missing_ok=True)


def commit(output_dir: str | Path, step: int, keep: int) -> list[str]:
    """Make the checkpoint of ``step`` the newest, then remove all from before but ``keep - 1`` (0 keeps all).

    What this program did not make stays: a copy under another name, a link, a file. So do checkpoints of
    later steps, which a run that was set back has left behind.

    Returns:
        a sentence for each checkpoint that could not be removed: no reason to end a run.
    """
    folder = checkpoints_folder(output_dir)
    durable.write_text(folder / "latest", tag_of(step) + "\n")
    if not keep:
        return []
    earlier = sorted(before for before in _own_steps(folder) if before < step)
    outdated = [folder / tag_of(before) for before in earlier[: max(0, len(earlier) + 1 - keep)]]
    return [warning for old in outdated if (warning := _remove(old))]


def _own_steps(folder: Path) -> list[int]:
    """Steps of the folders in ``folder`` that are named as a checkpoint is, complete or not."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in folder.iterdir()]
    steps = [int(match[1]) for match in found if match and tag_of(int(match[1])) == match[0]]
    paths = {step: folder / tag_of(step) for step in steps}
    return [step for step, path in paths.items() if path.is_dir() and not path.is_symlink()]


def _remove(folder: Path) -> str:
    """Remove a checkpoint; why it is still there, or nothing."""
    foreign = sorted(path.name for path in folder.iterdir() if not _OWN_FILE.fullmatch(path.name))
    if foreign:
        return f"{folder} is no longer needed, but holds {foreign[0]}, which is not of a checkpoint; it stays"
    try:
        shutil.rmtree(folder)
    except OSError as error:
        return f"{folder} is no longer needed, but cannot be removed: {error}"
    return ""
