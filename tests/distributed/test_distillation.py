"""A student learns the same from its teacher in every layout: loss, gradients, norm and weights, in fp32."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case, Reference, differences, reference, train_cases
from tests.distributed.test_parity import by_grid, name_of
from tests.tiny import write_shard

FAST = [
    Case(solver="mixed", teacher="iiet-3", accumulation=3),
    Case(solver="euler", teacher="pcformer", recompute="layer"),
    Case(pipeline=2, solver="mixed", teacher="iiet-3", accumulation=3),
]
SLOW = [
    Case(tensor=2, solver="mixed", teacher="iiet-3", tied=False, accumulation=3),
    Case(tensor=2, sequence=True, stage=3, solver="mixed", teacher="iiet-3", recompute="layer"),
    Case(data=2, stage=3, solver="mixed", teacher="iiet-3", accumulation=3),
    Case(data=2, stage=2, solver="released", teacher="rk4", recompute="evaluation"),
    Case(tensor=2, stage=0, solver="mixed", teacher="iiet-3", documents=True),
    Case(tensor=2, sequence=True, pipeline=2, solver="mixed", teacher="iiet-3", accumulation=3),
    Case(tensor=2, sequence=True, pipeline=2, solver="euler", teacher="pcformer", accumulation=3),
    Case(tensor=2, pipeline=2, data=2, solver="mixed", teacher="iiet-3", tied=False, accumulation=3),
    Case(pipeline=4, stage=0, solver="mixed", teacher="iiet-3", recompute="layer", accumulation=3),
    Case(pipeline=3, solver="mixed", teacher="iiet-3", accumulation=3, documents=True),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "shard")
    return {"prefix": str(folder / "shard"), "teachers": str(folder)}


@cache
def expected_of(case: Case, prefix: str, teachers: str) -> Reference:
    return reference(case, {"prefix": prefix, "teachers": teachers})


def check(cases: list[Case], paths: dict[str, str], folder: Path) -> None:
    alone = [Case(solver=c.solver, teacher=c.teacher, tied=c.tied, documents=c.documents) for c in cases]
    expected = [expected_of(case, **paths) for case in alone]
    results = run_ranks(train_cases, cases[0].world_size, cases, paths, folder, timeout=400.0)
    wrong: list[str] = []
    for case, wanted, (losses, norms) in zip(cases, expected, results[0], strict=True):
        assert max(wanted.norms) > 0.5, "clipping was never in force"
        wrong += differences(case, wanted, losses, norms, folder / str(case))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_grid(FAST), ids=name_of)
def test_layouts(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cases", by_grid(SLOW), ids=name_of)
def test_larger_layouts(cases: list[Case], paths: dict[str, str], tmp_path: Path) -> None:
    check(cases, paths, tmp_path)


@pytest.mark.slow
def test_bf16(paths: dict[str, str], tmp_path: Path) -> None:
    for case in (
        Case(tensor=2, sequence=True, pipeline=2, solver="mixed", teacher="iiet-3", accumulation=3),
        Case(tensor=2, data=2, stage=3, solver="mixed", teacher="iiet-3"),
    ):
        check([replace(case, precision="bf16")], paths, tmp_path)


@pytest.mark.slow
def test_fp16(paths: dict[str, str], tmp_path: Path) -> None:
    """The terms of a pipeline's other stages are scaled as the last one's are."""
    case = Case(pipeline=2, solver="mixed", teacher="iiet-3", accumulation=3, precision="fp16")
    check([case], paths, tmp_path)
