"""Influence as a table, a heat map and bars, as in figures 4 to 6 of the IIET paper (arXiv 2509.22463)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.distillation.influence import Measurement, Values

HEAT_MAP, BLOCKS, KEPT = "iteration_influence.png", "block_influence.png", "iterations.png"
_DPI = 120
_DARK = 0.5
"""Share of the colour scale below which numbers are written in white."""


def as_rows(values: Values) -> list[list[float]]:
    """Values by (layer, iterate) as a list a layer, from the least iterate there is on."""
    layers = sorted({n for n, _ in values})
    return [[value for (n, _), value in sorted(values.items()) if n == layer] for layer in layers]


def table(measured: Measurement, plan: IterationPlan) -> str:
    """A line for each layer: influence of every iterate, of the whole layer, and the iterations kept."""
    heads = ["layer", *(f"iterate {i}" for i in range(plan.full + 1)), "block", "kept"]
    lines = ["  ".join(f"{head:>9}" for head in heads)]
    for layer, row in enumerate(as_rows(measured.influence)):
        numbers = [*row, measured.block_influence[layer]]
        cells = [str(layer), *(f"{number:.3g}" for number in numbers), str(plan.iterations[layer])]
        lines.append("  ".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def draw(measured: Measurement, plan: IterationPlan, folder: Path) -> list[Path]:
    """Draw the three pictures into a folder; their files."""
    _draw_heat_map(as_rows(measured.influence), plan, folder / HEAT_MAP)
    _draw_bars(measured.block_influence, "block influence\n$1 - \\cos(y_n, y_{n+1})$", folder / BLOCKS)
    title = f"{plan.evaluations} of {plan.full_evaluations} evaluations, by {plan.method}"
    _draw_bars(plan.iterations, "iterations kept", folder / KEPT, most=plan.full, title=title)
    return [folder / name for name in (HEAT_MAP, BLOCKS, KEPT)]


def _draw_heat_map(rows: list[list[float]], plan: IterationPlan, path: Path) -> None:
    """On a logarithmic scale: the predictor changes the stream ten times as much as an iteration."""
    values = np.array(rows)
    layers, iterates = values.shape
    low = float(values[values > 0].min(initial=1.0))
    scale = LogNorm(low, max(float(values.max()), 1.001 * low), clip=True)
    figure = Figure(figsize=(2.5 + 0.9 * iterates, 1.5 + 0.3 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.maximum(values, low), aspect="auto", cmap="viridis", norm=scale)
    for layer, iterate in np.ndindex(layers, iterates):
        color = "white" if scale(values[layer, iterate]) < _DARK else "black"
        axes.text(
            iterate, layer, f"{values[layer, iterate]:.2g}", ha="center", va="center", color=color, fontsize=7
        )
    axes.set_xticks(range(iterates), ["predictor", *(str(i) for i in range(1, iterates))])
    axes.set_yticks(range(layers))
    axes.set_xlabel("iterate i")
    axes.set_ylabel("layer n")
    tau = "" if plan.threshold is None else f", threshold {plan.threshold:.4g}"
    axes.set_title(f"iteration influence{tau}", fontsize=10)
    figure.colorbar(image, ax=axes, label=r"$1 - \cos(y^{i-1}, y^i)$")
    figure.savefig(path, dpi=_DPI)


def _draw_bars(
    heights: Sequence[float], label: str, path: Path, *, most: int | None = None, title: str = ""
) -> None:
    """A bar for each layer; ``most``: where a dashed line shows what there could be."""
    figure = Figure(figsize=(max(4.0, 1.5 + 0.3 * len(heights)), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(heights)), heights, color="tab:blue")
    if most is not None:
        axes.axhline(most, color="tab:gray", linestyle="--", linewidth=1)
        axes.set_ylim(0, most + 0.5)
        axes.set_yticks(range(most + 1))
    axes.set_xticks(range(len(heights)))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("layer n")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=_DPI)
