"""Identities between solvers, evaluation counts, and what two-stage training relies on."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from megatron_iiet.models.history import History
from tests.models.conftest import Build, randomise_solvers

PAPER = {"kind": "iiet", "predictor": "merged"}
RELEASED = {"kind": "iiet", "variant": "released"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "solver",
    [{**PAPER, "iterations": 0}, {"kind": "dlcl"}, {"kind": "iiet", "predictor": "euler", "iterations": 0}],
    ids=["iiet-r0", "dlcl", "predictor-euler-r0"],
)
def test_starts_from_euler_bit_for_bit(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], dtype: torch.dtype
) -> None:
    def run(**keys: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = build(**keys)
        for name, parameter in model.named_parameters():
            if ".solver." not in name:
                parameter.data = parameter.data.to(dtype)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        gradients = {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".solver." not in n
        }
        return model(tokens), gradients

    (euler, euler_gradients), (other, gradients) = run(), run(**solver)
    assert torch.equal(euler, other)
    assert euler_gradients.keys() == gradients.keys()
    if dtype == torch.float32:
        for name, gradient in gradients.items():  # sums are taken in another order in the backward pass
            torch.testing.assert_close(gradient, euler_gradients[name], rtol=1e-4, atol=1e-6)


def test_predictor_euler_without_iterations_ignores_coefficients(build: Build, tokens: torch.Tensor) -> None:
    model = build(kind="iiet", predictor="euler", iterations=0)
    randomise_solvers(model)
    assert torch.equal(model(tokens), build()(tokens))


def test_dlcl_is_iiet_without_iterations(build: Build, tokens: torch.Tensor) -> None:
    dlcl, iiet = build(kind="dlcl"), build(**PAPER, iterations=0)
    randomise_solvers(dlcl)
    randomise_solvers(iiet)
    assert torch.equal(dlcl(tokens), iiet(tokens))
    assert not torch.equal(dlcl(tokens), build()(tokens))


@pytest.mark.parametrize(
    "solver", [PAPER, {**PAPER, "predictor": "euler"}, RELEASED], ids=["merged", "euler", "released"]
)
@pytest.mark.parametrize("iterations", [0, 1, 3, [2, 0, 1, 3]])
def test_evaluations_of_f(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], iterations: int | list[int]
) -> None:
    model = build(**solver, iterations=iterations)
    counted = [0] * 4
    for n in range(4):

        def count(*_: Any, n: int = n) -> None:
            counted[n] += 1

        model.get_submodule(f"layers.{n}.increment").register_forward_hook(count)
    model(tokens)
    expected = [r + 1 for r in (iterations if isinstance(iterations, list) else [iterations] * 4)]
    assert counted == expected == [s.evaluations for s in model.solvers.values()]
    one_evaluation = build().layer_flops(16) // 4
    assert model.layer_flops(16) == sum(expected) * one_evaluation


@pytest.mark.parametrize("solver", [PAPER, RELEASED], ids=["paper", "released"])
def test_without_merging_every_solver_is_euler(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any]
) -> None:
    model, euler = build(**solver, iterations=3, coefficient_init="average"), build()
    randomise_solvers(model)
    model.set_iterations([2] * 4, merging=False)  # "whatever the counts"
    assert torch.equal(model(tokens), euler(tokens))
    assert model.forward_flops(16) == euler.forward_flops(16)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    euler(tokens[:, :-1], tokens[:, 1:]).backward()
    wanted = {name: p.grad for name, p in euler.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".solver." in name:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, wanted[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [PAPER, RELEASED], ids=["paper", "released"])
def test_switching_stages(build: Build, tokens: torch.Tensor, solver: dict[str, Any]) -> None:
    fresh, switched = build(**solver, iterations=2), build(**solver, iterations=2)
    switched.set_iterations([0] * 4, merging=False)
    switched(tokens)
    switched.set_iterations([2] * 4)
    assert torch.equal(switched(tokens), fresh(tokens))
    switched.set_iterations([0, 1, 2, 0])
    assert torch.equal(switched(tokens), build(**solver, iterations=[0, 1, 2, 0])(tokens))
    with pytest.raises(ValueError):
        switched.set_iterations([1])


@pytest.mark.parametrize(
    ("solver", "unused"),
    [
        ({"kind": "dlcl"}, set()),
        ({**PAPER, "iterations": 1}, set()),
        ({**RELEASED, "iterations": 1}, {"layers.0.solver.unused_row_0"}),
    ],
    ids=["dlcl", "paper", "released"],
)
def test_every_parameter_learns(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], unused: set[str]
) -> None:
    model = build(**solver)
    randomise_solvers(model)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == unused


@pytest.mark.parametrize(
    "solver", [{"kind": "dlcl"}, {**PAPER, "iterations": 2}, {**RELEASED, "iterations": 1}]
)
def test_coefficient_gradient_is_the_slope_of_the_loss(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any]
) -> None:
    model = build(**solver)
    randomise_solvers(model)
    coefficients = model.get_parameter("layers.2.solver.coefficients")
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert coefficients.grad is not None
    slopes = []
    with torch.no_grad():
        for j in range(3):
            losses = []
            for step in (1e-2, -2e-2):
                coefficients[j] += step
                losses.append(model(tokens[:, :-1], tokens[:, 1:]).double())
            coefficients[j] += 1e-2
            slopes.append((losses[0] - losses[1]) / 2e-2)
    torch.testing.assert_close(coefficients.grad[:3], torch.stack(slopes).float(), rtol=0.05, atol=2e-4)


def test_causal(build: Build, tokens: torch.Tensor) -> None:
    for solver in ({**PAPER, "iterations": 2}, {**RELEASED, "iterations": 2}):
        model = build(**solver)
        randomise_solvers(model)
        changed = tokens.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % 61
        torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9], rtol=0, atol=1e-5)
        assert not torch.allclose(model(tokens)[:, 9:], model(changed)[:, 9:])


def test_history_reads_by_index() -> None:
    entries = [torch.full((1, 2, 3), float(10**j)) for j in range(3)]
    history = History()
    for entry in entries:
        history.append(entry)
    assert len(history) == 3
    row = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 7.0]))
    (two,) = history.merge(torch.zeros(1, 2, 3), (row,), 2)
    assert torch.equal(two, torch.full((1, 2, 3), 21.0))
    (own,) = history.merge(torch.zeros(1, 2, 3), (row,), 2, own=torch.full((1, 2, 3), 4.0))
    assert torch.equal(own, torch.full((1, 2, 3), 23.0))
    rows = history.merge(None, (row, nn.Parameter(torch.tensor([0.0, 3.0]))), 2)
    assert [merged[0, 0, 0].item() for merged in rows] == [21.0, 30.0]
    with pytest.raises(AssertionError, match="merge of 4 entries, but the history holds 3"):
        history.merge(None, (row,), 4)
    assert len(History(entries[0])) == 1


def test_history_releases_what_nothing_reads_any_more() -> None:
    """Layers that wait to be recomputed hold the whole history; it must not hold all increments for them."""
    row = nn.Parameter(torch.ones(3))
    history = History(rows=[row], transposed=True)
    for _ in range(2):
        history.append(torch.randn(1, 2, 3, requires_grad=True))
    (merged,) = history.merge(None, (row,), 2)
    published = [weakref.ref(entry) for entry in history.first(2)]
    merged.sum().backward()
    del merged
    assert [entry() for entry in published] == [None, None]
    assert len(history) == 2
    with pytest.raises(AssertionError, match="after its gradient"):
        history.first(1)
