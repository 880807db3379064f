"""Identities between solvers, evaluation counts, and what two-stage training relies on."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from megatron_iiet.models import Transformer
from megatron_iiet.models.history import History
from megatron_iiet.training.optimizers import prepare_optimizer
from tests.models.conftest import Build, randomise_solvers

PAPER = {"kind": "iiet", "predictor": "merged"}
RELEASED = {"kind": "iiet", "variant": "released"}
EXPLICIT: dict[str, tuple[dict[str, Any], int]] = {
    "rk2": ({"kind": "rk2"}, 2),
    "rk2-fixed": ({"kind": "rk2", "stage_coefficients": "fixed"}, 2),
    "rk2-gated": ({"kind": "rk2", "stage_coefficients": "gated"}, 2),
    "rk4": ({"kind": "rk4"}, 4),
    "weight-sharing": ({"kind": "weight-sharing", "repeats": 3}, 3),
    "pcformer": ({"kind": "pcformer", "model": {"num_layers": 6}}, 3),
    "pcformer-4": ({"kind": "pcformer", "predictor_order": 4}, 5),
}
"""Solvers that nothing iterates, and their evaluations of F a layer."""


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
    expected = [r + 1 for r in (iterations if isinstance(iterations, list) else [iterations] * 4)]
    assert counted_evaluations(model, tokens) == expected == [s.evaluations for s in model.solvers.values()]
    one_evaluation = build().layer_flops(16) // 4
    assert model.layer_flops(16) == sum(expected) * one_evaluation


def counted_evaluations(model: Transformer, tokens: torch.Tensor) -> list[int]:
    """Of F in a forward pass, by layer."""
    counted = [0] * len(model.layers)
    for n in range(len(counted)):

        def count(*_: Any, n: int = n) -> None:
            counted[n] += 1

        model.get_submodule(f"layers.{n}.increment").register_forward_hook(count)
    model(tokens)
    return counted


@pytest.mark.parametrize(("solver", "evaluations"), EXPLICIT.values(), ids=EXPLICIT)
def test_evaluations_of_explicit_solvers(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], evaluations: int
) -> None:
    model = build(**solver)
    layers = len(model.layers)
    assert counted_evaluations(model, tokens) == [evaluations] * layers
    assert model.layer_flops(16) == evaluations * layers * (build().layer_flops(16) // 4)
    model.set_iterations([0] * layers)  # what the loop does
    assert {s.evaluations for s in model.solvers.values()} == {evaluations}
    with pytest.raises(ValueError, match="no corrector to iterate 1 times"):
        model.set_iterations([1] * layers)


def test_keys_and_values_of_the_first_evaluation(build: Build, tokens: torch.Tensor) -> None:
    """Written out for Euler steps of the same layer: later steps bring queries only."""
    model = build(
        kind="weight-sharing", repeats=3, key_values="first", model={"num_layers": 1, "init_std": 0.2}
    )
    layer = model.layers["0"].increment
    y, _ = model.embed(tokens)
    layout = model.layout(tokens.shape[1], y.dtype)
    attention, mlp = layer.attention, layer.mlp

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, attention.head_width)).transpose(1, 2)

    kept = None
    for _ in range(3):
        q, k, v = (heads(x) for x in attention.qkv(layer.input_norm(y)).split(attention.local_widths, -1))
        kept = kept or (layout.rotate(k), v)
        attended = layout.attend(layout.rotate(q), *kept).transpose(1, 2).flatten(2)
        a = attention.output(attended)
        y = y + a + mlp(layer.post_attention_norm(y + a))
    torch.testing.assert_close(model(tokens), model.project(y)[..., : model.config.model.vocab_size])

    own = build(kind="weight-sharing", repeats=3, model={"num_layers": 1, "init_std": 0.2})
    assert not torch.allclose(own(tokens), model(tokens), atol=1e-3)
    for parameter in model.parameters():
        parameter.grad = None
    model(tokens, tokens).backward()
    assert attention.qkv.weight.grad.abs().amin(1).gt(0).all()
    shape = model.config.model
    spared = 2 * 2 * shape.hidden_size * 2 * shape.num_kv_heads * shape.head_width * 16
    assert own.layer_flops(16) - model.layer_flops(16) == spared


def test_only_mergers_keep_increments(build: Build, tokens: torch.Tensor) -> None:
    """What is kept would be held until the backward pass."""
    for solver, _ in EXPLICIT.values():
        model = build(**solver)
        y, history = model.embed(tokens)
        model.integrate(y, history, tokens.shape[1])
        assert len(history) == (len(model.layers) if solver["kind"] == "pcformer" else 0)


def test_weight_sharing_once_is_euler(build: Build, tokens: torch.Tensor) -> None:
    assert torch.equal(build(kind="weight-sharing", repeats=1)(tokens), build()(tokens))


def test_initial_coefficients(build: Build, tokens: torch.Tensor) -> None:
    """Learned RK4 and gated RK2 start as the classic methods; learned RK2 from the sum of its stages."""

    def of(kind: str, coefficients: str) -> torch.Tensor:
        return build(kind=kind, stage_coefficients=coefficients)(tokens)

    assert torch.equal(of("rk4", "learned"), of("rk4", "fixed"))
    torch.testing.assert_close(of("rk2", "gated"), of("rk2", "fixed"), rtol=1e-5, atol=1e-6)
    learned = build(kind="rk2")
    rows = [s.coefficients for s in learned.solvers.values()]
    assert [row.tolist() for row in rows] == [[1.0, 1.0]] * 4
    with torch.no_grad():
        for row in rows:
            row.fill_(0.5)
    assert torch.equal(learned(tokens), of("rk2", "fixed"))


def test_gate_is_a_weight_for_every_token(build: Build, tokens: torch.Tensor) -> None:
    """All the way to one side: y + F_1, explicit Euler."""
    gated = build(kind="rk2", stage_coefficients="gated")
    with torch.no_grad():
        for solver in gated.solvers.values():
            solver.gate_bias.fill_(30.0)
    torch.testing.assert_close(gated(tokens), build()(tokens), rtol=1e-5, atol=1e-6)
    groups = prepare_optimizer(gated, gated.config.optimizer).groups
    gates = [p for n, p in gated.named_parameters() if ".solver." in n]
    assert len(gates) == 8
    for gate in gates:
        (decay,) = [g["weight_decay"] for g in groups if any(gate is p for p in g["params"])]
        assert decay == 0.0


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
        *((keys, set()) for keys, _ in EXPLICIT.values()),
    ],
    ids=["dlcl", "paper", "released", *EXPLICIT],
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
    ("solver", "name"),
    [
        ({"kind": "dlcl"}, "coefficients"),
        ({**PAPER, "iterations": 2}, "coefficients"),
        ({**RELEASED, "iterations": 1}, "coefficients"),
        ({"kind": "rk2"}, "coefficients"),
        ({"kind": "rk4"}, "coefficients"),
        ({"kind": "rk2", "stage_coefficients": "gated"}, "gate_bias"),
        ({"kind": "pcformer"}, "coefficients"),
        ({"kind": "pcformer"}, "gamma"),
        ({"kind": "pcformer", "predictor_order": 4}, "gamma"),
    ],
    ids=str,
)
def test_coefficient_gradient_is_the_slope_of_the_loss(
    build: Build, tokens: torch.Tensor, solver: dict[str, Any], name: str
) -> None:
    model = build(**solver)
    randomise_solvers(model)
    coefficients = model.get_parameter(f"layers.2.solver.{name}")
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert coefficients.grad is not None
    slopes = []
    with torch.no_grad():
        for j in range(min(3, len(coefficients))):
            losses = []
            for step in (1e-2, -2e-2):
                coefficients[j] += step
                losses.append(model(tokens[:, :-1], tokens[:, 1:]).double())
            coefficients[j] += 1e-2
            slopes.append((losses[0] - losses[1]) / 2e-2)
    torch.testing.assert_close(coefficients.grad[:3], torch.stack(slopes).float(), rtol=0.05, atol=2e-4)


def test_causal(build: Build, tokens: torch.Tensor) -> None:
    explicit = [keys for keys, _ in EXPLICIT.values()]
    for solver in ({**PAPER, "iterations": 2}, {**RELEASED, "iterations": 2}, *explicit):
        model = build(**solver)
        randomise_solvers(model)
        changed = tokens.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % 61
        torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9], rtol=0, atol=1e-5)
        assert not torch.allclose(model(tokens)[:, 9:], model(changed)[:, 9:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "euler"},
        {"kind": "dlcl"},
        {"kind": "weight-sharing", "repeats": 2},
        *({"kind": "rk2", "stage_coefficients": c} for c in ("fixed", "learned", "gated", "full")),
        *({"kind": "rk4", "stage_coefficients": c} for c in ("fixed", "learned", "full")),
        *({"kind": "pcformer", "predictor_order": order} for order in (2, 4)),
        {"kind": "iiet", "iterations": 2},
        {"kind": "iiet", "iterations": 2, "damping": 0.6},
        {"kind": "iiet", "iterations": 2, "variant": "released"},
    ],
    ids=lambda solver: "-".join(str(value) for value in solver.values()),
)
def test_all_that_a_step_makes_is_where_the_model_is(
    solver: dict[str, Any], build: Build, tokens: torch.Tensor
) -> None:
    """Forward and backward on a device that is not the default one; on a GPU the fault would be a crash."""
    model, tokens = build(model={"num_layers": 2}, **solver).to("meta"), tokens.to("meta")
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}


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
    with pytest.raises(AssertionError, match="entries up to 4 are read, but the history holds 3"):
        history.merge(None, (row,), 4)
    assert len(History(entries[0])) == 1


def test_history_reads_a_window() -> None:
    entries = [torch.full((1, 2, 3), float(10**j)) for j in range(2, 4)]
    history = History(entries, first=2)
    assert len(history) == 4
    row = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))
    (merged,) = history.merge(None, (row,), 2, own=torch.full((1, 2, 3), 4.0), first=2)
    assert torch.equal(merged, torch.full((1, 2, 3), 2102.0))
    with pytest.raises(AssertionError, match="never handed on to this stage"):
        history.merge(None, (row,), 2, first=1)


def test_history_releases_what_nothing_reads_any_more() -> None:
    """Layers that wait to be recomputed hold the whole history; it must not hold all increments for them."""
    row = nn.Parameter(torch.ones(3))
    history = History(rows=[row], transposed=True)
    for _ in range(2):
        history.append(torch.randn(1, 2, 3, requires_grad=True))
    (merged,) = history.merge(None, (row,), 2)
    published = [weakref.ref(entry) for entry in history.read(range(2))]
    merged.sum().backward()
    del merged
    assert [entry() for entry in published] == [None, None]
    assert len(history) == 2
    with pytest.raises(AssertionError, match="after its gradient"):
        history.read(range(1))
