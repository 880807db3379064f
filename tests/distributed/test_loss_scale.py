"""An fp16 run's gradients overflow: all ranks see it, leave the step out and lower the scale alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine import Verdict
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case, open_engine, reference, step_once
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.distributed.test_guards import multiplied, state_of
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, write_shard

STEPS = 12
SCALING = (("initial_scale_power", 25), ("hysteresis", 1), ("loss_scale_window", 4))
FP16: dict[str, Any] = {"precision": "fp16", "scaling": SCALING}
CASES = [
    Case(data=2, stage=1, accumulation=3, **FP16),
    Case(data=2, stage=2, offload=True, **FP16),
    Case(tensor=2, stage=3, **FP16),
    Case(pipeline=2, accumulation=3, **FP16),
]
BAD = 9
"""A step, from 0, in which the last rank alone finds an infinite gradient."""


def overflowing(case: Case, paths: dict[str, str], world: ParallelContext) -> Iterator[tuple[Any, ...]]:
    config, engine, own = open_engine(case, paths, world, STEPS)
    assert isinstance(own, TrainBatches)
    for step in range(STEPS):
        before = state_of(engine)
        with multiplied(engine, math.nan if step == BAD else 1.0):
            result = step_once(config, engine, own, step)
        moved = not all(map(torch.equal, state_of(engine), before))
        yield result.verdict, result.loss_scale, result.loss, result.grad_norm, moved


def overflowing_cases(cases: list[Case], paths: dict[str, str]) -> list[list[tuple[Any, ...]]]:
    with ParallelContext.start(cases[0].config(paths).parallel) as world:
        return [list(overflowing(case, paths, world)) for case in cases]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    prefix = tmp_path_factory.mktemp("data") / "shard"
    write_shard(prefix)
    return {"prefix": str(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("case", long_but(CASES, CASES[0], CASES[-1]), ids=str)
def test_an_overflow_is_seen_and_left_out_alike(case: Case, paths: dict[str, str]) -> None:
    """From a first scale that is too large; then the scale is doubled until it is again. Numbers that are
    logged know nothing of it."""
    one, other = (results[0] for results in run_ranks(overflowing_cases, 2, [case], paths))
    assert one == other
    verdicts, scales, losses, norms, moved = zip(*one, strict=True)
    assert [each is Verdict.TRAINED for each in verdicts] == list(moved)
    assert set(verdicts) == {Verdict.TRAINED, Verdict.OVERFLOW}
    assert verdicts[0] is verdicts[BAD] is Verdict.OVERFLOW
    for step, (verdict, scale) in enumerate(zip(verdicts[:-1], scales, strict=False)):
        steady = verdicts[max(0, step - 3) : step + 1] == (Verdict.TRAINED,) * 4
        assert scales[step + 1] == scale * (0.5 if verdict is Verdict.OVERFLOW else 2.0 if steady else 1.0)
    trained = next(n for n, each in enumerate(verdicts) if each is Verdict.TRAINED)
    assert trained > 1
    expected = reference(Case(solver=case.solver), paths)
    assert losses[0] == pytest.approx(expected.losses[0], rel=1e-4)
    assert 0.5 < norms[trained] < 1.0  # of the loss, not of the loss times its scale


@pytest.mark.slow
def test_a_run_stopped_between_changes_of_the_scale_goes_on_as_it_would(tmp_path: Path) -> None:
    """To the bit, scale and steps left out included; and what it said of them."""
    data = make_data(tmp_path)
    path = ds_json(tmp_path, 1, fp16={"initial_scale_power": 25, "loss_scale_window": 2})
    logs = []
    for name, stops in (("whole", [None]), ("parts", [1, 4, None])):
        for stop in stops:
            training = {"precision": "fp16", "stop_after": stop}
            config = tiny_config(data, tmp_path / name, training=training)
            weights = run_ranks(pretrain_rank, 2, as_data(config), path)[0]
        numbers = ("loss", "grad_norm", "lr", "loss_scale", "skipped")
        logs.append(
            {s: [v[k].hex() for k in numbers if k in v] for s, v in read_log(tmp_path / name).items()}
        )
        logs.append({parameter: weight.tolist() for parameter, weight in weights.items()})
    assert logs[:2] == logs[2:]
    scales = {values["loss_scale"] for values in read_log(tmp_path / "whole").values() if "lr" in values}
    assert len(scales) > 2
