"""Every layout trains the model that one process trains: loss, every gradient, norm, weights, in fp32."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.storage.fragments import FragmentReader
from tests.distributed.harness import run_ranks
from tests.distributed.parity import (
    SAVE,
    SPREAD,
    STEPS,
    Case,
    Reference,
    differences,
    evaluate_cases,
    every_grid,
    pairwise,
    reference,
    reference_evaluation,
    train_cases,
)
from tests.marks import long_but
from tests.tiny import read_full, write_shard

# The extremes of every two axes of the grid, with and without sequence parallelism.
EXTREMES = [
    Case(tensor=4, pipeline=2, solver="iiet-3", recompute="layer", accumulation=3),
    Case(tensor=4, pipeline=2, sequence=True, solver="released", accumulation=3),
    Case(tensor=4, data=2, stage=3, solver="mixed"),
    Case(tensor=4, data=2, sequence=True, stage=2, solver="iiet-3"),
    Case(tensor=2, pipeline=4, solver="mixed", tied=False, accumulation=3),
    Case(tensor=2, pipeline=4, sequence=True, solver="iiet-3", accumulation=3),
    Case(pipeline=4, data=2, solver="released", accumulation=3),
    Case(tensor=2, pipeline=2, data=2, sequence=True, solver="iiet-1", accumulation=3),
    Case(tensor=2, pipeline=2, data=2, stage=0, solver="iiet-3", accumulation=3),
]
SMOKE = [
    Case(tensor=2, sequence=True, stage=3, solver="released", recompute="layer"),
    Case(tensor=2, stage=1, solver="iiet-3", accumulation=3),
    Case(tensor=2, stage=0, solver="iiet-1", accumulation=3),
    Case(pipeline=2, stage=1, solver="mixed", accumulation=3),
    Case(pipeline=2, stage=0, solver="iiet-1", tied=False, accumulation=3, recompute="evaluation"),
    Case(tensor=2, sequence=True, stage=1, solver="rk2-gated"),
    Case(pipeline=2, stage=1, solver="pcformer", accumulation=3, recompute="layer"),
    Case(pipeline=4, stage=1, solver="pcformer", accumulation=3),
]
DOCUMENTS = [
    Case(data=2, stage=3, solver="released", recompute="layer", documents=True),
    Case(data=2, stage=1, solver="iiet-3", accumulation=3, documents=True),
    Case(tensor=2, stage=1, solver="iiet-1", tied=False, documents=True),
    Case(tensor=2, sequence=True, stage=3, solver="mixed", recompute="evaluation", documents=True),
    Case(pipeline=3, stage=1, solver="iiet-1", recompute="evaluation", accumulation=3, documents=True),
]
SLOW_DOCUMENTS = [
    Case(pipeline=2, stage=0, solver="released", recompute="layer", accumulation=3, documents=True),
    Case(pipeline=4, solver="iiet-3", recompute="layer", accumulation=6, documents=True),
    Case(pipeline=4, stage=0, solver="dlcl", accumulation=2, documents=True),
    Case(tensor=2, sequence=True, pipeline=2, solver="released", accumulation=3, documents=True),
    Case(pipeline=2, data=2, solver="iiet-1", accumulation=3, documents=True),
    Case(pipeline=3, data=2, stage=0, solver="mixed", accumulation=6, documents=True),
]
READINGS = [
    Case(tensor=2, sequence=True, pipeline=2, solver="damped", accumulation=3),
    Case(tensor=2, sequence=True, pipeline=2, solver="normed", accumulation=3),
    Case(tensor=2, sequence=True, pipeline=2, solver="unmerged", accumulation=3),
    Case(data=2, stage=3, solver="unmerged", recompute="evaluation"),
    Case(tensor=2, sequence=True, pipeline=2, solver="rk4-full", accumulation=3),
    Case(data=2, stage=3, solver="rk4-full", recompute="evaluation"),
    Case(tensor=2, sequence=True, pipeline=2, solver="first-keys", accumulation=3),
    Case(tensor=2, stage=3, solver="first-keys", recompute="evaluation"),
    Case(data=2, stage=3, solver="damped", recompute="evaluation"),
    Case(data=2, stage=3, solver="pcformer-4", recompute="layer"),
    Case(tensor=2, sequence=True, stage=3, solver="one-row", recompute="layer"),
    Case(tensor=2, sequence=True, stage=1, solver="pcformer-4"),
    Case(pipeline=2, solver="one-row", accumulation=3),
    Case(pipeline=2, solver="normed", stage=0, accumulation=3),
]
FAMILIES = [
    Case(tensor=2, sequence=True, stage=3, shape="biased", recompute="layer"),
    Case(tensor=2, stage=1, shape="biased", accumulation=3),
    Case(tensor=2, stage=3, shape="normed-heads", solver="first-keys", recompute="evaluation"),
    Case(tensor=2, sequence=True, stage=1, shape="normed-heads", solver="first-keys"),
    Case(pipeline=2, stage=1, shape="normed-heads", solver="first-keys", accumulation=3),
    Case(pipeline=2, stage=0, shape="biased", accumulation=3),
]
LARGER_FAMILIES = [
    Case(tensor=2, pipeline=2, sequence=True, shape="normed-heads", accumulation=3),
    Case(tensor=2, data=2, stage=2, shape="normed-heads", solver="released", documents=True),
    Case(pipeline=2, data=2, shape="biased", tied=False, accumulation=3, documents=True),
    Case(tensor=2, data=2, stage=3, shape="normed-heads", precision="bf16"),
    Case(tensor=2, sequence=True, pipeline=2, shape="biased", accumulation=3, precision="bf16"),
]
MUON = [
    Case(optimizer="muon", data=2, stage=0),
    Case(optimizer="muon", data=2, stage=1, accumulation=3),
    Case(optimizer="muon", data=2, stage=2, offload=True),
    Case(optimizer="muon", data=2, stage=3),
    Case(optimizer="muon", tensor=2, sequence=True, pipeline=2, accumulation=3),
]
MORE_MUON = [
    Case(optimizer="muon", stage=0, shape="biased"),
    Case(optimizer="muon", data=2, stage=3, offload=True),
    Case(optimizer="muon", data=3, stage=1),
    Case(optimizer="muon", tensor=2, stage=0, shape="biased"),
    Case(optimizer="muon", tensor=2, sequence=True, stage=2),
    Case(optimizer="muon", pipeline=2, stage=0, accumulation=3),
    Case(optimizer="muon", pipeline=2, stage=1, accumulation=3, tied=False),
    Case(optimizer="muon", tensor=2, data=2, stage=1),
    Case(optimizer="muon", tensor=2, data=2, stage=3, shape="biased"),
    Case(optimizer="muon", tensor=2, data=2, stage=1, precision="bf16"),
    Case(optimizer="muon", tensor=2, data=2, stage=3, precision="bf16"),
    Case(optimizer="muon", pipeline=2, data=2, stage=0, accumulation=3, precision="bf16"),
    Case(optimizer="muon", pipeline=2, data=2, stage=1, accumulation=3),
]
EVALUATION = [
    {"data": 2, "accumulation": 3},
    {"tensor": 2, "stage": 3},
    {"pipeline": 3, "accumulation": 3},
    pytest.param({"pipeline": 2, "data": 2, "accumulation": 3}, marks=pytest.mark.slow),
]
BF16 = [
    Case(tensor=2, sequence=True, pipeline=2, solver="iiet-3", accumulation=3, precision="bf16"),
    Case(tensor=2, pipeline=2, stage=0, solver="released", accumulation=3, precision="bf16"),
    Case(tensor=2, data=2, stage=3, solver="iiet-1", precision="bf16"),
    Case(tensor=2, data=2, stage=2, sequence=True, solver="iiet-3", precision="bf16"),
    Case(tensor=2, sequence=True, pipeline=2, solver="pcformer", accumulation=3, precision="bf16"),
]
FP16 = [
    Case(tensor=2, sequence=True, pipeline=2, solver="iiet-3", accumulation=3, precision="fp16"),
    Case(tensor=2, data=2, stage=3, solver="iiet-1", precision="fp16"),
    Case(tensor=2, data=2, stage=2, sequence=True, solver="mixed", precision="fp16", offload=True),
]
MORE_16_BIT = [
    Case(data=2, stage=1, accumulation=3, precision="fp16"),
    Case(data=2, stage=2, precision="fp16"),
    Case(data=2, stage=3, precision="fp16", offload=True),
    Case(data=2, stage=1, precision="fp16", optimizer="muon"),
    Case(tensor=2, stage=1, solver="released", precision="fp16", documents=True),
    Case(pipeline=2, solver="pcformer", accumulation=3, precision="fp16", tied=False),
    Case(pipeline=2, accumulation=3, precision="fp16", offload=True),
    Case(pipeline=2, accumulation=3, precision="bf16", offload=True),
]
FP8 = [
    replace(case, solver="iiet-3", shape="wide", precision="bf16")
    for case in (
        Case(tensor=2, stage=1, fp8="tensorwise"),
        Case(tensor=2, stage=2, fp8="rowwise", recompute="evaluation"),
        Case(tensor=2, sequence=True, pipeline=2, accumulation=3, fp8="tensorwise"),
        Case(tensor=2, sequence=True, pipeline=2, accumulation=3, fp8="rowwise", recompute="evaluation"),
        Case(tensor=2, data=2, stage=3, fp8="tensorwise", recompute="layer"),
        Case(tensor=2, data=2, stage=2, fp8="rowwise"),
    )
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    prefix = tmp_path_factory.mktemp("data") / "shard"
    write_shard(prefix)
    return {"prefix": str(prefix)}


@cache
def expected_of(
    solver: str, tied: bool, documents: bool, shape: str, optimizer: str, prefix: str
) -> Reference:
    case = Case(solver=solver, tied=tied, documents=documents, shape=shape, optimizer=optimizer)
    return reference(case, {"prefix": prefix})


def check(cases: list[Case], paths: dict[str, str], folder: Path) -> None:
    results = run_ranks(train_cases, cases[0].world_size, cases, paths, folder, timeout=400.0)
    wrong = []
    for case, (losses, norms) in zip(cases, results[0], strict=True):
        expected = expected_of(
            case.solver, case.tied, case.documents, case.shape, case.optimizer, paths["prefix"]
        )
        assert max(expected.norms) > 0.5, "clipping was never in force"
        wrong += differences(case, expected, losses, norms, folder / str(case))
    assert not wrong, "\n".join(wrong)


def by_grid(cases: list[Case]) -> list[list[Case]]:
    """Cases of one grid share one launch."""
    ordered = sorted(cases, key=lambda case: case.grid)
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda case: case.grid)]


def name_of(cases: list[Case]) -> str:
    return "t{}p{}d{}".format(*cases[0].grid) + f"-{len(cases)}cases"


@pytest.mark.parametrize("cases", by_grid(SMOKE), ids=name_of)
def test_smoke(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
def test_weights_are_excused_by_rounding_only_where_it_is_large(
    paths: dict[str, str], tmp_path: Path
) -> None:
    """A one-number gradient near 0, seen 2.7e-5; everything else stays within the plain tolerance."""
    expected = expected_of("rk2-gated", False, False, "", "adamw", paths["prefix"])
    noise = expected.weight_noise()
    loud = {n for n, w in expected.weights.items() if SPREAD * noise[n] > 1e-5 * w.abs().max().item()}
    assert loud <= {"layers.0.solver.gate_bias"}
    assert noise["layers.0.solver.gate_bias"] < 1e-4 * expected.weights["layers.1.solver.gate_bias"].abs()
    check([Case(solver="rk2-gated", stage=0, tied=False)], paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", long_but(by_grid(DOCUMENTS), by_grid(DOCUMENTS)[0]), ids=name_of)
def test_documents(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Against documents that never met: each in a sequence of its own, nothing of it known to the model."""
    check(cases, paths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(SLOW_DOCUMENTS), ids=name_of)
