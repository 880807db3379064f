"""Sizes, initial weights, inputs and diagnostics of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.models.diagnostics import IterateStatistics, observe_iterates
from megatron_iiet.parallel.vocabulary import IGNORED
from megatron_iiet.storage.portable import without_padding
from tests.models.conftest import Build, randomise_solvers

# name: hidden, feed-forward, layers, heads, tied, parameters without merge coefficients
SIZES = {
    "55M": (512, 1408, 12, 4, True, 54_931_968),
    "340M": (1024, 2816, 24, 8, True, 341_099_520),
    "740M": (1536, 4224, 24, 8, True, 742_860_288),
    "1.3B": (2048, 5432, 24, 16, False, 1_334_806_528),
}


def sized(name: str, **solver: Any) -> Transformer:
    """A model of the paper, without memory for its weights."""
    hidden, ffn, layers, heads, tied, _ = SIZES[name]
    model = {
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_layers": layers,
        "num_attention_heads": heads,
        "tie_embeddings": tied,
    }
    with torch.device("meta"):
        return Transformer(config_from_dict({"model": model, "solver": {"kind": "euler", **solver}}))


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    layers, parameters = SIZES[name][2], SIZES[name][5]
    assert sized(name).num_parameters() == parameters
    iiet = sized(name, kind="iiet")
    assert iiet.num_solver_parameters() == layers * (layers + 1) // 2
    assert iiet.num_parameters() == parameters + iiet.num_solver_parameters()


def test_parameter_count_of_the_released_340m() -> None:
    model = sized("340M", kind="iiet", variant="released")
    assert model.num_parameters() == 341_199_074
    assert model.num_solver_parameters() == 99_554


@pytest.mark.parametrize(
    ("name", "solver", "tera_flops"),
    [
        ("340M", {}, 0.38),
        ("340M", {"kind": "dlcl"}, 0.38),
        ("340M", {"kind": "pcformer"}, 1.06),
        ("340M", {"kind": "weight-sharing"}, 1.40),
        ("340M", {"kind": "iiet", "iterations": 3}, 1.40),
        ("740M", {}, 0.80),
        ("740M", {"kind": "pcformer"}, 2.30),
        ("740M", {"kind": "iiet", "iterations": 3}, 3.05),
    ],
)
def test_flops_of_the_paper(name: str, solver: dict[str, Any], tera_flops: float) -> None:
    model = sized(name, **solver)
    assert round(model.forward_flops(512) / 1e12, 2) == tera_flops
    assert model.forward_flops(512) == model.layer_flops(512) + model.head_flops(512)


def test_flops_of_e_iiet() -> None:
    counts = [0] * 24
    counts[0], counts[5], counts[23] = 3, 10, 10
    model = sized("740M", kind="iiet", iterations=counts)
    one = sized("740M").layer_flops(512) // 24
    assert model.layer_flops(512) == (24 + 23) * one
    d, ffn, length = 1536, 4224, 512
    assert one == (2 * (4 * d * d + 3 * d * ffn) + 4 * d * length) * length
    assert model.head_flops(length) == 2 * d * 32000 * length


@pytest.mark.parametrize(
    "solver", [{"kind": "iiet", "iterations": 3}, {"kind": "weight-sharing", "repeats": 4}]
)
def test_evaluations_with_the_keys_of_the_first_make_none(solver: dict[str, Any]) -> None:
    """Two d x d matrices less in each of the three later ones of every layer."""
    d, length = 1024, 512
    less = 24 * 3 * 2 * (2 * d * d) * length
    full = sized("340M", **solver).layer_flops(length)
    assert sized("340M", **solver, key_values="first").layer_flops(length) == full - less


def test_initial_weights_depend_on_seed_and_name_only(build: Build) -> None:
    def weights(model: Transformer) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if ".solver." not in n}

    euler = weights(build())
    torch.manual_seed(99)
    model = build(kind="iiet", variant="released")
    randomise_solvers(model)
    coefficients = model.get_parameter("layers.1.solver.coefficients").clone()
    for other in (weights(model), weights(build(model={"num_layers": 5}))):
        assert all(torch.equal(euler[name], other[name]) for name in euler)
    model.initialise(1)
    differing = {n for n, p in weights(model).items() if not torch.equal(p, euler[n])}
    assert differing == {n for n, p in euler.items() if p.dim() == 2}
    assert torch.equal(model.get_parameter("layers.1.solver.coefficients"), coefficients)
    model.initialise(0)
    assert all(torch.equal(euler[name], value) for name, value in weights(model).items())
    values = [p.flatten()[:8] for p in euler.values() if p.dim() == 2]
    assert len({tuple(v.tolist()) for v in values}) == len(values)  # no two matrices share a generator


def test_initial_scale(build: Build, tokens: torch.Tensor) -> None:
    model = build(model={"hidden_size": 96, "vocab_size": 400, "init_std": 0.05})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter = without_padding(model.config, name, parameter)
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.003, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert model.embedding_scale == pytest.approx(20.0)
    unit = model.embedding(tokens) * model.embedding_scale
    assert unit.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.05)
    assert build(model={"embedding_scale": 3.0}).embedding_scale == 3.0


def test_embedding_scale_is_a_scale_of_the_embedding(build: Build, tokens: torch.Tensor) -> None:
    untied: dict[str, Any] = {"tie_embeddings": False}
    for solver in ({"kind": "euler"}, {"kind": "iiet", "variant": "released", "iterations": 1}):
        scaled = build(model={**untied, "embedding_scale": 8.0}, **solver)
        plain = build(model={**untied, "embedding_scale": 1.0}, **solver)
        plain.embedding.weight.data *= 8
        assert torch.equal(scaled(tokens), plain(tokens))


def test_losses(build: Build, tokens: torch.Tensor) -> None:
    model = build()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rows = torch.stack(
        [F.cross_entropy(logits, row) for logits, row in zip(model(inputs), targets, strict=True)]
    )
    torch.testing.assert_close(model(inputs, targets), rows.mean())
    ignored = targets.clone()
    ignored[1] = IGNORED
    torch.testing.assert_close(model(inputs, ignored, divisor=15.0), rows[0])
    model.bfloat16()
    assert model(inputs).dtype == torch.bfloat16
    assert model(inputs, targets).dtype == torch.float32


def test_too_long_a_sequence(build: Build) -> None:
    model = build()
    assert model(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 61)
    with pytest.raises(ValueError) as caught:
        model(torch.zeros(1, 33, dtype=torch.long))
    assert str(caught.value) == (
        "a sequence of 33 tokens is longer than the rotary table (model.max_position_embeddings = 32); "
        "shorten it or enlarge the table"
    )


def test_iterates_are_observed(build: Build, tokens: torch.Tensor) -> None:
    """Against iterates collected as the inputs of F: y_n, y^0, y^1; the last one is the next layer's y."""
    model = build(kind="iiet", iterations=2)
    randomise_solvers(model)
    inputs: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for n in range(4):

        def collect(_: Any, arguments: tuple[Any, ...], n: int = n) -> None:
            inputs[n].append(arguments[0])

        model.get_submodule(f"layers.{n}.increment").register_forward_pre_hook(collect)
    with observe_iterates(model) as statistics:
        model(tokens)
    assert (
        set(statistics.influence)
        == set(statistics.relative_residual)
        == {(n, i) for n in range(4) for i in range(3)}
    )
    for n in range(3):
        iterates = [*inputs[n], inputs[n + 1][0]]
        for i in range(3):
            before, after = iterates[i].double(), iterates[i + 1].double()
            cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
            assert statistics.influence[n, i] == pytest.approx((1 - cosine).mean().item(), abs=1e-6)
            residual = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean().item()
            assert statistics.relative_residual[n, i] == pytest.approx(residual, rel=1e-4)
    assert all(solver.observer is None for solver in model.solvers.values())
    seen = dict(statistics.influence)
    model(tokens.flip(1))
    assert statistics.influence == seen


