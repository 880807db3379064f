"""Which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class StagePlan:
    """A cut of the layers into consecutive, not necessarily equal stages."""

    stages: tuple[range, ...]
    """Layer numbers of every stage."""
    costs: tuple[float, ...]
    """Share of the whole model's work that every stage does; they sum to 1."""

    def bubble(self, micro_batches: int) -> float:
        """Share of the devices' time spent waiting, under 1F1B with ``micro_batches`` a step.

        A step takes (m + p - 1) turns of the slowest stage; useful are m turns of the average one.
        """
        p = len(self.stages)
        return 1.0 - micro_batches / ((micro_batches + p - 1) * p * max(self.costs))


def plan_stages(layers: Sequence[float], head: float, stages: int) -> StagePlan:
    """Cut layers of the given costs into ``stages`` so that the slowest stage is as fast as possible.

    The head's cost belongs to the last stage; every stage holds at least one layer. Among the cuts with the
    same slowest stage, the one with the least sum of squares is taken.

    Raises:
        ValueError: more stages than layers.
    """
    n = len(layers)
    if not 1 <= stages <= n:
        raise ValueError(f"{n} layers cannot be cut into {stages} pipeline stages; use 1 to {n}")
    total = sum(layers) + head

    def cost(first: int, stop: int) -> float:
        return (sum(layers[first:stop]) + (head if stop == n else 0.0)) / total

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(slowest stage, sum of squares, ends of the stages) for layers from ``first`` on."""
        if left == 1:
            c = cost(first, n)
            return c, c * c, (n,)
        options = []
        for stop in range(first + 1, n - left + 2):
            c = cost(first, stop)
            slowest, squares, ends = best(stop, left - 1)
            options.append((max(c, slowest), c * c + squares, (stop, *ends)))
        return min(options)

    ends = best(0, stages)[2]
    starts = (0, *ends[:-1])
    plan = tuple(range(a, b) for a, b in zip(starts, ends, strict=True))
    costs = tuple(cost(part.start, part.stop) for part in plan)
    assert [layer for part in plan for layer in part] == list(range(n))
    assert abs(sum(costs) - 1.0) < 1e-9
    return StagePlan(plan, costs)
