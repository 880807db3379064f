"""What happens around a step: the contract with the loop, and the callbacks that every run may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_iiet.config import iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.schema import evaluations_in_budget
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.validation import RULES, ValidationBatch, ValidationBatches
from megatron_iiet.models.iterations import most_influential
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.run import Run
from megatron_iiet.training.utilisation import peak_flops, slowest, step_flops

_GROWTH = 2.0
"""A relative residual that has grown by this factor is told; one of a contracting iteration falls."""
_LARGE = 0.5
"""Between two diagnostics only one above this: small ones grow as a model learns to use its corrector."""
_NAMED = 4
"""Layers that are named."""


class Callback:
    """Called on every rank, in the run's order. Collectives are allowed; decide by step, not by time."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process (also after a resume)."""

    def on_step(self, run: Run, result: StepResult) -> None:
        """After optimizer step number ``run.step`` (1-based)."""

    def on_end(self, run: Run) -> None:
        """After the last step of this process."""


def is_due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps (0: never) is due after step ``step``."""
    return interval > 0 and step % interval == 0


class Checkpointing(Callback):
    """Saves every ``interval`` steps (0: never in between) and wherever this process stops."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.saved_step: int | None = None

    def on_start(self, run: Run) -> None:
        self.saved_step = run.step if run.step else None

    def on_step(self, run: Run, result: StepResult) -> None:
        if is_due(run.step, self.interval):
            self._save(run)

    def on_end(self, run: Run) -> None:
        if self.saved_step != run.step:
            self._save(run)

    def _save(self, run: Run) -> None:
        run.flush(to_disk=True)  # a checkpoint whose step is in no log would lose it for good
        run.save()
        self.saved_step = run.step


