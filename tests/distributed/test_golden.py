"""Fifty steps in fp32: the same bits twice on one machine, and the stored curve on any, in any layout.

After a change meant to change the numbers, ``python -m tests.distributed.test_golden`` stores new ones.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case, train_curve
from tests.tiny import write_shard

STORED = Path(__file__).with_name("golden_losses.json")
STEPS = 50
CASE = Case(solver="iiet-1", accumulation=3)


def curve(case: Case, folder: Path) -> list[float]:
    write_shard(folder / "shard")
    paths = {"prefix": str(folder / "shard")}
    return run_ranks(train_curve, case.world_size, case, paths, STEPS)[0]


@pytest.mark.slow
def test_two_runs_are_bit_equal_and_on_the_stored_curve(tmp_path: Path) -> None:
    first, second = curve(CASE, tmp_path), curve(CASE, tmp_path)
    assert first == second
    assert first == pytest.approx(json.loads(STORED.read_text()), rel=1e-5)
    assert first[-1] < first[0] - 0.5, "it does not learn"


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "stage": 3},
        pytest.param({"tensor": 2, "data": 2, "stage": 2}, marks=pytest.mark.long),
        pytest.param(
            {"tensor": 2, "sequence": True, "pipeline": 2, "accumulation": 3}, marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_layouts_are_on_the_stored_curve(axes: dict[str, int], tmp_path: Path) -> None:
    found = curve(replace(CASE, **{"accumulation": 1, **axes}), tmp_path)  # type: ignore[arg-type]
    assert found == pytest.approx(json.loads(STORED.read_text()), rel=1e-5)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(curve(CASE, Path(folder)), indent=1) + "\n")
