"""An optimizer with other moments of some parameters than of the rest, in the checkpoints of every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from megatron_iiet.config.optimizers import AdamW
from megatron_iiet.storage.fragments import FragmentReader
from megatron_iiet.training.optimizers import Prepared, adamw, decay_groups
from tests.distributed.harness import run_ranks
from tests.distributed.parity import SAVE, TOLERANCES, continue_case, train_and_save
from tests.distributed.test_reshape import LAYOUTS, SOLVER
from tests.marks import long_but
from tests.tiny import read_full, write_shard

MOMENTUM, SQUARES = ("velocity",), ("mean", "square")


class TwoRules(torch.optim.Optimizer):
    """Momentum for the groups that decay, Adam for the others; none of the names is AdamW's."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for kind in MOMENTUM if group["weight_decay"] else SQUARES:
                    state.setdefault(kind, torch.zeros_like(p))
                state["step"] = state.get("step", 0) + 1
                if group["weight_decay"]:
                    state["velocity"].mul_(0.8).add_(p.grad)
                    p.sub_(state["velocity"], alpha=group["lr"])
                    continue
                state["mean"].lerp_(p.grad, 0.1)
                state["square"].lerp_(p.grad.square(), 0.05)
                scales = (1 - 0.9 ** state["step"]), (1 - 0.95 ** state["step"])
                p.sub_(
                    group["lr"] * (state["mean"] / scales[0]) / ((state["square"] / scales[1]).sqrt() + 1e-3)
                )


def prepare(model: nn.Module, config: AdamW) -> Prepared:
    groups = decay_groups(model, 0.1)
    moments = {p: MOMENTUM if g["weight_decay"] else SQUARES for g in groups for p in g["params"]}
    return Prepared(groups, partial(TwoRules, lr=config.lr), moments)


def with_two_rules(what: Callable[..., Any], *arguments: Any) -> Any:
    with mock.patch.object(adamw, "prepare", prepare):
        return what(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[("d2z3", "t2"), ("t2", "p2"), ("p2", "d2z3")],
        *long_but([("no zero", "d2z2"), ("d2z1", "d2z1"), ("d2z3", "d2z3")]),
    ],
)
def test_each_parameter_has_its_own_moments(source: str, target: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard")
    paths = {"prefix": str(tmp_path / "shard")}
    first, second = (replace(LAYOUTS[name], **SOLVER) for name in (source, target))  # type: ignore[arg-type]
    a, b = tmp_path / "a", tmp_path / "b"
    expected = run_ranks(with_two_rules, first.world_size, train_and_save, first, paths, a)[0]
    found = run_ranks(with_two_rules, second.world_size, continue_case, second, paths, a, b)[0]
    if source == target:
        assert [value.hex() for value in found[:2]] == [value.hex() for value in expected]
    assert found[:2] == pytest.approx(expected, rel=TOLERANCES["fp32"][0])
    with FragmentReader(a, SAVE) as one, FragmentReader(b, SAVE) as other:
        assert {entry.kinds for entry in one.parameters.values()} == {("fp32", *MOMENTUM), ("fp32", *SQUARES)}
        for name, entry in one.parameters.items():
            assert other.parameters[name].kinds == entry.kinds
            matrix = name.endswith("weight") and "norm" not in name
            assert (entry.kinds[1:] == MOMENTUM) is (matrix and ".solver." not in name), name
            for kind in entry.kinds:
                assert torch.equal(read_full(one, name, kind), read_full(other, name, kind)), (name, kind)


@pytest.mark.slow
def test_moments_of_another_optimizer_are_missed_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard")
    paths, case = {"prefix": str(tmp_path / "shard")}, replace(LAYOUTS["d2z1"], **SOLVER)  # type: ignore[arg-type]
    run_ranks(with_two_rules, case.world_size, train_and_save, case, paths, tmp_path / "a")
    with pytest.raises(
        Exception, match=r"has no exp_avg of embedding\.weight, only fp32, velocity; read one"
    ):
        run_ranks(continue_case, case.world_size, case, paths, tmp_path / "a", tmp_path / "b")
