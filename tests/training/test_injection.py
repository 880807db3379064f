"""What a run brings upon itself by ``debug.inject``: on the rank and at the step that are named, and nowhere
else."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet.storage.fragments import MASTER
from megatron_iiet.training import faults as faults_module
from megatron_iiet.training.faults import Faults
from megatron_iiet.training.run import Run


@pytest.fixture(autouse=True)
def _first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def a_run(step: int = 0) -> Any:
    """Of a model with a parameter that does not learn, and of two parameters' moments."""
    frozen, learned = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)
    fragments = [
        SimpleNamespace(name=name, tensors={MASTER: torch.ones(2, 2)})
        for name in ("layers.0.ffn.up", "layers.0.norm.weight", "norm.weight")
    ]
    engine = SimpleNamespace(model=torch.nn.Sequential(frozen, learned), fragments=lambda: fragments)
    return SimpleNamespace(step=step, engine=engine)


def steps(faults: Faults, run: Any, number: int) -> list[bool]:
    """Take steps; whether the gradients of each were numbers."""
    found = []
    for _ in range(number):
        run.engine.model.zero_grad()
        run.engine.model(torch.ones(1, 2)).sum().backward()
        gradients = [p.grad for p in run.engine.model.parameters() if p.grad is not None]
        assert len(gradients) == 2
        assert gradients[1].isfinite().all(), "those of the first parameter that learns alone"
        found.append(bool(gradients[0].isfinite().all()))
        run.step += 1
        faults.on_step(cast(Run, run), cast(Any, None))
    return found


def test_gradients_are_no_numbers_in_one_step() -> None:
    for inject, step, finite in (
        (["nan@step=1"], 0, [False, True, True]),
        (["nan@step=2", "nan@step=3,rank=1"], 0, [True, False, True]),
        (["nan@step=8", "nan@step=9"], 7, [False, False, True]),
    ):
        faults, run = Faults(inject, 0), a_run(step)
        faults.on_start(run)
        assert steps(faults, run, 3) == finite


def test_signals_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(faults_module.os, "kill", lambda *arguments: sent.append(arguments))
    faults, run = Faults(["kill@step=2,rank=3", "stop@step=3,rank=3", "raise@step=4,rank=3"], 3), a_run()
    faults.on_start(run)
    assert sent == []
    steps(faults, run, 2)
    assert sent == [(os.getpid(), signal.SIGKILL), (os.getpid(), signal.SIGSTOP)]
    with pytest.raises(RuntimeError, match=r"^debug.inject: a callback raises before step 4$"):
        steps(faults, run, 1)


def test_a_weight_drifts() -> None:
    faults, run = Faults(["drift@step=1"], 0), a_run()
    faults.on_start(run)
    masters = [fragment.tensors[MASTER].flatten().tolist() for fragment in run.engine.fragments()]
    assert masters == [[1, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]]


def test_other_ranks_and_later_starts_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [f"{kind}@step=1,rank=1" for kind in ("kill", "stop", "raise", "nan", "drift")]
    for rank, restarts in ((0, "0"), (1, "1")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        run = a_run()
        Faults(every, rank).on_start(run)
        assert all((fragment.tensors[MASTER] == 1).all() for fragment in run.engine.fragments())


def test_disks_that_are_slow_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(faults_module.time, "sleep", slept.append)
    run = a_run()
    Faults(["slow_disk@seconds=0.5", "slow_disk@step=4,seconds=2", "enospc@step=6"], 0).on_start(run)
    for step in (2, 4):
        run.before_write(tmp_path, step)
    assert slept == [0.5, 0.5, 2.0]
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as told:
        run.before_write(tmp_path, 6)
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_one_bit_is_flipped_in_the_rank_s_file(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank_{rank:05d}.safetensors").write_bytes(b"\0\1\2\3")
    run = a_run()
    Faults(["flip@step=4,rank=1"], 1).on_start(run)
    run.after_commit(tmp_path, 2)
    assert (tmp_path / "rank_00001.safetensors").read_bytes() == b"\0\1\2\3"
    run.after_commit(tmp_path, 4)
    assert (tmp_path / "rank_00001.safetensors").read_bytes() == b"\0\1\2\2"
    assert (tmp_path / "rank_00000.safetensors").read_bytes() == b"\0\1\2\3"
