"""Which checkpoint a run goes on from: the newest that is whole, and of what led to it the next older."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_iiet.config import ConfigError
from megatron_iiet.storage.checkpoint import (
    LATEST,
    STATE,
    Lineage,
    TrainState,
    checkpoints_folder,
    complete_tags,
    lineage_of,
    read_latest,
    read_state,
    readable_states,
    tag_of,
)
from megatron_iiet.storage.integrity import DamagedError, digest_of
from megatron_iiet.storage.retention import REJECTED, reason_of


@dataclass(frozen=True)
class Candidates:
    """The checkpoints that a run may go on from, each if those before it turn out to be damaged."""

    tags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What there is to say of why it is these, and of those that were left out."""
    others: list[str] = field(default_factory=list)
    """Complete ones that are none: of another branch, or rejected."""
    began: bool = False
    """Whether there is any sign of a checkpoint: then a run must not start from scratch."""


def find_candidates(output_dir: str | Path) -> Candidates:
    """What ``latest`` names, and then what led to it; where ``latest`` says nothing, what was written last.

    Raises:
        ConfigError: ``latest`` is a folder, or what it names is of a format that is not known here.
    """
    folder = checkpoints_folder(output_dir)
    named, complete = read_latest(output_dir), complete_tags(output_dir)
    if not complete and named is None:
        begun = sorted(path.name for path in folder.glob("step_*") if path.is_dir())
        told = f"{folder / begun[0]} is not complete, as a kill leaves a first save" if begun else ""
        return Candidates(notes=[f"{told}; starting from scratch"] if begun else [])
    states, notes = _read(folder, complete, named)
    # By the order of writing; of before there was one, by step.
    written = sorted(states, key=lambda tag: (states[tag].serial or 0, states[tag].step))
    if named in complete:
        tags = [tag_of(step) for step, _ in reversed(lineage_of(str(named), states))]
    else:
        tags = written[::-1]
        number = re.fullmatch(r"step_(\d{8,18})", named or "")
        if number:  # it was written last: what has more steps is of another branch
            tags = [tag for tag in tags if states[tag].step < int(number[1])]
        if named is None:
            notes.append("'latest' is missing; of the complete checkpoints the one written last is taken")
        else:
            notes.append(f"'latest' names {named[:80]!r}, which is not a complete checkpoint")
    rejected = {tag: reason for tag in tags if (reason := reason_of(folder / tag, REJECTED)) is not None}
    notes += [f"{tag} is left out: it was rejected ({reason})" for tag, reason in rejected.items()]
    tags = [tag for tag in tags if tag not in rejected]
    return Candidates(tags, notes, [tag for tag in written if tag not in tags], began=True)


def _read(folder: Path, tags: list[str], named: str | None) -> tuple[dict[str, TrainState], list[str]]:
    """The states that can be read, and a sentence for each that cannot."""
    states, notes = {}, []
    for tag in tags:
        try:
            states[tag] = read_state(folder / tag)
        except ConfigError as error:
            if tag == named and not isinstance(error, DamagedError):
                raise
            notes.append(f"{tag} is left out: {error}")
    return states, notes


def lineage_to(folder: Path) -> Lineage:
    """A checkpoint, and after what led to it that is still there."""
    return lineage_of(folder.name, readable_states(folder.parent))


def next_serial(output_dir: str | Path) -> int:
    """For the next save of a run: one more than any checkpoint there has."""
    states = readable_states(checkpoints_folder(output_dir))
    return 1 + max((state.serial or 0 for state in states.values()), default=0)


def no_candidate(output_dir: str | Path, candidates: Candidates, reasons: list[str]) -> ConfigError:
    """There are checkpoints, and none can be gone on from."""
    told = "; ".join(reasons) or "'latest' names one, and there is none"
    folder = checkpoints_folder(output_dir)
    way = f"put a whole one back, remove {folder} to start from scratch, or choose another output_dir"
    if candidates.others:
        way = (
            f"go on from one of {', '.join(candidates.others)} with tools/checkpoints.py {output_dir} "
            "--roll-back STEP, or choose another output_dir"
        )
    return ConfigError(f"{folder} has no checkpoint that can be gone on from ({told}); {way}")


def seen_here(output_dir: str | Path, looked_into: Sequence[str]) -> dict[str, str]:
    """What this host's file system shows of a run's checkpoints: which are complete, a digest of the state of
    some, and 'latest'."""
    folder = checkpoints_folder(output_dir)
    seen = {
        tag: _digest(folder / tag / STATE) if tag in looked_into else "" for tag in complete_tags(output_dir)
    }
    if (named := read_latest(output_dir)) is not None:
        seen[LATEST] = named
    return seen


def _digest(path: Path) -> str:
    try:
        return digest_of(path.read_bytes())
    except OSError as error:
        return str(error.strerror)
