"""The stage plan: best possible, complete, and what it says of the bubble."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.parallel.stages import plan_stages


def slowest(layers: list[float], head: float, ends: tuple[int, ...]) -> float:
    bounds = (0, *ends, len(layers))
    costs = [sum(layers[a:b]) for a, b in itertools.pairwise(bounds)]
    costs[-1] += head
    return max(costs)


@settings(max_examples=200)
@given(
    layers=st.lists(st.integers(1, 9).map(float), min_size=1, max_size=8),
    head=st.integers(0, 20).map(float),
    data=st.data(),
)
def test_no_other_cut_has_a_faster_slowest_stage(
    layers: list[float], head: float, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    plan = plan_stages(layers, head, stages)
    assert [layer for part in plan.stages for layer in part] == list(range(len(layers)))
    assert len(plan.stages) == stages
    assert all(len(part) for part in plan.stages)
    assert sum(plan.costs) == pytest.approx(1.0)
    cuts = itertools.combinations(range(1, len(layers)), stages - 1)
    best = min(slowest(layers, head, ends) for ends in cuts)
    total = sum(layers) + head
    assert max(plan.costs) == pytest.approx(best / total)


def test_evaluations_of_f_weigh() -> None:
    """Layers that iterate get stages of their own; a heavy head takes layers away from the last stage."""
    assert plan_stages([4.0, 1.0, 1.0, 1.0, 1.0], 0.0, 2).stages == (range(1), range(1, 5))
    assert plan_stages([1.0] * 8, 4.0, 2).stages == (range(6), range(6, 8))


def test_stages_beside_the_slowest_are_even() -> None:
    """The head alone makes the last stage the slowest, however the layers before it are cut."""
    assert plan_stages([1.0] * 5, 10.0, 3).stages == (range(2), range(2, 4), range(4, 5))
    plan = plan_stages([1.0, 1.0, 1.0, 4.0, 1.0, 1.0], 0.0, 4)  # 1, 2, 4, 2 and not 3, 4, 1, 1
    assert plan.stages == (range(1), range(1, 3), range(3, 4), range(4, 6))


def test_bubble() -> None:
    plan = plan_stages([1.0] * 8, 0.0, 4)
    assert plan.bubble(1) == pytest.approx(3 / 4)
    assert plan.bubble(13) == pytest.approx(3 / 16)
    uneven = plan_stages([1.0] * 3, 0.0, 2)
    assert uneven.bubble(10**9) == pytest.approx(1 / 4)  # one stage waits a third of its time


def test_refuses_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 pipeline stages; use 1 to 3"):
        plan_stages([1.0] * 3, 0.0, 4)