def test_documents_in_larger_grids(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("axes", EVALUATION, ids=str)
def test_validation_and_diagnostics(axes: dict[str, Any], paths: dict[str, str]) -> None:
    """The mean over all targets that count, though ranks and micro-batches have very different numbers."""
    cases = [Case(**axes, solver="iiet-1", documents=documents) for documents in (False, True)]
    per_rank = run_ranks(evaluate_cases, cases[0].world_size, cases, paths)
    for case, results in zip(cases, zip(*per_rank, strict=True), strict=True):
        expected, statistics = reference_evaluation(case, paths)
        for loss, found in results:
            assert loss == pytest.approx(expected, rel=1e-6)
            for kind in ("relative_residual", "influence"):
                assert getattr(found, kind) == pytest.approx(getattr(statistics, kind), rel=1e-3, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(pairwise([*EXTREMES, *every_grid()])), ids=name_of)
def test_matrix(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Every grid up to 8 processes, all pairs of values of all axes, and the extremes of the grid."""
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", long_but(by_grid(READINGS), by_grid(READINGS)[0]), ids=name_of)
def test_readings(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_grid(FAMILIES), ids=name_of)
def test_families(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Biases, q/k norms, a head's own width and scaled positions."""
    check(cases, paths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(LARGER_FAMILIES), ids=name_of)
def test_families_in_larger_grids(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_grid(MUON), ids=name_of)
def test_muon(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Matrices that ranks hold parts of take the steps of whole ones."""
    check(cases, paths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(MORE_MUON), ids=name_of)
def test_muon_in_more_layouts(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_grid(BF16), ids=name_of)
def test_bf16(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """bf16 rounds at other places in other layouts; what it must not do is train something else."""
    check(cases, paths, tmp_path)
    with FragmentReader(tmp_path / str(cases[0]) / str(STEPS - 1), SAVE) as reader:
        coefficients = read_full(reader, "layers.2.solver.coefficients")
    assert not torch.equal(coefficients, coefficients.bfloat16().float()), "coefficients learn in bf16 steps"


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_grid(FP16), ids=name_of)
def test_fp16(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """With the loss scaled, within a tenth of bf16's tolerances."""
    check(cases, paths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cases", long_but(by_grid(FP8), by_grid(FP8)[0]), ids=name_of)
def test_fp8(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Every rank scales its own parts."""
    check(cases, paths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(MORE_16_BIT), ids=name_of)
def test_16_bits_in_more_layouts(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    """Of a tied embedding in a pipeline DeepSpeed looks for the gradient elsewhere than it sums it."""
    check(cases, paths, tmp_path)
