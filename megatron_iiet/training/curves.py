"""Loss curves of one or several runs as a picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_iiet.durable import check_output, make_parent
from megatron_iiet.training.metrics import incomparable, read_log, validation_rules

SMOOTHING_STEPS = 20
"""Width of the running mean drawn over the training loss."""


def plot_losses(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Draw training loss (thin: every step, thick: running mean) and validation loss of labelled run folders.

    Raises:
        ValueError: a run has no log, or the picture has no place.
    """
    check_output(Path(output))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    logs = {label: read_log(folder) for label, folder in runs.items()}
    if warning := incomparable(logs):
        print(f"warning: {warning}", file=sys.stderr)
    for color, (label, log) in zip(plt.cm.tab10.colors, logs.items(), strict=False):  # type: ignore[attr-defined]
        rule = f" ({' and '.join(validation_rules(log))})" if warning else ""
        steps = np.array([s for s, values in log.items() if "loss" in values])
        losses = np.array([log[s]["loss"] for s in steps])
        axes.plot(steps, losses, color=color, linewidth=0.4, alpha=0.4)
        if len(steps) > SMOOTHING_STEPS:
            smooth = np.convolve(losses, np.full(SMOOTHING_STEPS, 1 / SMOOTHING_STEPS), mode="valid")
            axes.plot(
                steps[SMOOTHING_STEPS - 1 :], smooth, color=color, linewidth=1.5, label=f"{label}, training"
            )
        validation = {
            s: values["validation_loss"] for s, values in log.items() if "validation_loss" in values
        }
        axes.plot(
            list(validation), list(validation.values()), "o--", color=color, markersize=4, linewidth=0.8,
            label=f"{label}, validation{rule}",
        )  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    make_parent(Path(output))
    figure.savefig(output, dpi=120)
    plt.close(figure)
