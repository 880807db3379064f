"""A step that the gate leaves out moves nothing, in every layout: what follows is what would have followed
had its batch never been there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.storage.fragments import FragmentReader
from megatron_iiet.training.engine import Engine, NotFinite, Verdict
from megatron_iiet.training.engine.optimizer_state import _prepared_parts, _tensors
from tests.distributed.harness import run_ranks
from tests.distributed.parity import SAVE, Case, open_engine, step_once, train_alone
from tests.tiny import read_full, write_shard

STEPS = 6
GUARDS = (("nonfinite", "skip"), ("spike", "skip"), ("window", 2), ("deviations", 200.0))
BAD = {2: math.nan, 4: 1e6}
"""Steps, from 0, whose gradient on the last rank is multiplied: no number, and one that stands out."""
VERDICTS = [
    *(Verdict.TRAINED, Verdict.TRAINED, Verdict.NOT_FINITE),
    *(Verdict.TRAINED, Verdict.SPIKE, Verdict.TRAINED),
]
CASES = [
    Case(data=2, stage=1, precision="bf16"),
    Case(data=2, stage=2, precision="bf16"),
    Case(data=2, stage=3, accumulation=3),
    Case(pipeline=2, stage=1, accumulation=3),
    Case(tensor=2, stage=1),
    Case(data=2, stage=1, optimizer="muon"),
]
MORE_CASES = [
    Case(data=2, stage=0, accumulation=3),
    Case(data=2, stage=1),
    Case(data=2, stage=2, offload=True),
    Case(data=2, stage=2, precision="bf16", offload=True),
    Case(data=2, stage=3, precision="bf16"),
    Case(data=2, stage=3, offload=True),
    Case(pipeline=2, stage=0, accumulation=3),
    Case(pipeline=2, stage=1, accumulation=3, precision="bf16"),
    Case(tensor=2, stage=0, accumulation=3),
    Case(tensor=2, stage=1, precision="bf16"),
    Case(tensor=2, stage=2),
    Case(tensor=2, stage=3),
    Case(data=2, stage=0, optimizer="muon"),
    Case(data=2, stage=2, optimizer="muon", offload=True),
    Case(data=2, stage=3, optimizer="muon", precision="bf16"),
    Case(pipeline=2, stage=0, optimizer="muon", accumulation=3, precision="bf16"),
    Case(tensor=2, stage=3, optimizer="muon"),
]


@contextmanager
def multiplied(engine: Engine, factor: float) -> Iterator[str]:
    """In the block the last rank's gradients of one parameter are multiplied, in the last micro-batch; its
    name."""
    # Of what tensor-parallel ranks all hold, the norm is over the first one's: there only what is no number
    # is seen.
    replicated = engine.context.tensor.size > 1 and math.isnan(factor)
    of_layers = [(p, n) for p, n in engine._names.items() if n.startswith("layers.")]
    parameter, name = [(p, n) for p, n in of_layers if (shard_of(p) is None) is replicated][-1]
    passes = []

    def multiply(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(name)
        return gradient * (factor if len(passes) % engine.accumulation == 0 else 1.0)

    last = engine.context.rank == engine.context.world_size - 1
    hook = parameter.register_hook(multiply) if last else None
    if hook is not None:  # before all others: as if it had been computed so
        hooks = parameter._backward_hooks  # torch goes by the order of insertion
        others = [hooks.popitem(last=False) for _ in range(len(hooks) - 1)]
        hooks.update(others)
    yield name
    if hook is not None:
        hook.remove()


def state_of(engine: Engine) -> list[torch.Tensor]:
    """All that a step may move: working copies, masters, moments and step counts of this rank."""
    wrapped, tensors = engine._engine, [tensor for _, tensor in engine.gathered_parameters()]
    for part in _prepared_parts(wrapped, engine._names):  # not the padding of flat tensors, which is anything
        tensors += _tensors(part, wrapped).values()
        tensors.append(torch.as_tensor(wrapped.basic_optimizer.state[part.flat]["step"]))
    return [tensor.detach().clone() for tensor in tensors]


def guarded(case: Case, paths: dict[str, str], world: ParallelContext) -> tuple[Engine, list[Any], list[Any]]:
    """STEPS steps of which two are bad: the engine, verdicts, and what second looks found."""
    config, engine, own = open_engine(replace(case, guards=GUARDS), paths, world, STEPS)
    assert isinstance(own, TrainBatches)
    engine.ring.at_once = False
    results, found = [], []
    for step in range(STEPS):
        first_sample = own.consumed_samples
        with multiplied(engine, BAD.get(step, 1.0)) as name:
            before = state_of(engine)
            results.append(step_once(config, engine, own, step))
            if step in BAD:
                assert not results[-1].is_read
                assert all(map(torch.equal, state_of(engine), before)), f"{case}: step {step} moved something"
                found.append((name, engine.look_again(own.again(first_sample))))
    return engine, [result.verdict for result in results], found


def unguarded(case: Case, paths: dict[str, str], world: ParallelContext) -> Engine:
    """The same steps without the bad ones."""
    config, engine, own = open_engine(case, paths, world, STEPS)
    assert isinstance(own, TrainBatches)
    for step in range(STEPS):
        if step in BAD:
            own.pass_over()
        else:
            step_once(config, engine, own, step)
    return engine


def compare_cases(cases: list[Case], paths: dict[str, str]) -> list[tuple[Case, list[Any], list[Any]]]:
    """On every rank: both of every case, whose states must be equal to the last bit."""
    results = []
    with ParallelContext.start(cases[0].config(paths).parallel) as world:
        for case in cases:
            engine, verdicts, found = guarded(case, paths, world)
            expected = unguarded(case, paths, world)
            states = state_of(engine), state_of(expected)
            assert len(states[0]) == len(states[1]) > 10
            for one, other in zip(*states, strict=True):
                assert torch.equal(one, other), case
            results.append((case, verdicts, found))
    return results


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    prefix = tmp_path_factory.mktemp("data") / "shard"
    write_shard(prefix)
    return {"prefix": str(prefix)}


def check(cases: list[Case], paths: dict[str, str]) -> None:
    of_ranks = run_ranks(compare_cases, 2, cases, paths)
    for case, verdicts, found in of_ranks[1]:
        assert verdicts == VERDICTS
        (name, of_nan), (_, of_spike) = found
        assert of_nan == [NotFinite(1, (case.accumulation - 1,), (name,))]
        assert of_spike == []


def of_grid(cases: list[Case]) -> list[list[Case]]:
    return [[case for case in cases if case.grid == grid] for grid in sorted({case.grid for case in cases})]


@pytest.mark.slow
@pytest.mark.parametrize("cases", of_grid(CASES), ids=lambda cases: str(cases[0].grid))
def test_a_step_left_out_moves_nothing(cases: list[Case], paths: dict[str, str]) -> None:
    check(cases, paths)


def trained_around(case: Case, paths: dict[str, str], folder: Path) -> list[float]:
    """On every rank: losses of all but the bad steps; weights are left in ``folder``."""
    with ParallelContext.start(case.config(paths).parallel) as world:
        config, engine, own = open_engine(replace(case, guards=GUARDS), paths, world, STEPS)
        results = []
        for step in range(STEPS):
            with multiplied(engine, BAD.get(step, 1.0)):
                results.append(step_once(config, engine, own, step))
        engine.save(folder, SAVE)
    return [result.loss for result in results if result.verdict is Verdict.TRAINED]


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_what_remains_is_what_one_process_trains(case: Case, paths: dict[str, str], tmp_path: Path) -> None:
    """Of plain torch, which reads the batches left out and makes nothing of them."""
    one = Case(solver=case.solver)
    losses, _, _, weights = train_alone(one, paths, steps=STEPS, of=STEPS, left_out=BAD)
    found = run_ranks(trained_around, 2, case, paths, tmp_path)
    assert found[0] == found[1] == pytest.approx(losses, rel=1e-5)
    with FragmentReader(tmp_path, SAVE) as reader:
        assert reader.parameters.keys() == weights.keys()
        for name, weight in weights.items():
            difference = (read_full(reader, name) - weight).abs().max()
            assert difference <= 1e-5 * weight.abs().max(), name


@pytest.mark.long
@pytest.mark.parametrize("cases", of_grid(MORE_CASES), ids=lambda cases: str(cases[0].grid))
def test_a_step_left_out_moves_nothing_in_more_layouts(cases: list[Case], paths: dict[str, str]) -> None:
    check(cases, paths)
