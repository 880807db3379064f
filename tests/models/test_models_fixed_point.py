"""The damped corrector; and that benchmarks/fixed_point.py solves the layer's own equation, and how."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from megatron_iiet.models import Transformer
from megatron_iiet.models.pipeline import PipelineStage
from tests.marks import long_but
from tests.models.conftest import Build, randomise_solvers
from tests.models.test_models_against_spec import TOKENS, HuggingFaceLayers, converted, llama, rows_of
from tests.models.test_models_recompute import in_dtype, loss_and_gradients

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fixed_point_methods as fp

__all__ = ["llama"]  # the fixture

DAMPED: dict[str, Any] = {"kind": "iiet", "iterations": 3, "damping": 0.4, "history_norm": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"kind": "iiet", "history_norm": "none"},
    "history-norm": {"kind": "iiet"},
    "released": {"kind": "iiet", "variant": "released"},
    "shared-readout": {"kind": "iiet", "variant": "released", "readout": "shared"},
}


@pytest.mark.parametrize("predictor", ["merged", "euler"])
@torch.no_grad()
def test_damped_corrector(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, predictor: str) -> None:
    """On iterates y, where the model averages increments: the same with the merged predictor."""

    def integrated(omega: float) -> Tensor:
        y, kept = hf.embedded, []
        for n, increment in enumerate(hf.increments):
            base = y + sum(alpha[n][j] * kept[j] for j in range(n))
            f = increment(y)
            iterate, damped = (
                (y + f if predictor == "euler" else base + alpha[n][n] * f),
                base + alpha[n][n] * f,
            )
            for _ in range(3):
                damped = (1 - omega) * damped + omega * (base + alpha[n][n] * increment(iterate))
                iterate = damped
            y = iterate
            kept.append((y - base) / alpha[n][n])
        return hf.logits(y)

    model = converted(llama[1], tmp_path / "x", {**DAMPED, "predictor": predictor})
    hf, alpha = HuggingFaceLayers(llama[0], TOKENS), rows_of(model)
    wanted = integrated(0.4)
    assert (model(TOKENS) - wanted).abs().max() < 2e-5
    assert (wanted - integrated(1.0)).abs().max() > 2e-3


def test_damping_1_is_the_plain_corrector(build: Build, tokens: Tensor) -> None:
    plain, damped = build(kind="iiet", iterations=2), build(kind="iiet", iterations=2, damping=1)
    assert torch.equal(plain(tokens), damped(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_damped_gradients_whatever_is_recomputed(build: Build, tokens: Tensor, dtype: torch.dtype) -> None:
    def gradients(recompute: str) -> dict[str, Tensor | None]:
        model = in_dtype(build(**DAMPED, training={"recompute": recompute}), dtype)
        randomise_solvers(model)
        return loss_and_gradients(model, tokens)

    wanted = gradients("off")
    assert all(value is not None and value.isfinite().all() and value.any() for value in wanted.values())
    for recompute in ("layer", "evaluation"):
        for name, found in gradients(recompute).items():
            assert torch.equal(found, wanted[name]), f"{recompute}: {name}"  # type: ignore[arg-type]


def test_damped_stages_are_the_whole(build: Build, tokens: Tensor) -> None:
    whole = build(**DAMPED)
    randomise_solvers(whole)
    state, x = whole.state_dict(), tokens
    for part in (range(1), range(1, 4)):
        model = Transformer(whole.config, layers=part)
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        stage = PipelineStage(model, tokens.shape[1])
        stage.resize(whole)
        x = stage(x)
    assert torch.equal(model.project(x)[..., : whole.config.model.vocab_size], whole(tokens))


def linear(matrix_TDD: Tensor, offset_TD: Tensor) -> fp.Problem:
    """z = A z + b, every token for itself; solved by z* = (I − A)^-1 b."""

    def image(z: Tensor) -> Tensor:
        return (matrix_TDD @ z.unsqueeze(-1)).squeeze(-1) + offset_TD

    zeros = torch.zeros_like(offset_TD).unsqueeze(0)
    return fp.Problem(image, image(zeros), zeros, lambda z: (z, z))


def after(method: fp.Method, problem: fp.Problem, steps: int) -> tuple[int, Tensor]:
    return next(itertools.islice(method(problem), steps, None))


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_plain_iteration_is_the_model(
    build: Build, tokens: Tensor, solver: dict[str, Any], iterations: int
) -> None:
    model = build(**solver, iterations=iterations)
    randomise_solvers(model)
    with torch.no_grad():
        own = model(tokens)
        with fp.steps_replaced(model, partial(fp.Solve, method=fp.picard, evaluations=iterations + 1)):
            torch.testing.assert_close(model(tokens), own, rtol=0, atol=2e-5)
        never = partial(fp.StopEarly, evaluations=iterations + 1, tolerance=0.0, by="token")
        with fp.steps_replaced(model, never) as steps:
            torch.testing.assert_close(model(tokens), own, rtol=0, atol=2e-5)
        assert [step.used / step.calls for step in steps] == [iterations + 1] * 4
        assert torch.equal(model(tokens), own)  # its own steps are back


def test_evaluations_are_counted(build: Build, tokens: Tensor) -> None:
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    model = build(kind="iiet", iterations=1, model={"num_layers": 1})
    model.get_submodule("layers.0.increment").register_forward_pre_hook(count)
    for method in (fp.picard, partial(fp.anderson, memory=2)):
        counted = 0
        with torch.no_grad(), fp.steps_replaced(model, partial(fp.Solve, method=method, evaluations=5)):
            model(tokens)
        assert counted == 5


def test_methods_solve_what_they_should() -> None:
    torch.manual_seed(0)
    size, tokens = 3, 5
    matrix = 0.3 * torch.randn(tokens, size, size)
    offset = torch.randn(tokens, size)
    problem = linear(matrix, offset)
    solution = torch.linalg.solve(torch.eye(size) - matrix, offset)
    # On a linear problem Anderson that forgets nothing is exact after as many differences as dimensions.
    spent, exact = after(partial(fp.anderson, memory=size), problem, size)
    assert spent == size + 1
    torch.testing.assert_close(exact[0], solution, rtol=1e-3, atol=1e-4)
    spent, far = after(fp.picard, problem, size)
    assert spent == size + 1
    assert (far[0] - solution).norm() > 100 * (exact[0] - solution).norm()
    _, half = after(partial(fp.damped, omega=0.5), problem, 1)
    torch.testing.assert_close(half, (problem.start + problem.map(problem.start)) / 2)
    # k terms of the series after the residual are k + 1 plain iterations of a linear problem.
    spent, series = after(partial(fp.newton_neumann, terms=2), problem, 1)
    assert spent == 6
    torch.testing.assert_close(series, after(fp.picard, problem, 3)[1], rtol=1e-4, atol=1e-5)
    one_token = linear(matrix[:1], offset[:1])
    spent, krylov = after(partial(fp.newton_gmres, size=size), one_token, 1)
    assert spent == 2 + 2 * size
    torch.testing.assert_close(krylov[0], solution[:1], rtol=1e-3, atol=1e-4)


def looks_ahead(build: Build, tokens: Tensor, method: fp.Method, solver: dict[str, Any]) -> bool:
    model = build(**solver, iterations=1, model={"init_std": 0.15})
    randomise_solvers(model)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        fp.steps_replaced(model, partial(fp.Solve, method=method, evaluations=8)),
    ):
        return not torch.allclose(model(tokens)[:, :9], model(changed)[:, :9], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", long_but(["paper", "released"], "paper"))
def test_what_a_model_could_use_is_causal(build: Build, tokens: Tensor, variant: str) -> None:
    for name, method in fp.METHODS.items():
        assert not looks_ahead(build, tokens, method, VARIANTS[variant]), name
    for name, method in fp.ANALYSIS_ONLY.items():
        assert looks_ahead(build, tokens, method, VARIANTS[variant]), name


def test_refuses_what_has_no_fixed_point(build: Build, tokens: Tensor) -> None:
    for solver in ({"kind": "euler"}, {"kind": "iiet", "iterations": 1, "predictor": "euler"}):
        model = build(**solver)
        make = partial(fp.Solve, method=fp.picard, evaluations=2)
        with fp.steps_replaced(model, make), pytest.raises(ValueError, match="no fixed point to study"):
            model(tokens)
