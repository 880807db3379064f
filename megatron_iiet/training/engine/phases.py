"""What a step consists of, by the names that a profile shows."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.profiler import record_function

STEP = "step"
PHASES = ("data", "forward", "backward", "exchange", "optimizer")
"""Of a step: having a batch, the model, its gradients, what stages of a pipeline hand on (and wait for); and
the rest of the gradients' sums over the ranks, clipping and the update."""


def label_of(name: str) -> str:
    """The name in a profile."""
    return f"iiet:{name}"


def phase(name: str) -> AbstractContextManager[object]:
    """Inside the block is this phase, or the whole step."""
    return record_function(label_of(name))