class Validation(Callback):
    """Validates before the first step, every ``interval`` steps and after the last one of the run."""

    def __init__(self, batches: ValidationBatches, interval: int) -> None:
        self.batches = batches
        self.interval = interval

    def on_start(self, run: Run) -> None:
        if run.step == 0:
            self._validate(run)
        elif self._is_due(run) and run.lacks("validation_loss"):
            with run.as_after_step():
                self._validate(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._is_due(run):
            self._validate(run)

    def _is_due(self, run: Run) -> bool:
        return is_due(run.step, self.interval) or run.step == run.config.training.steps

    def _validate(self, run: Run) -> None:
        run.stop_if_asked()
        batches: Any = self.batches
        if run.context.pipeline.size == 1:  # a schedule of stages is not left halfway
            batches = run.stoppable(batches)
        loss = run.engine.evaluate(batches)
        run.record({"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))})
        run.record({"validation_rule": RULES[self.batches.rule], "validation_samples": self.batches.samples})
        run.say(
            f"step {run.step:>6} | validation loss {loss:.4f} | perplexity {math.exp(min(loss, 700.0)):.2f}"
        )


class SolverDiagnostics(Callback):
    """Every ``interval`` steps: relative residual and influence per layer and iterate, on one batch."""

    def __init__(self, batch: Batch | ValidationBatch, interval: int) -> None:
        """``batch``: this rank's; what the main rank sees in its own is recorded."""
        self.batch = batch
        self.interval = interval
        self.before: dict[tuple[int, int], float] = {}

    def on_start(self, run: Run) -> None:
        if run.step and is_due(run.step, self.interval) and run.lacks("relative_residual/"):
            with run.as_after_step():
                self._observe(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if is_due(run.step, self.interval):
            self._observe(run)

    def _observe(self, run: Run) -> None:
        statistics = run.engine.observe(self.batch)
        diverging = describe_divergence(statistics.relative_residual, self.before)
        if diverging:
            run.say(f"warning: step {run.step} | the corrector diverges in {diverging}")
        self.before = statistics.relative_residual
        values = {
            f"relative_residual/layer_{n}_iterate_{i}": v
            for (n, i), v in statistics.relative_residual.items()
        }
        values |= {f"influence/layer_{n}_iterate_{i}": v for (n, i), v in statistics.influence.items()}
        if not values:
            return
        run.record(values)
        last = max(i for _, i in statistics.relative_residual)
        if last > 0:
            means = []
            for iterate in range(1, last + 1):
                of_iterate = [v for (_, i), v in statistics.relative_residual.items() if i == iterate]
                means.append(f"{sum(of_iterate) / len(of_iterate):.3f}")
            run.say(f"step {run.step:>6} | relative residual of iterations 1..{last}: {' '.join(means)}")


def describe_divergence(
    residuals: Mapping[tuple[int, int], float], before: Mapping[tuple[int, int], float]
) -> str:
    """The layers whose relative residual, by (layer, iterate), grows where it should fall: over the
    iterations, or, where it is large, since the diagnostics ``before``; "" if there is none."""
    found = []
    for layer in sorted({layer for layer, _ in residuals}):
        last = max(i for n, i in residuals if n == layer)
        first, end = residuals.get((layer, 1), math.nan), residuals[layer, last]
        earlier = before.get((layer, last), math.nan)
        if last and not math.isfinite(end):
            found.append(f"layer {layer} (relative residual {end} in iteration {last})")
        elif last > 1 and end > _GROWTH * first:
            found.append(
                f"layer {layer} (relative residual {first:.3g} → {end:.3g} over iterations 1..{last})"
            )
        elif last and end > _GROWTH * earlier and end > _LARGE:
            found.append(
                f"layer {layer} (relative residual {earlier:.3g} → {end:.3g} since the last diagnostics)"
            )
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


class MetricLogger(Callback):
    """Records every step; every ``logging.interval`` steps adds throughput and prints a line.

    Throughput is of training alone: time spent in validation, diagnostics and saving is left out.
    """

    def __init__(self) -> None:
        self.peak: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.steps, self.seconds, self.needed_flops, self.done_flops = 0, 0.0, 0, 0

    def on_start(self, run: Run) -> None:
        given = run.config.logging.peak_tflops
        if given:
            self.peak, reason = given * 1e12, "logging.peak_tflops"
        else:
            self.peak, reason = peak_flops(run.context.device, run.config.training.precision)
        if self.peak is None:
            run.say(f"utilisation is unknown: {reason}")
        else:
            run.say(f"utilisation is a share of {self.peak / 1e12:.3g} TFLOP/s a device ({reason})")

    def on_step(self, run: Run, result: StepResult) -> None:
        run.record_result(result)
        if not (result.is_read and result.verdict is Verdict.LEFT_OUT):
            self._count(run)
        if self.steps and (is_due(run.step, run.config.logging.interval) or run.step == run.last_step):
            self._report(run, result)
            self._reset()

    def _count(self, run: Run) -> None:
        """Add up what the step took."""
        config = run.config
        needed, done = step_flops(
            run.engine.meta_model, config.data.sequence_length, config.training.recompute
        )
        # Iterations may change from step to step, so FLOPs are added up.
        self.needed_flops += needed * config.training.global_batch_size
        self.done_flops += done * config.training.global_batch_size
        self.steps += 1
        self.seconds += run.step_seconds
        # Of this step alone, so that sums over a resumed run's log are right.
        run.record({"flops": needed * config.training.global_batch_size, "step_seconds": run.step_seconds})
        if run.engine.meta_teacher is not None:
            taught = run.engine.meta_teacher.forward_flops(config.data.sequence_length)
            self.done_flops += taught * config.training.global_batch_size
            run.record({"teacher_flops": taught * config.training.global_batch_size})

    def _report(self, run: Run, result: StepResult) -> None:
        config = run.config
        tokens = self.steps * config.training.global_batch_size * config.data.sequence_length
        run.record({"tokens_per_second": tokens / self.seconds})
        utilisation = "MFU unknown"
        if self.peak is not None:
            base = self.seconds * self.peak * run.context.world_size
            mfu, hfu = self.needed_flops / base, self.done_flops / base
            run.record({"mfu": mfu, "hfu": hfu})
            utilisation = f"MFU {mfu:.1%} HFU {hfu:.1%}"
        ranks = run.ranks()
        now, most = max(each.memory for each in ranks), max(each.peak_memory for each in ranks)
        run.record({"memory_bytes": now, "peak_memory_bytes": most})
        run.record(
            {f"coefficient_norm/{name}": norm for name, norm in run.engine.coefficient_norms().items()}
        )
        run.record({f"epoch/{name}": epochs for name, epochs in run.epochs().items()})
        rank, ratio = slowest(ranks)
        run.record({"slowest_rank": rank, "slowest_over_median": ratio})
        others = f" | slowest rank {rank} ({ranks[rank].host}) {ratio:.2f} x median" if len(ranks) > 1 else ""
        left = _clock((run.last_step - run.step) * self.seconds / self.steps)
        run.say(
            f"step {run.step:>6}/{config.training.steps} | loss {result.loss:.4f}{_parts(result)} | "
            f"lr {result.lr:.2e} | "
            f"grad norm {result.grad_norm:.3f} | {_scale(result)}{tokens / self.seconds:,.0f} tok/s | "
            f"{utilisation} | {now / 2**30:.2f} GiB, peak {most / 2**30:.2f}{others} | {left} left"
        )


def _parts(result: StepResult) -> str:
    """The terms of a loss that has several."""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in result.parts.items())
    return f" ({terms})" if terms else ""


def _scale(result: StepResult) -> str:
    """What an fp16 run multiplied its loss by."""
    return "" if math.isnan(result.loss_scale) else f"loss scale {result.loss_scale:,.10g} | "


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Guidance(Callback):
    """Every ``guidance.interval`` steps: measures the influence of all iterations with full iterations in
    every layer, and puts the plan within the budget in force from the next step on.

    All ranks know all measurements, so they make the same plan.
    """

    def __init__(self, batches: ValidationBatches) -> None:
        """``batches``: this rank's part of the held-out sequences."""
        self.batches = batches

    def on_start(self, run: Run) -> None:
        if run.step and self._is_due(run) and run.lacks("guidance/"):
            self._make_plan(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._is_due(run):
            self._make_plan(run)

    def _is_due(self, run: Run) -> bool:
        guidance, steps = run.config.guidance, run.config.training.steps
        # After the last step a plan would describe a model that was never trained with it.
        return is_due(run.step, guidance.interval) and round(guidance.start * steps) <= run.step < steps

    def _make_plan(self, run: Run) -> None:
        config, guidance = run.config, run.config.guidance
        layers, full = config.model.num_layers, iterations_per_layer(config)[0]
        with run.iterating([full] * layers):
            influence = self._measure(run)
        ranked = influence
        if run.plan is not None and run.plan.influence:
            influence = running_mean(run.plan.influence, influence, guidance.decay)
            ranked = favouring(influence, run.plan.iterations, guidance.inertia)
        counts = most_influential(ranked, layers, evaluations_in_budget(config))
        run.plan = IterationPlan(
            tuple(counts), full, "budget", step=run.step, budget=guidance.budget, influence=influence
        )
        run.record({f"guidance/layer_{n}": r for n, r in enumerate(counts)})
        run.record({"guidance/evaluations": run.plan.evaluations})
        run.record({f"guidance/influence_layer_{n}_iterate_{i}": v for (n, i), v in influence.items()})
        run.enter_stage()

    def _measure(self, run: Run) -> dict[tuple[int, int], float]:
        """Influence by (layer, iterate), the mean over the sequences of all ranks."""
        sums: dict[tuple[int, int], float] = {}
        rows = 0.0
        for batch in run.stoppable(self.batches):
            weight = batch.weights.sum().item()
            for key, value in run.engine.observe(batch).influence.items():
                sums[key] = sums.get(key, 0.0) + weight * value
            rows += weight
        # Ranks of one pipeline or tensor-parallel group count several times, all replicas equally often.
        parts = run.context.world.gather_objects((sums, rows))
        total = sum(rows for _, rows in parts)
        return {key: sum(part[key] for part, _ in parts) / total for key in sorted(sums)}


def running_mean(
    before: Mapping[tuple[int, int], float], now: Mapping[tuple[int, int], float], decay: float
) -> dict[tuple[int, int], float]:
    """``decay · before + (1 − decay) · now``: one noisy measurement does not turn a plan over."""
    return {key: decay * before[key] + (1 - decay) * value for key, value in now.items()}


def favouring(
    influence: Mapping[tuple[int, int], float], iterations: Sequence[int], inertia: float
) -> dict[tuple[int, int], float]:
    """``influence``, that of the iterations in force (iterates 1 to r_n of layer n) 1 + ``inertia`` times as
    large.

    A layer that has an iteration learns to make it small, and its neighbour's looks larger.
    """
    return {
        (layer, i): value * (1 + inertia if 1 <= i <= iterations[layer] else 1)
        for (layer, i), value in influence.items()
    }
