"""What ranks do in the tests: evaluate models, one after another, each on its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.evaluation.harness import HarnessModel, TaskResults, run_tasks
from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.evaluation.scoring import score_tokens
from megatron_iiet.evaluation.tasks import load_tasks, task_names
from megatron_iiet.parallel import ParallelContext


def evaluate_all(
    models: Sequence[ModelOptions], data: Path, names: Sequence[str] = ("paper",)
) -> list[TaskResults]:
    """What this package finds of each model."""
    with ParallelContext.start() as world:  # process groups are not started twice in one process
        return [_evaluate(options, world, data, names) for options in models]


def _evaluate(options: ModelOptions, world: ParallelContext, data: Path, names: Sequence[str]) -> TaskResults:
    prepared = prepare_model(options, world.world_size)
    context = ParallelContext.on_grid(
        options.parallel, world.rank, world.world_size, world.local_rank, world.device
    )
    model = HarnessModel(prepared.load(context), prepared.codec)
    return run_tasks(model, load_tasks(task_names(names), data))


def split_scores(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Scores from this rank's columns of the logits."""
    with ParallelContext.start(ParallelConfig(tensor=logits.shape[-1] // 4)) as context:
        part = logits.chunk(context.tensor.size, -1)[context.tensor.rank]
        log_probs, greedy = score_tokens(part, targets, vocab_size, context.tensor)
    return log_probs, greedy
