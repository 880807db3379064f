"""What every solver is, and what it may see of the layer it integrates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_iiet.config.solvers import Iterating, SolverConfig
from megatron_iiet.models.history import History

LAYER_NORM_EPS = 1e-5
"""Epsilon of the LayerNorms that solvers have, as in the IIET authors' code."""

IterateObserver = Callable[[int, Tensor, Tensor], None]
"""Called with (i, y^{i-1}, y^i) for every iterate; i = 0 compares y_n with the predictor's y^0."""


class IncrementFn(Protocol):
    """F as a solver sees it."""

    def input_of(
        self, residual_BTD: Tensor, increments: Sequence[Tensor], coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``(y, normed)`` for an evaluation: the sum of the residual and the increments, times coefficients
        if there are any, and what F's first norm makes of it where that saves a pass over memory."""

    def __call__(self, y_BTD: Tensor, normed_BTD: Tensor | None, evaluation: int) -> Tensor:
        """F(y), [B, T, D]; ``normed_BTD``: ``input_norm(y)`` if known; ``evaluation``: 0 the predictor."""


@dataclass(frozen=True)
class Place:
    """Where a solver works."""

    layer: int
    """Of the layer it integrates, from 0."""
    num_layers: int
    width: int
    """Of the residual stream."""
    backend: str
    """Of the merges."""


Declared = TypeVar("Declared", bound=SolverConfig)


class Solver(nn.Module, Generic[Declared]):
    """Integrates one layer as its declaration says. ``iterations`` may be changed between forward passes
    (two-stage training)."""

    merges_embedding = False
    """Whether entry 0 of the history is the embedding output."""
    keeps = True
    """Whether later layers read what this layer keeps, while merging."""
    first_merged = 0
    """The entry of the history that the first coefficient of a row multiplies."""
    merged_entries = 0
    """Number of entries that this layer merges, while merging."""

    def __init__(self, declared: Declared, place: Place) -> None:
        super().__init__()
        self.declared = declared
        self.place = place
        self.iterations = declared.iterations_per_layer(place.num_layers)[place.layer]
        self.merging = True
        self.observer: IterateObserver | None = None

    @property
    def iterative(self) -> bool:
        """Whether there is a corrector to iterate."""
        return isinstance(self.declared, Iterating)

    @property
    def keeps_increment(self) -> bool:
        """Whether later layers read what this layer kept."""
        return self.merging and self.keeps

    @property
    def history_reads(self) -> range:
        """Entries of the history that this layer merges."""
        return range(self.first_merged, self.first_merged + (self.merged_entries if self.merging else 0))

    @property
    def history_rows(self) -> list[nn.Parameter]:
        """The coefficients that multiply the history, while merging: each parameter's first values, one for
        each of :attr:`history_reads`."""
        return self.coefficient_rows if self.history_reads else []

    @property
    def coefficient_rows(self) -> list[nn.Parameter]:
        """:attr:`history_rows` while there is something to merge."""
        return []

    @property
    def evaluations(self) -> int:
        """Evaluations of F a step."""
        return self.declared.evaluations(self.iterations) if self.merging else 1

    def forward(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        """One step: ``(y_{n+1}, the increment to keep)``, both [B, T, D]."""
        if not self.merging:
            return euler_step(y_BTD, increment_fn)
        return self.step(y_BTD, increment_fn, history)

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        """The solver's own step."""
        raise NotImplementedError

    def observe(self, iterate: int, before: Tensor, after: Tensor) -> None:
        """Show an iterate to the observer, if there is one."""
        if self.observer is not None:
            self.observer(iterate, before, after)


def euler_step(y_BTD: Tensor, increment_fn: IncrementFn) -> tuple[Tensor, Tensor]:
    """Explicit Euler, the plain residual connection: y + F(y)."""
    f_BTD = increment_fn(y_BTD, None, 0)
    return y_BTD + f_BTD, f_BTD


def fp32_parameter(values: Tensor) -> nn.Parameter:
    """A parameter that stays fp32 when the rest of the model trains in bf16.

    Merge coefficients live near 1, where bf16 values are 0.0078 apart: too coarse for what they learn.
    """
    parameter = nn.Parameter(values.float())
    parameter.keep_fp32 = True  # type: ignore[attr-defined]
    return parameter


def initial_row(length: int, init: str) -> Tensor:
    """Initial merge coefficients, [length]: the last entry is the layer's own increment.

    ``identity``: own 1, others 0 (training starts from Transformer++). ``average``: all 1/length
    (DLCL, Wang et al. 2019).
    """
    if init == "average":
        return torch.full((length,), 1.0 / length)
    row = torch.zeros(length)
    row[-1] = 1.0
    return row
