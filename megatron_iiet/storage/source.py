"""Any model on disk as a configuration and weights, of which a rank reads the rows that hold its part."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.models.transformer import VOCABULARY_WEIGHTS
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.storage import checkpoint, portable
from megatron_iiet.storage.checkpoint_model import find_checkpoint, model_of_checkpoint
from megatron_iiet.storage.fragments import SCRATCH_BYTES, Place, place_of
from megatron_iiet.storage.hugging_face import llama
from megatron_iiet.storage.integrity import digest_of
from megatron_iiet.storage.parameters import Weights

KINDS = (
    "a model folder of tools/convert_checkpoint.py (config.yaml, model.safetensors), a training run's "
    "output_dir or one of its checkpoints, or a Hugging Face folder (config.json and weights) of a LLaMA, "
    "Mistral, Qwen2 or Qwen3 or one that tools/convert_checkpoint.py wrote"
)


@dataclass(frozen=True)
class Source:
    """A model to take weights from."""

    description: str
    """What and where it is."""
    config: RunConfig
    weights: Weights

    def digest(self) -> str:
        """Of the first row of every parameter: tells models apart, not two that share those rows."""
        rows = [
            name.encode() + self.weights.rows(name, 0, 1).numpy().tobytes() for name in sorted(self.weights)
        ]
        return digest_of(b"".join(rows))

    def fill_parameter(self, name: str, parameter: Tensor, tensor: Group) -> None:
        """Fill a rank's part of a parameter, which must be there to write to."""
        place = place_of(shard_of(parameter), parameter.shape, tensor)
        self.fill(name, parameter.detach().view(-1), place)

    def fill(self, name: str, out: Tensor, place: Place) -> None:
        """Fill ``out``, [numel] on any device, with an interval of a rank's flattened local shard.

        The whole parameter is that of the model that starts, its vocabulary's padding included, whose rows
        are zero.
        """
        shape, shard, start = place.shape, place.shard, place.start
        local = shard.local_shape(shape, place.tensor_size) if shard else shape
        slices = shard.slices(place.tensor_size, place.tensor_rank) if shard else []
        width, end = prod(local[1:]), start + len(out)
        most = max(1, SCRATCH_BYTES // (4 * prod(shape[1:])))
        last = -(-end // width)
        for row in range(start // width, last, most):
            stop = min(row + most, last)
            if shard is not None and shard.dim == 0:
                rows = self._split_rows(name, slices, row, stop)
            else:
                rows = self._rows(name, row, stop)
            if shard is not None and shard.dim == 1:
                rows = torch.cat([rows[:, columns] for columns in slices], 1)
            low, high = max(start, row * width), min(end, stop * width)
            part = rows.reshape(-1)[low - row * width : high - row * width]
            out[low - start : high - start].copy_(part)

    def _split_rows(self, name: str, slices: list[slice], first: int, last: int) -> Tensor:
        """Rows [first, last) of a local shard that is made of the rows ``slices`` of the whole."""
        parts, start = [], 0
        for held in slices:
            shift = held.start - start
            low, high = max(first, start), min(last, start + held.stop - held.start)
            if low < high:
                parts.append(self._rows(name, low + shift, high + shift))
            start += held.stop - held.start
        return torch.cat(parts)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the whole parameter; those of the vocabulary's padding are zero.

        Raises:
            ValueError: a value is no number.
        """
        model = self.config.model
        stored = min(last, model.vocab_size) if name in VOCABULARY_WEIGHTS else last
        found = self.weights.rows(name, min(first, stored), stored)
        if not found.isfinite().all():
            row = first + int((~found.isfinite()).nonzero()[0, 0])
            raise ValueError(
                f"{self.weights.holding(name, row)} holds NaN or infinity, first in row {row} of {name}; use "
                "weights that are numbers, such as those of an earlier checkpoint"
            )
        if stored == last:
            return found
        return torch.cat((found, found.new_zeros(last - max(first, stored), model.hidden_size)))


def open_model(path: str | Path, key: str, *, step: int | None = None) -> Source:
    """The model at ``path``, of whichever of the :data:`KINDS`; ``key``: the setting that messages name;
    ``step``: of a run, the checkpoint after so many steps instead of the newest.

    Raises:
        ValueError: (and its subclass ConfigError) it is none of them, or damaged.
    """
    if not str(path):
        raise ConfigError(f"{key} is empty; give {KINDS}")
    folder = Path(path) if step is None else find_checkpoint(path, step)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{key} is {path}, which {found}; give {KINDS}")
    if (folder / "checkpoints").is_dir():
        folder = find_checkpoint(folder, None)
    if (folder / "state.json").is_file():
        lacks = f" ({why})" if (why := checkpoint.lacks(folder)) else ""
        return Source(f"checkpoint {folder}{lacks}", *model_of_checkpoint(folder))
    if all((folder / file).is_file() for file in (portable.CONFIG_FILE, portable.WEIGHTS_FILE)):
        stored = portable.StoredModel(folder)
        return Source(f"model {folder}", stored.config, stored)
    if (folder / llama.CONFIG_FILE).is_file():
        config, weights = llama.open_folder(folder)
        return Source(f"{llama.family_of(folder).title} {folder}", config, weights)
    raise ConfigError(f"{key} is {path}, which is none of what it may be; give {KINDS}")
