"""Activation recomputation changes memory and time, never a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_iiet.models import Transformer
from tests.models.conftest import Build, randomise_solvers
from tests.ops.inputs import needs_extension

SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl"},
    "merged": {"kind": "iiet", "iterations": 2},
    "predictor-euler": {"kind": "iiet", "iterations": 2, "predictor": "euler"},
    "released": {"kind": "iiet", "variant": "released", "iterations": 2},
    "released-r0": {"kind": "iiet", "variant": "released", "iterations": 0},
    "rk2-gated": {"kind": "rk2", "stage_coefficients": "gated"},
    "rk4": {"kind": "rk4"},
    "weight-sharing": {"kind": "weight-sharing", "repeats": 2},
    "first-keys": {"kind": "iiet", "iterations": 2, "key_values": "first"},
    "pcformer": {"kind": "pcformer", "model": {"num_layers": 6}},
}


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """As mixed precision has it: everything in ``dtype`` but what is marked to stay fp32."""
    for parameter in model.parameters():
        if not getattr(parameter, "keep_fp32", False):
            parameter.data = parameter.data.to(dtype)
    return model


def loss_and_gradients(
    model: Transformer, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> dict[str, torch.Tensor | None]:
    loss = model(tokens[:, :-1], tokens[:, 1:], positions)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["windows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_recomputation_is_exact(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], dtype: torch.dtype, documents: bool
) -> None:
    positions = (torch.arange(15) % torch.tensor([[4], [7]])) if documents else None
    results = {}
    for recompute in ("off", "layer", "evaluation"):
        model = in_dtype(build(**solver, training={"recompute": recompute}), dtype)
        randomise_solvers(model)
        results[recompute] = loss_and_gradients(model, tokens, positions)
    plain = results.pop("off")
    assert plain["loss"] is not None
    assert plain["loss"].isfinite()
    for recompute, values in results.items():
        for name, wanted in plain.items():
            found = values[name]
            same = found is wanted is None or (
                found is not None and wanted is not None and torch.equal(found, wanted)
            )
            assert same, f"{recompute}: {name}"


@pytest.mark.parametrize(("recompute", "factor"), [("off", 1), ("layer", 2), ("evaluation", 2)])
def test_it_does_recompute(build: Build, tokens: torch.Tensor, recompute: str, factor: int) -> None:
    model = build(kind="iiet", iterations=[2, 0, 1, 3], training={"recompute": recompute})
    starts = 0

    def count(*_: Any) -> None:
        nonlocal starts
        starts += 1

    for n in range(4):
        # Before the layer: non-reentrant recomputation stops inside it once it has what it needs.
        model.get_submodule(f"layers.{n}.increment").register_forward_pre_hook(count)
    loss_and_gradients(model, tokens)
    assert starts == factor * 10
    with torch.no_grad():
        model(tokens)
    assert starts == factor * 10 + 10


@pytest.mark.parametrize("recompute", ["layer", "evaluation"])
def test_stages_may_change_between_forward_and_backward_passes(
    build: Build, tokens: torch.Tensor, recompute: str
) -> None:
    solver = {"kind": "iiet", "iterations": 2}
    model = build(**solver, training={"recompute": recompute})
    model.set_iterations([0] * 4, merging=False)
    loss_and_gradients(model, tokens)
    model.zero_grad()
    model.set_iterations([2] * 4)
    plain = loss_and_gradients(build(**solver), tokens)
    for name, value in loss_and_gradients(model, tokens).items():
        assert value is plain[name] is None or torch.equal(value, plain[name])  # type: ignore[arg-type]


@needs_extension
@pytest.mark.parametrize("recompute", ["off", "evaluation"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_what_an_evaluation_keeps(build: Build, variant: str, recompute: str) -> None:
    """Recomputed, its input and its increment; all that is within it, and its norm, are made again."""
    B, T, D = 2, 32, 192
    ids = torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))

    def kept(iterations: int) -> int:
        """Bytes that a forward pass leaves allocated."""
        solver: dict[str, Any] = {"kind": "iiet", "variant": variant, "iterations": iterations}
        config = build(model={"hidden_size": D}, training={"recompute": recompute}, **solver).config
        model = Transformer(config, backend="cpu")
        model.initialise(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loss = model(ids, ids)
        results = record.profiler.kineto_results  # type: ignore[union-attr]
        assert results is not None
        loss.backward()
        return sum(event.nbytes() for event in results.events() if event.name() == "[memory]")

    layers = 4
    slabs = (kept(3) - kept(2)) / (layers * B * T * D * 4)
    if recompute == "off":
        assert slabs > 8
    else:  # the released reading keeps what its LayerNorm is of, too, and statistics
        assert 1.9 < slabs < (2.2 if variant == "paper" else 3.3)
