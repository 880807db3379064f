"""A checkpoint of one layout, continued in another."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_iiet.storage.fragments import FragmentReader
from tests.distributed.harness import run_ranks
from tests.distributed.parity import SAVE, TOLERANCES, Case, continue_case, train_and_save
from tests.marks import long_but
from tests.tiny import read_full, write_shard

LAYOUTS = {
    "one process": Case(),
    "no zero": Case(stage=0),
    "d2z1": Case(data=2),
    "d2z2": Case(data=2, stage=2),
    "d2z3": Case(data=2, stage=3),
    "t2": Case(tensor=2),
    "t2sd2z3": Case(tensor=2, sequence=True, data=2, stage=3),
    "p2": Case(pipeline=2, accumulation=3),
    "p2z0": Case(pipeline=2, stage=0, accumulation=3),
    "p4": Case(pipeline=4, accumulation=3),
    "t2p2": Case(tensor=2, pipeline=2, accumulation=3),
    "t2d2z2": Case(tensor=2, data=2, stage=2),
    "t4d2z2": Case(tensor=4, data=2, stage=2),
}
PAIRS = [
    ("d2z3", "t2"),
    ("t2", "d2z2"),
    ("t2p2", "t2d2z2"),
    ("t2d2z2", "p4"),
    ("p4", "one process"),
    ("one process", "t2sd2z3"),
    ("t2sd2z3", "t2p2"),
    ("p2z0", "d2z1"),
    ("d2z1", "no zero"),
    ("no zero", "p2"),
    ("p2", "p2z0"),
    ("d2z2", "d2z3"),
]
OF_EIGHT = [("t2p2", "t4d2z2"), ("t4d2z2", "p4")]
SOLVER = {"solver": "released", "tied": True}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    write_shard(tmp_path / "shard")
    return {"prefix": str(tmp_path / "shard")}


def same_values(one: Path, other: Path) -> bool:
    """Whether masters and moments of all parameters are bit-equal."""
    with FragmentReader(one, SAVE) as a, FragmentReader(other, SAVE) as b:
        assert set(a.parameters) == set(b.parameters)
        assert {entry.kinds for entry in a.parameters.values()} == {("fp32", "exp_avg", "exp_avg_sq")}
        return all(
            torch.equal(read_full(a, name, kind), read_full(b, name, kind))
            for name in a.parameters
            for kind in a.parameters[name].kinds
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    long_but(
        [*PAIRS, ("t2", "p2"), *OF_EIGHT], ("t2sd2z3", "t2p2"), ("p4", "one process"), ("d2z1", "no zero")
    ),
)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_continues_in_another_layout(
    source: str, target: str, precision: str, paths: dict[str, str], tmp_path: Path
) -> None:
    """Masters and moments arrive bit for bit; the next step is the one the first layout would have taken."""
    first, second = (replace(LAYOUTS[name], **SOLVER, precision=precision) for name in (source, target))  # type: ignore[arg-type]
    if not (first.is_legal and second.is_legal):
        pytest.skip("bf16 needs ZeRO")
    loss, norm = run_ranks(train_and_save, first.world_size, first, paths, tmp_path / "a")[0]
    found = run_ranks(continue_case, second.world_size, second, paths, tmp_path / "a", tmp_path / "b")[0]
    assert same_values(tmp_path / "a", tmp_path / "b")
    for_losses, for_norms, _ = TOLERANCES[precision]
    assert found[0] == pytest.approx(loss, rel=for_losses)
    assert found[1] == pytest.approx(norm, rel=for_norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    long_but(
        product(["t2", "t2p2", "t2sd2z3", "p2", "d2z2", "one process"], ["fp32", "bf16"]),
        *[("t2sd2z3", "bf16"), ("one process", "fp32")],
    ),
)
def test_continues_to_the_bit_in_its_own_layout(
    name: str, precision: str, paths: dict[str, str], tmp_path: Path
) -> None:
    case = replace(LAYOUTS[name], **SOLVER, precision=precision)  # type: ignore[arg-type]
    expected = run_ranks(train_and_save, case.world_size, case, paths, tmp_path / "a")[0]
    found = run_ranks(continue_case, case.world_size, case, paths, tmp_path / "a", tmp_path / "b")[0]
    assert [v.hex() for v in found[:2]] == [v.hex() for v in expected]
