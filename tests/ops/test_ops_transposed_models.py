"""Whole models with gradients entry by entry against edge by edge, recomputed, and cut into stages."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer, history
from megatron_iiet.models.pipeline import PipelineStage
from megatron_iiet.ops import TransposedMerge
from tests.models.conftest import SHAPE, randomise_solvers
from tests.ops.inputs import needs_extension
from tests.ops.networks import (
    expect,
    same,
)

torch.set_num_threads(1)


# ---------------------------------------------------------------------------- whole models

SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl"},
    "dlcl-average": {"kind": "dlcl", "coefficient_init": "average"},
    **{
        f"{predictor}-{iterations}": {"kind": "iiet", "predictor": predictor, "iterations": iterations}
        for predictor in ("merged", "euler")
        for iterations in (0, 1, 3, [2, 0, 1, 0], [0, 0, 2, 0])
    },
    **{
        f"released-{iterations}": {"kind": "iiet", "variant": "released", "iterations": iterations}
        for iterations in (0, 2, [2, 0, 1, 0], [0, 1, 0, 2])
    },
    "pcformer": {"kind": "pcformer"},
}
FEW = ["dlcl", "merged-[2, 0, 1, 0]", "euler-[0, 0, 2, 0]", "released-[0, 1, 0, 2]", "pcformer"]
some_solvers = pytest.mark.parametrize(
    "solver",
    [
        pytest.param(keys, id=name, marks=[] if name in FEW else pytest.mark.long)
        for name, keys in SOLVERS.items()
    ],
)


def model_of(
    solver: dict[str, Any],
    *,
    backend: str = "reference",
    gradient: str = "per_edge",
    recompute: str = "off",
    layers: range | None = None,
) -> Transformer:
    config = config_from_dict(
        {
            "model": {**SHAPE, "num_layers": 6 if solver["kind"] == "pcformer" else 4},  # its window moves
            "solver": solver,
            "training": {"recompute": recompute},
            "ops": {"history_gradient": gradient},
            "data": {"sequence_length": 16},
        }
    )
    model = Transformer(config, backend=backend, layers=layers)
    model.initialise(0)
    randomise_solvers(model)
    return model


def loss_and_gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor | None]:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@needs_extension
@some_solvers
def test_whole_models(solver: dict[str, Any]) -> None:
    """Backend, kind of gradient and recomputation: three choices that no number depends on."""
    wanted = loss_and_gradients(model_of(solver), TOKENS)
    for backend in ("reference", "cpu"):
        for gradient in ("per_edge", "transposed"):
            plain = loss_and_gradients(model_of(solver, backend=backend, gradient=gradient), TOKENS)
            expect(plain, wanted)
            for recompute in ("layer", "evaluation"):
                again = model_of(solver, backend=backend, gradient=gradient, recompute=recompute)
                same(loss_and_gradients(again, TOKENS), plain)


@needs_extension
@some_solvers
def test_whole_models_recompute_exactly_in_half_precision(solver: dict[str, Any]) -> None:
    results = []
    for recompute in ("off", "layer", "evaluation"):
        model = model_of(solver, backend="cpu", gradient="transposed", recompute=recompute)
        for parameter in model.parameters():
            if not getattr(parameter, "keep_fp32", False):
                parameter.data = parameter.data.bfloat16()
        results.append(loss_and_gradients(model, TOKENS))
    same(results[1], results[0])
    same(results[2], results[0])


@needs_extension
@some_solvers
def test_whole_models_in_stages(solver: dict[str, Any]) -> None:
    """Three pipeline stages chained by hand, each with its own history, against the whole."""
    whole = model_of(solver, backend="cpu", gradient="transposed")
    wanted = loss_and_gradients(whole, TOKENS)
    layers = whole.config.model.num_layers
    cut = [range(1), range(1, layers - 1), range(layers - 1, layers)]
    x: Tensor = TOKENS[:, :-1]
    found: dict[str, Tensor | None] = {}
    chain: list[tuple[Tensor, Tensor]] = []
    models = []
    for part in cut:
        model = model_of(solver, backend="cpu", gradient="transposed", layers=part)
        state = whole.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        stage = PipelineStage(model, 16)
        stage.resize(whole)
        models.append(model)
        out = stage(x)
        x = out.detach().requires_grad_()
        chain.append((out, x))
    loss = models[-1].loss(chain[-1][0], TOKENS[:, 1:])
    loss.backward()
    for out, received in reversed(chain[:-1]):
        out.backward(received.grad)
    found["loss"] = loss.detach()
    for model in models:
        for name, p in model.named_parameters():
            before = found.get(name)  # a tied embedding is in the first stage and in the last
            found[name] = p.grad if before is None or p.grad is None else before + p.grad
    expect(found, wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("recompute", ["off", "layer", "evaluation"])
@some_solvers
def test_whole_models_keep_nothing(
    solver: dict[str, Any], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[weakref.ref[TransposedMerge]] = []

    class Watched(TransposedMerge):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            watched.append(weakref.ref(self))

    monkeypatch.setattr(history, "TransposedMerge", Watched)
    model = model_of(solver, gradient="transposed", recompute=recompute)
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert len(watched) == any(solver.history_rows for solver in model.solvers.values())
    assert all(w() is None for w in watched)
