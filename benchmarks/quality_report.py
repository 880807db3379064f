"""What benchmarks/quality.py found: collected from its runs, as tables and as pictures."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from quality_trials import BRIEF, FULL, SHORT, SYSTEMS, TOKENS_A_STEP, Trial, ablations

from megatron_iiet.training.metrics import incomparable, read_log


@dataclass(frozen=True)
class Result:
    """A complete trial, or one that was given up."""

    trial: Trial
    curve: list[tuple[int, float, float]]
    """(step, FLOPs spent on training so far, validation loss in nats per token)."""
    residuals: list[float]
    """Relative residual of iterations 1..r at the end, mean over layers."""
    given_up: bool = False
    cpu: str = ""
    """Instructions of the machine that trained it. Where they round otherwise the same trial ends elsewhere,
    as far as with another seed: it counts as another run, and is compared with its own machine's."""

    @property
    def loss(self) -> float:
        """Validation loss at the end."""
        return self.curve[-1][2]

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.curve[-1][1]


def read_results(output: Path, earlier: Iterable[Result] = ()) -> list[Result]:
    """Every trial of a folder that is complete or given up, and those of ``earlier`` it does not have; the
    same trial from two kinds of CPU counts twice."""
    marks = [*output.glob("trials/*/.trained"), *output.glob("trials/*/.given-up")]
    if found := incomparable({mark.parent.name: read_log(mark.parent) for mark in marks}):
        raise ValueError(f"{output}: {found}; keep those of one rule")
    own = [
        _read_result(mark.parent, mark.name == ".given-up")
        for mark in sorted(marks)
        if mark.parent.name.split(".lr")[0] in SYSTEMS  # and not a student's, which is beside them
    ]
    return list({(result.trial.name, result.cpu): result for result in (*earlier, *own)}.values())


def cpu_kind() -> str:
    """What this machine's results are kept apart by; a folder's runs count as trained where it is read."""
    return torch.backends.cpu.get_cpu_capability()


def _read_result(folder: Path, given_up: bool) -> Result:
    system, rest = folder.name.split(".lr", 1)
    rate, rest = rest.rsplit(".seed", 1)
    seed, steps = rest.split(".")
    log = read_log(folder)
    spent = dict(zip(log, accumulate(values.get("flops", 0.0) for values in log.values()), strict=True))
    curve = [
        (s, spent[s], values["validation_loss"]) for s, values in log.items() if "validation_loss" in values
    ]
    residuals = defaultdict(list)
    for name, value in log[curve[-1][0]].items():
        if name.startswith("relative_residual/"):
            residuals[int(name.rsplit("_", 1)[1])].append(value)
    means = [statistics.mean(residuals[i]) for i in sorted(residuals) if i > 0]
    trial = Trial(system, float(rate), int(seed), int(steps))
    return Result(trial, curve, means, given_up, cpu_kind())


def sweep_losses(results: Iterable[Result], steps: int = SHORT) -> dict[tuple[str, float], float]:
    """Loss of every trial of a sweep, trials of so many steps and of the first seed, by system and learning
    rate: the mean over the kinds of CPU that completed it, infinite where none did."""
    swept = [result for result in results if result.trial.steps == steps]
    first = min((result.trial.seed for result in swept), default=0)
    losses = defaultdict(list)
    for result in swept:
        if result.trial.seed == first:
            place = result.trial.system, result.trial.lr
            losses[place] += [] if result.given_up else [result.loss]
    return {place: statistics.mean(values) if values else math.inf for place, values in losses.items()}


def best_rates(results: Iterable[Result], steps: int = SHORT) -> dict[str, float]:
    """The learning rate with the lowest loss, of every system swept."""
    losses = sweep_losses(results, steps)
    systems = {system for system, _ in losses}
    return {
        system: min((loss, rate) for (name, rate), loss in losses.items() if name == system)[1]
        for system in systems
    }


def save_results(results: list[Result], speeds: dict[str, float], path: Path) -> None:
    """Everything the report needs as JSON, to be kept beside it."""
    machine = f"{platform.processor() or platform.machine()}, {platform.system()}"
    rows = [asdict(result) for result in results]
    path.write_text(
        json.dumps({"date": str(date.today()), "machine": machine, "speeds": speeds, "trials": rows}) + "\n",
        encoding="utf-8",
    )


