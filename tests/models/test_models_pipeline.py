"""Stages chained by hand are the whole model; no more history crosses a boundary than later layers read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_iiet.models import Transformer
from megatron_iiet.models.pipeline import PipelineStage, entries_crossing
from tests.models.conftest import Build, randomise_solvers

CUTS = [[range(1), range(1, 4)], [range(2), range(2, 3), range(3, 4)], [range(n, n + 1) for n in range(4)]]


def through_stages(
    whole: Transformer, cut: list[range], tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the whole model, stage by stage."""
    state = whole.state_dict()
    x = tokens
    for part in cut:
        model = Transformer(whole.config, layers=part)
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        stage = PipelineStage(model, tokens.shape[1])
        stage.resize(whole)
        if not model.is_first:
            assert len(x) == 1 + len(stage.entries_received)
        x = stage(x, positions)
        if not model.is_last:
            assert len(x) == 1 + len(stage.entries_handed_on)
    return model.project(x)[..., : whole.config.model.vocab_size]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["windows", "documents"])
@pytest.mark.parametrize("cut", CUTS, ids=len)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "euler"},
        {"kind": "dlcl"},
        {"kind": "iiet", "iterations": [2, 0, 1, 1], "predictor": "euler"},
        {"kind": "iiet", "variant": "released", "iterations": 1},
        {"kind": "rk4"},
        {"kind": "pcformer"},
    ],
)
def test_stages_are_the_whole(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], tied: bool, cut: list[range], documents: bool
) -> None:
    positions = (torch.arange(16) % torch.tensor([[4], [7]])) if documents else None
    whole = build(**solver, model={"tie_embeddings": tied})
    randomise_solvers(whole)
    wanted = whole(tokens, positions_BT=positions)
    assert torch.equal(through_stages(whole, cut, tokens, positions), wanted)


def test_stages_behind_what_nobody_reads_any_more(build: Build, tokens: torch.Tensor) -> None:
    """Entries keep their numbers though the first ones are not handed on."""
    whole = build(kind="pcformer", model={"num_layers": 7})
    randomise_solvers(whole)
    for cut in ([range(5), range(5, 7)], [range(4), range(4, 6), range(6, 7)]):
        assert torch.equal(through_stages(whole, cut, tokens), whole(tokens))


@pytest.mark.slow
def test_what_crosses(build: Build) -> None:
    def crossing(**solver: Any) -> list[int]:
        return [len(entries_crossing(build(**solver), n)) for n in (1, 2, 3)]

    assert crossing(kind="euler") == [0, 0, 0]
    assert crossing(kind="dlcl") == [1, 2, 3]
    assert crossing(kind="iiet", iterations=2) == [1, 2, 3]
    assert crossing(kind="iiet", variant="released", iterations=2) == [2, 3, 4]
    # From layer 2 on nobody iterates, and the predictor 'euler' merges nothing: the stream alone.
    assert crossing(kind="iiet", predictor="euler", iterations=[1, 1, 0, 0]) == [1, 0, 0]
    two_stage = build(kind="iiet", iterations=2)
    two_stage.set_iterations([0] * 4, merging=False)
    assert [len(entries_crossing(two_stage, n)) for n in (1, 2, 3)] == [0, 0, 0]
    assert crossing(kind="rk4") == crossing(kind="weight-sharing") == [0, 0, 0]
    deep = build(kind="pcformer", model={"num_layers": 7})
    numbers = [entries_crossing(deep, n) for n in range(1, 7)]
    assert numbers == [range(1), range(2), range(3), range(1, 4), range(2, 5), range(3, 6)]
