"""Readings between the paper's equations and the authors' code, each against its equations written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_iiet.models import Transformer
from tests.models.conftest import Build, randomise_solvers
from tests.models.test_models_against_spec import (
    LAYERS,
    TOKENS,
    HuggingFaceLayers,
    converted,
    llama,
    released,
    rows_of,
)

__all__ = ["llama"]  # the fixture


def check(model: Transformer, wanted: Tensor, other: Tensor) -> None:
    """``wanted`` is what the model computes, and not what the reading next to it does."""
    assert (model(TOKENS) - wanted).abs().max() < 1e-4
    assert (wanted - other).abs().max() > 0.05


@pytest.mark.parametrize("iterations", [0, 1, 3])
@torch.no_grad()
def test_history_at_rms_1(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, iterations: int) -> None:
    def integrated(normalise: bool) -> Tensor:
        y, kept = hf.embedded, []
        for n, increment in enumerate(hf.increments):
            base = y + sum(alpha[n][j] * kept[j] for j in range(n))
            f = increment(y)
            for _ in range(iterations):
                f = increment(base + alpha[n][n] * f)
            y = base + alpha[n][n] * f
            kept.append(f / (f.square().mean(-1, keepdim=True) + 1e-12).sqrt() if normalise else f)
        return hf.logits(y)

    solver = {"kind": "iiet", "iterations": iterations}
    model = converted(llama[1], tmp_path / "x", solver)
    hf, alpha = HuggingFaceLayers(llama[0], TOKENS), rows_of(model)
    check(model, integrated(True), integrated(False))
    if iterations == 0:
        dlcl = converted(llama[1], tmp_path / "y", {"kind": "dlcl"})
        assert torch.equal(dlcl(TOKENS), model(TOKENS))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@torch.no_grad()
def test_shared_readout(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, iterations: int) -> None:
    solver = {"kind": "iiet", "variant": "released", "iterations": iterations, "readout": "shared"}
    model = converted(llama[1], tmp_path / "x", solver)
    assert not any("readout" in name for name, _ in model.named_parameters())
    w = torch.zeros(LAYERS + 1, LAYERS + 1)
    norms = []
    for n in range(LAYERS):
        solver_of = model.layers[str(n)].solver
        w[n + 1] = solver_of.coefficients
        pair = solver_of.predictor_norm, solver_of.corrector_norm
        norms.append([(norm.weight, norm.bias) for norm in pair])
    hf = HuggingFaceLayers(llama[0], TOKENS)
    counts = [iterations] * LAYERS
    other = w + 0.5 * torch.randn_like(w).tril()
    check(model, released(hf, w, w, norms, counts), released(hf, w, other, norms, counts))


@torch.no_grad()
def test_normalised_euler(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    model = converted(llama[1], tmp_path / "x", {"kind": "euler", "output_norm": "layer"})
    hf = HuggingFaceLayers(llama[0], TOKENS)
    y = hf.embedded
    for n, increment in enumerate(hf.increments):
        norm = model.layers[str(n)].solver.output_norm
        y = F.layer_norm(y + increment(y), y.shape[-1:], norm.weight, norm.bias, 1e-5)
    check(model, hf.logits(y), llama[0](TOKENS).logits)


@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "iiet", "iterations": 1},
        {"kind": "iiet", "variant": "released", "iterations": 1, "readout": "shared"},
        {"kind": "euler", "output_norm": "layer"},
    ],
    ids=["rms", "shared", "normed"],
)
def test_gradients(build: Build, tokens: Tensor, solver: dict[str, Any]) -> None:
    """The transposed history and recomputation give plain autograd's gradients, of every parameter."""

    def gradients(**training: Any) -> dict[str, Tensor]:
        model = build(training=training, **solver)
        model.config.ops.history_gradient = "transposed" if training else "per_edge"
        randomise_solvers(model)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert {name for name, _ in build(**solver).named_parameters() if "unused" not in name} == plain.keys()
    for mode in ("off", "layer", "evaluation"):
        found = gradients(recompute=mode)
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
