"""Evaluation tasks in the loop: what lm-evaluation-harness says of the model while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.data.loader.validation import ValidationBatch
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.evaluation.scoring import TokenScores, noting_scores
from megatron_iiet.evaluation.tasks import PAPER_TASKS, load_tasks, task_names
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.callbacks import Callback, is_due
from megatron_iiet.training.engine import Engine, StepResult
from megatron_iiet.training.run import Run

_PIPELINE_ROWS = 8
"""Batches of each stage in one schedule; between schedules training may end."""
_PAPER_METRIC = {task.name: task.metric for task in PAPER_TASKS}


class EngineScorer:
    """A model in training, in whatever layout; see :class:`megatron_iiet.evaluation.scoring.Scorer`.

    Texts are cut to the length of training in every layout, so that all of them say the same.
    """

    def __init__(
        self, engine: Engine, config: RunConfig, between: Callable[[], object] = lambda: None
    ) -> None:
        """``between``: called on every rank between batches, of a pipeline's between some."""
        self.engine = engine
        self.between = between
        self.context: ParallelContext = engine.context
        self.max_length = config.data.sequence_length
        self.batch_size = config.training.micro_batch_size
        self.multiple = self.context.tensor.size if self.context.tensor_parallel.cuts_sequence else 1
        self.has_fixed_shape = self.context.pipeline.size > 1  # stages agree on shapes once

    def score(self, batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        rows = [ValidationBatch(tokens, torch.ones(len(tokens))) for tokens in batches]
        with noting_scores(self.engine.model) as found:
            size = 1 if self.context.pipeline.size == 1 else _PIPELINE_ROWS * self.context.pipeline.size
            for first in range(0, len(rows), size):
                self.between()
                self.engine.evaluate(rows[first : first + size])
        return iter(found)


class TaskEvaluation(Callback):
    """Runs ``evaluation.tasks`` every ``evaluation.tasks_interval`` steps and after the run's last one."""

    def __init__(self, config: RunConfig) -> None:
        """Load the tasks, so that what is missing is known before anything is trained.

        Raises:
            ConfigError: lm-evaluation-harness, a task or its data is missing.
        """
        evaluation = config.evaluation
        try:
            self.tasks = load_tasks(
                task_names(evaluation.tasks), evaluation.tasks_data_dir, evaluation.tasks_include_path
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"evaluation.tasks is {evaluation.tasks}: {error}") from error
        self.tokenizer = load_tokenizer(config.data.tokenizer)

    def on_start(self, run: Run) -> None:
        names = ", ".join(self.tasks["tasks"])
        limit = run.config.evaluation.tasks_limit
        shown = "all rows" if limit is None else f"the first {limit} rows of each"
        run.say(f"evaluation tasks: {names} on {shown}, every {run.config.evaluation.tasks_interval} steps")
        if run.step and self._is_due(run) and run.lacks("tasks/"):
            with run.as_after_step():
                self._evaluate(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._is_due(run):
            self._evaluate(run)

    def _is_due(self, run: Run) -> bool:
        last = run.step == run.config.training.steps
        return is_due(run.step, run.config.evaluation.tasks_interval) or last

    def _evaluate(self, run: Run) -> None:
        # Imported late: a run without tasks needs no harness.
        from megatron_iiet.evaluation.harness import HarnessModel, own_text_codec, run_tasks

        codec = own_text_codec(self.tokenizer, run.config.data.text_follows)
        model = HarnessModel(EngineScorer(run.engine, run.config, run.stop_if_asked), codec)
        results = run_tasks(model, self.tasks, limit=run.config.evaluation.tasks_limit, errors=False)
        shown = []
        for name, metrics in results.metrics.items():
            run.record({f"tasks/{name}/{metric}": value for metric, value in metrics.items()})
            metric = _PAPER_METRIC.get(name, next(iter(metrics), ""))
            if metric in metrics:
                shown.append(f"{name} {metric} {metrics[metric]:.4f}")
        run.say(f"step {run.step:>6} | {' | '.join(shown)}")
