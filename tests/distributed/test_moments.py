"""Muon, which has other moments of some parameters than of the rest, in the checkpoints of every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_iiet.storage.fragments import FragmentReader
from tests.distributed.harness import run_ranks
from tests.distributed.muon_alone import ENDS
from tests.distributed.parity import SAVE, TOLERANCES, Case, continue_case, train_and_save
from tests.distributed.test_reshape import LAYOUTS, SOLVER
from tests.marks import long_but
from tests.tiny import read_full, write_shard

MOMENTUM, ADAMS = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")


def with_muon(layout: str) -> Case:
    return replace(LAYOUTS[layout], **SOLVER, optimizer="muon")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[("d2z3", "t2"), ("t2", "p2"), ("p2", "d2z3")],
        *long_but([("no zero", "d2z2"), ("d2z1", "d2z1"), ("d2z3", "d2z3"), ("t2", "t2")], ("d2z3", "d2z3")),
    ],
)
def test_each_parameter_has_its_own_moments(source: str, target: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard")
    paths = {"prefix": str(tmp_path / "shard")}
    first, second = with_muon(source), with_muon(target)
    a, b = tmp_path / "a", tmp_path / "b"
    expected = run_ranks(train_and_save, first.world_size, first, paths, a)[0]
    found = run_ranks(continue_case, second.world_size, second, paths, a, b)[0]
    if source == target:
        assert [value.hex() for value in found[:2]] == [value.hex() for value in expected]
    assert found[:2] == pytest.approx(expected, rel=TOLERANCES["fp32"][0])
    with FragmentReader(a, SAVE) as one, FragmentReader(b, SAVE) as other:
        for name, entry in one.parameters.items():
            assert entry.kinds == ("fp32", *(MOMENTUM if name.endswith(ENDS) else ADAMS)), name
            assert other.parameters[name].kinds == entry.kinds
            for kind in entry.kinds:
                assert torch.equal(read_full(one, name, kind), read_full(other, name, kind)), (name, kind)


@pytest.mark.slow
def test_moments_of_another_optimizer_are_missed_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard")
    paths, case = {"prefix": str(tmp_path / "shard")}, with_muon("d2z1")
    run_ranks(train_and_save, case.world_size, case, paths, tmp_path / "a")
    adamw = replace(case, optimizer="adamw")
    with pytest.raises(
        Exception,
        match=r"has no exp_avg of layers\.0\.increment\.attention\.qkv\.weight, only fp32, momentum_buffer;",
    ):
        run_ranks(continue_case, case.world_size, adamw, paths, tmp_path / "a", tmp_path / "b")
