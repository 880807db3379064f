"""Brings the faults of ``debug.inject`` upon this process: real signals, real gradients, real files."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_iiet.config.injection import Injection
from megatron_iiet.parallel.launch import restarts
from megatron_iiet.storage.fragments import MASTER
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run


class Faults(Callback):
    """The last callback of a run: what it does after a step is before the next one."""

    def __init__(self, injections: Sequence[str], rank: int) -> None:
        own = [each for each in map(Injection.read, injections) if each.rank == rank]
        self._own = [] if restarts() else own  # restarts are to go on
        self._poisoned: Any = None

    def on_start(self, run: Run) -> None:
        run.before_write, run.after_commit = self._before_write, self._after_commit
        self._before_step(run, run.step + 1)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._poisoned is not None:
            self._poisoned.remove()
            self._poisoned = None
        self._before_step(run, run.step + 1)

    def _before_step(self, run: Run, step: int) -> None:
        for each in self._own:
            if each.step != step:
                continue
            if each.kind in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if each.kind == "kill" else signal.SIGSTOP)
            elif each.kind == "raise":
                raise RuntimeError(f"debug.inject: a callback raises before step {step}")
            elif each.kind == "nan":
                parameter = next(p for p in run.engine.model.parameters() if p.requires_grad)
                self._poisoned = parameter.register_hook(lambda gradient: gradient * float("nan"))
            elif each.kind == "drift":
                of_a_norm = next(f for f in run.engine.fragments() if f.name.endswith("norm.weight"))
                of_a_norm.tensors[MASTER].view(-1)[0] += 1.0

    def _before_write(self, folder: Path, step: int) -> None:
        """In the thread that is about to write this rank's part of a checkpoint."""
        for each in self._own:
            if each.kind == "slow_disk" and each.step in (None, step):
                time.sleep(each.seconds)
            elif each.kind == "enospc" and each.step == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def _after_commit(self, folder: Path, step: int) -> None:
        """Once a checkpoint is in force."""
        for each in self._own:
            if each.kind == "flip" and each.step == step:
                file = folder / f"rank_{each.rank:05d}.safetensors"
                with file.open("r+b") as stream:
                    stream.seek(-1, os.SEEK_END)
                    last = stream.read(1)[0]
                    stream.seek(-1, os.SEEK_END)
                    stream.write(bytes([last ^ 1]))
