"""A training checkpoint as a plain fp32 model: what the ranks of any layout wrote, put together again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.config.schema import GuidanceConfig
from megatron_iiet.config.solvers import Euler, Iterating
from megatron_iiet.models.iterations import iterations_at
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.fragments import MASTER, Place
from megatron_iiet.storage.hugging_face.llama import files_of_tokenizer
from megatron_iiet.storage.parameters import StoredParameters


@dataclass(frozen=True)
class ExportedRun:
    """A model as a run left it at one of its checkpoints."""

    folder: Path
    """The checkpoint."""
    config: RunConfig
    """Describes the function the model computed at that step; ``data.tokenizer`` is a bare file name."""
    state: StoredWeights
    """Parameter name → fp32 tensor, read when asked for."""
    tokenizer_files: list[Path]
    """The run's tokenizer, and what else says how it is read."""


def export_run(run_folder: str | Path, step: int | None = None) -> ExportedRun:
    """Read the newest checkpoint of a run, or the one of ``step``, whatever layout wrote it.

    In the middle of two-stage training the solver is the one of the stage that the step belongs to: a
    checkpoint of the first stage is exported as the plain Transformer++ it is. Of influence-guided training
    the layers have the iterations of the plan in force.

    Raises:
        ValueError: (and its subclass ConfigError) no run, no such checkpoint, a damaged one, or its
            tokenizer is gone.
    """
    folder = find_checkpoint(run_folder, step)
    config, state = model_of_checkpoint(folder)
    files = _tokenizer_files(config, folder)
    config.data.tokenizer = files[0].name if files else ""
    return ExportedRun(folder, config, state, files)


def model_of_checkpoint(folder: Path) -> tuple[RunConfig, StoredWeights]:
    """The model in a checkpoint folder: a configuration of the function it computed, and its weights.

    Raises:
        ValueError: (and its subclass ConfigError) it is damaged or incomplete.
    """
    config = checkpoint.read_config(folder)
    state = StoredWeights(folder)
    _settle_guidance(config, folder)
    _settle_schedule(config, state, checkpoint.read_state(folder).step)
    return config, state


def find_checkpoint(run_folder: str | Path, step: int | None) -> Path:
    """The folder of a run's newest complete checkpoint, or of the one after ``step`` steps.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    there = checkpoint.complete_tags(run_folder)
    if not there:
        raise ConfigError(f"{run_folder} holds no complete checkpoint; give the output_dir of a training run")
    tag = checkpoint.latest_tag(run_folder) if step is None else checkpoint.tag_of(step)
    if tag not in there:
        raise ConfigError(f"{run_folder} has no checkpoint {tag}; there are {', '.join(there)}")
    return checkpoint.checkpoints_folder(run_folder) / tag


class StoredWeights(StoredParameters):
    """The fp32 weights of a checkpoint, put together of what ranks wrote; the vocabulary's padding is there.

    Raises:
        ValueError: the checkpoint is damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = checkpoint.open_weights(folder)
        self.shapes = {name: entry.shape for name, entry in self._reader.parameters.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        entry = self._reader.parameters[name]
        width = prod(entry.shape[1:])
        place = Place(entry.shape, entry.shard, 1, 0, first * width)
        flat = self._reader.read(name, MASTER, place, (last - first) * width)
        return flat.view(-1, *entry.shape[1:])

    def holding(self, name: str, row: int) -> str:
        files = sorted({piece.file for piece in self._reader.parameters[name].pieces})
        return f"tensor {MASTER}/{name} in {self._reader.folder / ', '.join(files)}"

    def leave_out(self, part_of_name: str) -> None:
        """Forget the parameters whose name contains ``part_of_name``."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if part_of_name not in name}


def _settle_guidance(config: RunConfig, folder: Path) -> None:
    """Make the solver section list, without guidance, the iterations in force: an E-IIET."""
    if not config.guidance.interval:
        return
    assert isinstance(config.solver, Iterating)  # validated
    state, plan = checkpoint.read_state(folder), checkpoint.read_plan(folder)
    iterations = iterations_at(config, state.step)[0] if plan is None else plan.iterations
    config.guidance = GuidanceConfig()
    config.solver.iterations = list(iterations)


def _settle_schedule(config: RunConfig, state: StoredWeights, step: int) -> None:
    """Make the solver section say, without a schedule, what the model computed in its last step."""
    if not isinstance(config.solver, Iterating) or config.solver.schedule is None:
        return
    iterations, merging = iterations_at(config, max(step - 1, 0))
    config.solver.schedule = None
    if merging:
        config.solver.iterations = iterations if len(set(iterations)) > 1 else iterations[0]
        return
    config.solver = Euler()
    state.leave_out(".solver.")


def _tokenizer_files(config: RunConfig, folder: Path) -> list[Path]:
    if not config.data.tokenizer:
        return []
    tokenizer = Path(config.data.tokenizer)
    if not tokenizer.is_file():
        raise ConfigError(
            f"the tokenizer {tokenizer}, which data.tokenizer in {folder / 'config.yaml'} names, is missing; "
            "put it back, or start from the folder the run was started in"
        )
    return files_of_tokenizer(tokenizer)
