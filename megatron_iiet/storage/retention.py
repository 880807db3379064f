"""Which checkpoints of a run stay, and what people said of one: a pin keeps it for good, a rejection keeps a
resume off it. Both are files in its folder, with the reason in them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_iiet import durable
from megatron_iiet.storage.checkpoint import (
    LATEST,
    STATE,
    Lineage,
    TrainState,
    checkpoints_folder,
    lacks,
    lineage_of,
    read_latest,
    read_state,
    readable_states,
    tag_of,
    verify,
)
from megatron_iiet.storage.fragments import INDEX

PINNED, REJECTED, MIRRORED = "pinned", "rejected", "mirrored"

# What a checkpoint holds, temporary names of a save that was killed included, and what NFS leaves of a file
# that a reader has open.
_OWN_FILE = re.compile(
    r"(config\.yaml|starts\.jsonl|state\.json|index\.json|rank_\d+\.safetensors|pinned|rejected|mirrored)"
    r"(\.[0-9a-f]+\.tmp)?|\.nfs\w+"
)


def mark(folder: Path, name: str, reason: str) -> None:
    """Pin or reject a checkpoint."""
    durable.write_text(folder / name, f"{reason}\n")


def unmark(folder: Path, name: str) -> None:
    """Take that back."""
    (folder / name).unlink(missing_ok=True)


def reason_of(folder: Path, name: str) -> str | None:
    """Why a checkpoint is pinned or rejected; None if it is not."""
    path = folder / name
    return path.read_text(errors="replace", encoding="utf-8").strip() if path.is_file() else None


def make_way(folder: Path) -> str:
    """Make an older checkpoint of the step about to be saved incomplete, before its files are replaced one by
    one: a kill in between must not leave a mixture that looks whole.

    A link of that name goes: what it names is somebody's. A pinned one moves aside.

    Returns:
        a sentence about what was moved, or "".
    """
    if folder.is_symlink():
        folder.unlink()
    if reason_of(folder, PINNED) is not None:
        names = (folder.with_name(f"{folder.name}-{PINNED}-{number}") for number in range(1, 1 << 20))
        aside = next(path for path in names if not path.exists())
        folder.rename(aside)
        return f"{folder} is pinned, and this step is saved anew; it is {aside} now"
    for name in (STATE, INDEX, REJECTED, MIRRORED):
        (folder / name).unlink(missing_ok=True)
    return ""


def put_in_force(output_dir: str | Path, step: int) -> None:
    """Make the checkpoint of ``step`` the one that a resume goes on from."""
    durable.write_text(checkpoints_folder(output_dir) / LATEST, tag_of(step) + "\n")


def roll_back(folder: Path) -> None:
    """Make a checkpoint the one that the next start goes on from, after all of it was read. What was written
    later and did not lead to it is rejected, and stays.

    Raises:
        DamagedError: it is not as it was written; nothing has changed.
    """
    verify(folder)
    run = folder.parents[1]
    states = readable_states(folder.parent)
    led_here = {tag_of(step) for step, _ in lineage_of(folder.name, states)}
    for tag, state in states.items():
        if tag not in led_here and _written(state) > _written(states[folder.name]):
            mark(folder.parent / tag, REJECTED, f"the run was set back to {folder.name}")
    unmark(folder, REJECTED)
    put_in_force(run, states[folder.name].step)


def _written(state: TrainState) -> tuple[int, int]:
    """Orders saves of one run."""
    return state.serial or 0, state.step


def describe_checkpoints(output_dir: str | Path) -> list[str]:
    """A line for each folder that is named as a checkpoint is, by step."""
    folder = checkpoints_folder(output_dir)
    states = readable_states(folder)
    named = read_latest(output_dir) or ""
    led_here = {tag_of(step) for step, _ in lineage_of(named, states)} if named in states else set(states)
    lines = []
    for step in sorted(_own_steps(folder)):
        path = folder / tag_of(step)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        what = [f"{size / 1e6:10,.1f} MB"]
        if path.name in states:
            state = states[path.name]
            what.append(f"save {state.save.save}" if state.save else lacks(path))
            what += ["in force"] if path.name == named else []
            what += [] if path.name in led_here else ["of another branch"]
        else:
            what.append("damaged" if (path / STATE).exists() else "incomplete")
        for name in (PINNED, REJECTED, MIRRORED):
            if (reason := reason_of(path, name)) is not None:
                what.append(f"{name} ({reason})")
        lines.append(f"{path.name}  {', '.join(what)}")
    return lines


def prune(
    output_dir: str | Path,
    lineage: Lineage,
    *,
    keep: int,
    keep_every: int = 0,
    spared: int | None = None,
    mirror: str = "",
) -> list[str]:
    """Remove all of a lineage but its last ``keep`` (0: all), those of each ``keep_every``-th step (0: none),
    the pinned ones and the step ``spared``; and what killed saves left of earlier steps. With a ``mirror``,
    of complete ones only those that have been copied there.

    Other checkpoints stay: a run that was set back has left them behind, or somebody has put them there. So
    does what is no folder, or holds what this program does not write.

    Returns:
        a sentence for each that could not be removed: no reason to end a run.
    """
    if not keep:
        return []
    folder = checkpoints_folder(output_dir)
    newest = lineage[-1][0]
    outdated = {step: save for step, save in lineage[:-keep] if not (keep_every and step % keep_every == 0)}
    warnings = []
    for step in sorted(_own_steps(folder)):
        path = folder / tag_of(step)
        half = step < newest and not (path / STATE).exists()
        if step == spared or not (half or (step in outdated and _is_of(path, outdated[step]))):
            continue
        if mirror and not half and reason_of(path, MIRRORED) != mirror:
            continue
        if reason_of(path, PINNED) is None and (warning := _remove(path)):
            warnings.append(warning)
    return warnings


def _is_of(folder: Path, save: str) -> bool:
    """Whether a checkpoint is of that save; one of a format without saves is of "". A damaged one is."""
    try:
        found = read_state(folder).save
    except ValueError:
        return True
    return save == (found.save if found else "")


def _own_steps(folder: Path) -> list[int]:
    """Steps of the folders in ``folder`` that are named as a checkpoint is, complete or not."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in folder.iterdir()]
    steps = [int(match[1]) for match in found if match and tag_of(int(match[1])) == match[0]]
    paths = {step: folder / tag_of(step) for step in steps}
    return [step for step, path in paths.items() if path.is_dir() and not path.is_symlink()]


def _remove(folder: Path) -> str:
    """Remove a checkpoint; why it is still there, or nothing."""
    try:
        foreign = sorted(path.name for path in folder.iterdir() if not _OWN_FILE.fullmatch(path.name))
        if foreign:
            what = f"{foreign[0]}, which is not of a checkpoint"
            return f"{folder} is no longer needed, but holds {what}; it stays"
        (folder / STATE).unlink(missing_ok=True)  # a kill in the middle leaves nothing that looks whole
        shutil.rmtree(folder)
    except OSError as error:
        return f"{folder} is no longer needed, but cannot be removed: {error}"
    return ""
