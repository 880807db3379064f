"""Which iterations stay: what a user may ask for, and the plan that follows from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_iiet.config.iteration_plan import IterationPlan, Ranking
from megatron_iiet.distillation.influence import Ablation, Measurement
from megatron_iiet.models.iterations import above_threshold, auto_threshold, most_influential
from megatron_iiet.models.transformer import Transformer


@dataclass(frozen=True)
class PlanRequest:
    """Exactly one of the rules, and what iterations are ranked by.

    Raises:
        ValueError: none or several, a threshold that no influence can reach, or a rule without ranking.
    """

    threshold: float | Literal["auto"] | None = None
    """Influence that an iteration needs to stay; ``auto``: the smallest influence of an iterate 0."""
    budget: int | None = None
    """Iterations that stay, over all layers."""
    flops_ratio: float | None = None
    """Share of the FLOPs of all layers with full iterations that is not exceeded."""
    lower_bound: bool = False
    """No layer keeps any."""
    ranking: Ranking = "cosine"

    def __post_init__(self) -> None:
        if len(self._given) != 1:
            raise ValueError(
                f"{' and '.join(self._given) or 'no rule'} given for the plan; give exactly one of "
                "--threshold, --budget, --flops-ratio and --lower-bound"
            )
        if isinstance(self.threshold, float) and not 0 <= self.threshold <= 2:
            raise ValueError(
                f"--threshold is {self.threshold:g}, but influence lies between 0 and 2; give a number "
                "between them, or 'auto'"
            )
        if self.ranking == "loss" and (self.threshold is not None or self.lower_bound):
            raise ValueError(
                f"--rank-by is 'loss', by which {self._given[0]} does not choose; give --budget or "
                "--flops-ratio"
            )

    @property
    def _given(self) -> list[str]:
        values = {
            "--threshold": self.threshold is not None,
            "--budget": self.budget is not None,
            "--flops-ratio": self.flops_ratio is not None,
            "--lower-bound": self.lower_bound,
        }
        return [name for name, is_given in values.items() if is_given]

    @property
    def method(self) -> str:
        """The rule, as a plan names it."""
        return self._given[0].removeprefix("--")

    def check(self, layers: int, full: int) -> None:
        """Refuse what a model of ``layers`` layers with ``full`` iterations each cannot give.

        Raises:
            ValueError: a budget or ratio out of range.
        """
        if self.budget is not None and not 0 <= self.budget <= layers * full:
            raise ValueError(
                f"--budget is {self.budget}, but {layers} layers of {full} iterations have {layers * full} "
                f"to keep; give a number from 0 to {layers * full}"
            )
        ratio, least = self.flops_ratio, 1 / (full + 1)
        if ratio is not None and not (math.isfinite(ratio) and least * (1 - _ROUNDING) <= ratio <= 1):
            raise ValueError(
                f"--flops-ratio is {ratio:g}, but must lie between {least:.4g}, which is one evaluation a "
                f"layer of {full + 1}, and 1"
            )

    def plan(
        self,
        measured: Measurement,
        ablation: Ablation | None,
        meta_model: Transformer,
        length: int,
        measured_on: dict[str, str | int],
    ) -> IterationPlan:
        """The plan that the rule makes of what was measured.

        ``meta_model``: the whole model with full iterations, on the meta device; ``length``: of a sequence.
        """
        layers, full = len(measured.block_influence), max(i for _, i in measured.influence)
        ranked, threshold, share = measured.influence, None, None
        if self.ranking == "loss":
            assert ablation is not None
            ranked = ablation.increase
        if self.lower_bound:
            counts = [0] * layers
        elif self.budget is not None:
            counts = most_influential(ranked, layers, layers + self.budget)
            share = (layers + self.budget) / (layers * (full + 1))
        elif self.flops_ratio is not None:
            share = self.flops_ratio
            counts = within_flops(ranked, meta_model, length, share)
        else:
            assert self.threshold is not None
            threshold = auto_threshold(ranked) if self.threshold == "auto" else self.threshold
            counts = above_threshold(ranked, layers, threshold)
        return IterationPlan(
            tuple(counts),
            full,
            self.method,
            budget=share,
            influence=measured.influence,
            threshold=threshold,
            ranking=self.ranking,
            loss_increase=None if ablation is None else ablation.increase,
            measured_on=measured_on,
        )


_ROUNDING = 1e-9
"""Relative: 0.7 of 10 evaluations is 7, whatever fp64 says."""


def within_flops(
    ranked: Mapping[tuple[int, int], float], meta_model: Transformer, length: int, ratio: float
) -> list[int]:
    """The most iterations, the most influential first, whose layers take at most ``ratio`` of the FLOPs of
    those of ``meta_model``, which has its iterations again afterwards."""
    layers = len(meta_model.solvers)
    full = [solver.iterations for solver in meta_model.solvers.values()]
    most = ratio * (1 + _ROUNDING) * meta_model.layer_flops(length)
    best = [0] * layers
    for evaluations in range(layers, layers + sum(full) + 1):
        counts = most_influential(ranked, layers, evaluations)
        meta_model.set_iterations(counts)
        if meta_model.layer_flops(length) > most:
            break
        best = counts
    meta_model.set_iterations(full)
    return best


def rank_correlation(one: Mapping[tuple[int, int], float], other: Mapping[tuple[int, int], float]) -> float:
    """Spearman's rank correlation of two rankings of the same iterations, equal values sharing their mean
    rank; nan where one of them does not distinguish any."""
    keys = sorted(other)
    ranks = [_ranks(np.array([values[key] for key in keys])) for values in (one, other)]
    deviations = [rank - rank.mean() for rank in ranks]
    spread = float(np.sqrt(np.prod([(part**2).sum() for part in deviations])))
    return float((deviations[0] * deviations[1]).sum() / spread) if spread else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[group]
