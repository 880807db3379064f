"""Real saves of a model of one parameter: what the store does with the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_iiet.parallel.group import Group
from megatron_iiet.storage import checkpoint, retention
from megatron_iiet.storage.fragments import MASTER, Fragment, place_of, write_fragments, write_index
from megatron_iiet.storage.selection import next_serial
from tests.tiny import save_of, tiny_config

FILE = "rank_00000.safetensors"


class Saves:
    """A run that does nothing but save."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = checkpoint.checkpoints_folder(output_dir)
        self.lineage: checkpoint.Lineage = []

    def save(self, *steps: int) -> Path:
        """Save after each of the steps; the last one's folder."""
        for step in steps:
            self._save(step)
        return self.at(steps[-1])

    def _save(self, step: int) -> None:
        config, folder = tiny_config({}, self.output_dir), self.at(step)
        layout = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}
        serial = next_serial(self.output_dir)
        state = checkpoint.TrainState(step, {}, layout, serial=serial, before=list(self.lineage))
        save = save_of(config, state)
        folder.mkdir(parents=True, exist_ok=True)
        retention.make_way(folder)
        weight = torch.full((1000,), float(step))
        fragment = Fragment("weight", place_of(None, (1000,), Group()), 1000, {MASTER: weight})
        written = write_fragments(folder / FILE, [fragment], save)
        write_index(folder, {FILE: written}, save)
        checkpoint.write_metadata(folder, config, state, save)
        retention.put_in_force(self.output_dir, step)
        self.lineage.append((step, save.save))

    def at(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / checkpoint.tag_of(step)

    def set_back(self, step: int) -> None:
        """As a start does that goes on from an earlier checkpoint."""
        self.lineage = [one for one in self.lineage if one[0] <= step]

    def prune(self, keep: int, keep_every: int = 0, spared: int | None = None, mirror: str = "") -> list[str]:
        """Retention after the last save."""
        return retention.prune(
            self.output_dir, self.lineage, keep=keep, keep_every=keep_every, spared=spared, mirror=mirror
        )

    def kept(self) -> list[str]:
        """What is in the folder, a checkpoint as the end of its step."""
        return sorted(path.name.removeprefix("step_0000000") for path in self.folder.glob("step_*"))


def flip_a_bit(file: Path) -> None:
    """In the last byte, which is of a tensor."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
