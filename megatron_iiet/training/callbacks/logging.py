"""The console line of a step, throughput and utilisation."""

from __future__ import annotations

from megatron_iiet.training.callbacks.base import Callback, is_due
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run
from megatron_iiet.training.utilisation import peak_flops, step_flops


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
        config = run.config
        needed, done = step_flops(
            run.engine.meta_model, config.data.sequence_length, config.training.recompute
        )
        # Iterations may change from step to step, so FLOPs are added up.
        self.needed_flops += needed * config.training.global_batch_size
        self.done_flops += done * config.training.global_batch_size
        self.steps += 1
        self.seconds += run.step_seconds
        run.record({"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr})
        # Of this step alone, so that sums over a resumed run's log are right.
        run.record({"flops": needed * config.training.global_batch_size, "step_seconds": run.step_seconds})
        if run.engine.meta_teacher is not None:
            taught = run.engine.meta_teacher.forward_flops(config.data.sequence_length)
            self.done_flops += taught * config.training.global_batch_size
            run.record({"teacher_flops": taught * config.training.global_batch_size})
            run.record({f"distillation/{name}": value for name, value in result.parts.items()})
        if is_due(run.step, config.logging.interval) or run.step == run.last_step:
            self._report(run, result)
            self._reset()

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
        now, most = (max(each) for each in zip(*run.memory_of_ranks(), strict=True))
        run.record({"memory_bytes": now, "peak_memory_bytes": most})
        run.record(
            {f"coefficient_norm/{name}": norm for name, norm in run.engine.coefficient_norms().items()}
        )
        run.record({f"epoch/{name}": epochs for name, epochs in run.epochs().items()})
        left = _clock((run.last_step - run.step) * self.seconds / self.steps)
        run.say(
            f"step {run.step:>6}/{config.training.steps} | loss {result.loss:.4f}{_parts(result)} | "
            f"lr {result.lr:.2e} | "
            f"grad norm {result.grad_norm:.3f} | {tokens / self.seconds:,.0f} tok/s | "
            f"{utilisation} | {now / 2**30:.2f} GiB, peak {most / 2**30:.2f} | {left} left"
        )


def _parts(result: StepResult) -> str:
    """The terms of a loss that has several."""
    return f" ({', '.join(f'{name} {value:.4f}' for name, value in result.parts.items())})" * bool(
        result.parts
    )


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