def load_results(path: Path) -> tuple[list[Result], dict[str, float]]:
    """What :func:`save_results` wrote; exits with a message where it is something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        results = [
            Result(**row | {"trial": Trial(**row["trial"]), "curve": [tuple(at) for at in row["curve"]]})
            for row in stored["trials"]
        ]
        return results, stored["speeds"]
    except OSError as error:
        sys.exit(f"error: cannot read the results {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"error: {path} is no results.json of `quality.py report` ({type(error).__name__}: {error}); "
            "name one, or leave --results out"
        )


def report(results: list[Result], speeds: dict[str, float]) -> str:
    """The tables as markdown."""
    rates = best_rates(results)
    names = {trial.name for trial in ablations(rates)} if "euler" in rates else ()
    ablated = [r for r in results if r.trial.name in names]
    most = Counter(r.cpu for r in ablated).most_common(1)  # single runs: compared on one kind of CPU only
    brief = [r for r in results if r.trial.steps == BRIEF]
    best = best_rates(brief, BRIEF)
    parts = [
        ("Learning rates", sweep_table([r for r in results if r.trial.steps == SHORT])),
        ("Systems", main_table([r for r in results if r.trial.steps == FULL], speeds)),
        ("Ablations", main_table([r for r in ablated if r.cpu == most[0][0]], speeds)),
        ("Optimizers: learning rates", sweep_table(brief, BRIEF)),
        ("Optimizers", main_table([r for r in brief if r.trial.lr == best[r.trial.system]], speeds)),
    ]
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in parts if table)


def sweep_table(results: list[Result], steps: int = SHORT) -> str:
    """Loss by system and learning rate, of trials of so many steps."""
    if not results:
        return ""
    rates = sorted({result.trial.lr for result in results})
    by_place = sweep_losses(results, steps)
    lines = [_row(["system", *(f"{rate:g}" for rate in rates)]), _row(["---"] * (len(rates) + 1))]
    for system in _in_order(results):
        losses = {rate: by_place[system, rate] for rate in rates if (system, rate) in by_place}
        lowest = min(losses.values())
        shown = [
            ""
            if rate not in losses
            else f"**{losses[rate]:.4f}**"
            if losses[rate] == lowest
            else f"{losses[rate]:.4f}"
            for rate in rates
        ]
        lines.append(_row([SYSTEMS[system].label, *shown]))
    return "\n".join(lines)


def main_table(results: list[Result], speeds: dict[str, float]) -> str:
    """Loss, difference to the best Transformer++ of the same seed and kind of CPU, FLOPs and time, by system
    and learning rate."""
    if not results:
        return ""
    lines = [
        _row(["system", "lr", "runs", "validation loss", "− Transformer++", "FLOPs", "time", "residuals"]),
        _row(["---"] * 8),
    ]
    worst_first = sorted((r for r in results if r.trial.system == "euler"), key=lambda r: -r.loss)
    base = {(result.trial.seed, result.cpu): result for result in worst_first}
    for (system, rate), rows in _rows(results).items():
        pairs = [(r, base.get((r.trial.seed, r.cpu))) for r in rows if not r.given_up]
        gaps = [r.loss - other.loss for r, other in pairs if other]
        flops = [r.flops / other.flops for r, other in pairs if other]
        slower = speeds["euler"] / speeds[system] if {"euler", system} <= speeds.keys() else None
        lines.append(
            _row(
                [
                    SYSTEMS[system].label,
                    f"{rate:g}",
                    str(len(rows)),
                    "given up" if rows[0].given_up else _spread([r.loss for r in rows]),
                    _spread(gaps, sign=True),
                    f"{statistics.mean(flops):.2f}x" if flops else "",
                    f"{slower:.2f}x" if slower else "",
                    " ".join(f"{value:.3f}" for value in rows[0].residuals),
                ]
            )
        )
    return "\n".join(lines)


def _rows(results: Iterable[Result]) -> dict[tuple[str, float], list[Result]]:
    """By system and learning rate, in order."""
    rows: dict[tuple[str, float], list[Result]] = defaultdict(list)
    for result in results:
        rows[result.trial.system, result.trial.lr].append(result)
    order = list(SYSTEMS)
    return dict(sorted(rows.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _in_order(results: Iterable[Result]) -> list[str]:
    present = {result.trial.system for result in results}
    return [system for system in SYSTEMS if system in present]


def _spread(values: list[float], sign: bool = False) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: list[Result], speeds: dict[str, float], path: Path, steps: int = FULL) -> None:
    """Validation loss against tokens, FLOPs and time of every system at its best learning rate, the mean of
    its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in results if r.trial.steps == steps and not r.given_up]
    figure, axes = plt.subplots(1, 3, figsize=(16, 6.5), sharey=True, layout="constrained")
    colors: Any = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    rows_of = _rows(chosen)
    best = {  # by system: the learning rate that ends lowest
        system: min(
            (statistics.mean(r.loss for r in rows), lr)
            for (name, lr), rows in rows_of.items()
            if name == system
        )[1]
        for system in _in_order(chosen)
    }
    for color, (system, lr) in zip(colors, best.items(), strict=False):
        rows = [r.curve[1:] for r in rows_of[system, lr]]  # the first is of the untrained model
        losses = [statistics.mean(at[2] for at in ats) for ats in zip(*rows, strict=True)]
        tokens = [at[0] * TOKENS_A_STEP / 1e6 for at in rows[0]]
        flops = [statistics.mean(at[1] for at in ats) / 1e15 for ats in zip(*rows, strict=True)]
        horizontal = [tokens, flops]
        if system in speeds:
            horizontal.append([count * 1e6 / speeds[system] / 60 for count in tokens])
        for axis, values in zip(axes, horizontal, strict=False):
            axis.plot(
                values, losses, "o-", color=color, markersize=3, linewidth=1, label=SYSTEMS[system].label
            )
    names = ("million tokens", "training PFLOPs", "minutes at the speed measured, one core")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