def test_observed_means_are_of_the_sequences_that_count() -> None:
    """Of three, one of which is a filler; zeros where all are."""
    before, after = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))

    def observed(rows: slice, *weights: float) -> list[float]:
        found = IterateStatistics()
        found.add(0, 1, before[rows], after[rows], torch.tensor(weights) if weights else None)
        return [found.relative_residual[0, 1], found.influence[0, 1]]

    assert observed(slice(3), 1.0, 1.0, 0.0) == pytest.approx(observed(slice(2)))
    assert observed(slice(3), 0.0, 0.0, 0.0) == [0.0, 0.0]


def test_predictor_and_corrector_of_pcformer_are_observed(build: Build, tokens: torch.Tensor) -> None:
    """Iterate 0 is the predictor's y_p, iterate 1 the corrector's output, the next layer's y."""
    model = build(kind="pcformer")
    randomise_solvers(model)
    inputs: list[torch.Tensor] = []
    for n in range(2):
        model.get_submodule(f"layers.{n}.increment").register_forward_pre_hook(
            lambda _, arguments: inputs.append(arguments[0])
        )
    with observe_iterates(model) as statistics:
        model(tokens)
    y, _, predicted, corrected = inputs[:4]
    for iterate, (before, after) in enumerate([(y, predicted), (predicted, corrected)]):
        residual = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean().item()
        assert statistics.relative_residual[0, iterate] == pytest.approx(residual, rel=1e-5)


def test_observers_leave_after_an_error(build: Build) -> None:
    model = build(kind="iiet", iterations=1)
    with pytest.raises(ValueError), observe_iterates(model):
        model(torch.zeros(1, 33, dtype=torch.long))
    assert all(solver.observer is None for solver in model.solvers.values())


@pytest.mark.parametrize("count", [3, 5])
def test_iterations_are_one_a_layer(count: int, build: Build) -> None:
    model = build(kind="iiet", iterations=1)
    before = [solver.iterations for solver in model.solvers.values()]
    assert len(before) == 4
    with pytest.raises(ValueError, match=f"{count} iteration counts for 4 layers; give one a layer"):
        model.set_iterations([2] * count)
    assert [solver.iterations for solver in model.solvers.values()] == before


def test_parameters_that_are_kept_are_not_drawn(build: Build) -> None:
    model = build()
    names = [name for name, _ in model.named_parameters()]
    kept = next(name for name in names if name.startswith("layers.1.increment") and "norm" not in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.initialise(99, keep=frozenset({kept}))
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert kept in same
    assert "embedding.weight" not in same
