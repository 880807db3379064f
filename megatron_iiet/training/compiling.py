"""training.compile: where compiled code is kept, and how long compiling took."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run

FOLDER = "compiled"
"""In the run's folder, unless the environment names another."""
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def prepare_compiling(config: RunConfig, device: torch.device) -> None:
    """Before anything is compiled: have torch keep what it compiles, so that a restart need not again.

    Raises:
        ConfigError: there is nothing to compile with.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"training.compile is {config.training.compile}, but there is no C++ compiler '{compiler}' to "
            "compile with on a CPU; install one, name it in CXX, or set training.compile to off"
        )
    if os.environ.get(_VARIABLE) in (None, default_cache_dir()):  # torch sets its default when it looks
        os.environ[_VARIABLE] = str(Path(config.output_dir).absolute() / FOLDER)


class CompileTime(Callback):
    """Says after a step how long this rank compiled in it, and before it."""

    def __init__(self) -> None:
        self._started = self._seconds = 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._started

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._seconds:
            run.say(
                f"step {run.step:>6} | compiled F in {self._seconds:.1f} s; kept in {os.environ[_VARIABLE]}"
            )
        self._seconds = 0.0

    def on_end(self, run: Run) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
