"""Trains the trials of the quality benchmarks in subprocesses, several at a time, and resumes them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from quality_trials import BASE

from megatron_iiet.config import strict_yaml
from megatron_iiet.training.metrics import read_log

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIG = ROOT / "examples/ds_configs/zero1.json"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Of a run: one thread, and a glibc that keeps freed memory, in huge pages: a tenth of the page faults, which
cost these small models a sixth of a step and more."""
HOPELESS = 0.3
"""Nats behind the trial to be judged by, at a quarter of the steps."""


class Run(Protocol):
    """What a :class:`Runner` trains."""

    @property
    def name(self) -> str:
        """Of its folder."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def script(self) -> str:
        """Script of the repository's root that trains it."""

    @property
    def judge(self) -> Run | None:
        """The run whose loss tells, if it is trained already, whether this one is hopeless."""

    def config(self, data: dict[str, Any], output_dir: str) -> dict[str, Any]:
        """The configuration as plain data; ``data``: keys of the data section."""


def prepare(data: Path, train_text: str, validation_text: str) -> None:
    """Tokenizer and shards, unless they are there."""
    data.mkdir(parents=True, exist_ok=True)
    tokenizer = data / "tokenizer.model"
    if not tokenizer.exists():
        _tool(
            "train_tokenizer.py",
            *("--input", train_text, "--output-prefix", str(data / "tokenizer")),
            *("--vocab-size", str(BASE["model"]["vocab_size"])),
        )
    for name, text in (("train", train_text), ("valid", validation_text)):
        if not (data / f"{name}_text_document.shards").exists():
            _tool(
                "preprocess_data.py",
                *("--input", text, "--output-prefix", str(data / name), "--tokenizer-model", str(tokenizer)),
                *("--append-eod", "--workers", str(os.cpu_count() or 1), "--overwrite"),
            )


def _tool(name: str, *arguments: str) -> None:
    if subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments]).returncode:
        sys.exit(f"error: tools/{name} failed; its message is above")


def data_keys(data: Path) -> dict[str, str]:
    """The data section's paths."""
    keys = {
        "prefix": str(data / "train_text_document"),
        "validation_prefix": str(data / "valid_text_document"),
        "tokenizer": str(data / "tokenizer.model"),
    }
    missing = [path for path in (keys["tokenizer"], keys["prefix"] + ".shards") if not Path(path).exists()]
    if missing:
        sys.exit(f"error: {missing[0]} is missing; run `quality.py prepare` first")
    return keys


class Runner:
    """Trains trials in subprocesses until there are none left or time is up."""

    def __init__(self, output: Path, data: dict[str, str], deadline: float) -> None:
        self.output, self.data, self.deadline = output, data, deadline
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._finished = 0

    def train(self, trials: Sequence[Run], jobs: int) -> bool:
        """All trials, ``jobs`` at a time, in order; whether at least one of them was finished."""
        self._finished = 0
        queue = iter(trials)
        workers = [threading.Thread(target=self._work, args=(queue,), daemon=True) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(1)
            if time.time() > self.deadline and not self._stopping:
                print(
                    "time is up: stopping; the same command goes on from the newest checkpoints", flush=True
                )
                self.stop()
        return self._finished > 0

    def stop(self) -> None:
        """End the trials in progress, each with a checkpoint after its current step."""
        with self._lock:
            self._stopping = True
            for child in self._children:
                child.send_signal(signal.SIGUSR1)

    def _work(self, queue: Iterator[Run]) -> None:
        while True:
            with self._lock:
                trial = None if self._stopping else next(queue, None)
            if trial is None:
                return
            folder = self.output / "trials" / trial.name
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder) as mine:
                if mine and not any((folder / mark).exists() for mark in (".trained", ".given-up")):
                    self._train(trial, folder)

    def _train(self, trial: Run, folder: Path) -> None:
        started = time.time()
        config = strict_yaml.dump(trial.config(dict(self.data), str(folder)))
        (folder / "trial.yaml").write_text(config, encoding="utf-8")
        quarter = trial.steps // 4
        reference = None if trial.judge is None else self.output / "trials" / trial.judge.name
        if reference is not None and reference.joinpath(".trained").exists():
            if validation_at(folder, quarter) is None and not self.run(trial, folder, quarter):
                return
            behind = (validation_at(folder, quarter) or 0.0) - (validation_at(reference, quarter) or 0.0)
            if behind > HOPELESS:
                (folder / ".given-up").write_text(
                    f"{behind:.3f} nats behind {reference.name} at step {quarter}\n",
                    encoding="utf-8",
                )
                self._finished += 1
                print(f"{trial.name}: given up, {behind:.3f} nats behind", flush=True)
                return
        if not self.run(trial, folder, trial.steps):
            return
        loss = validation_at(folder, trial.steps)
        if loss is None:  # stopped from outside
            return
        (folder / ".trained").touch()
        self._finished += 1
        print(f"{trial.name}: {loss:.4f} in {(time.time() - started) / 60:.1f} min", flush=True)

    def run(self, trial: Run, folder: Path, stop_after: int) -> bool:
        command = [
            *(sys.executable, str(ROOT / trial.script), "--config", str(folder / "trial.yaml")),
            *("--ds-config", str(DS_CONFIG), "--training.stop_after", str(stop_after)),
        ]
        with (folder / "console.log").open("ab") as console, self._lock:
            if self._stopping:
                return False
            environment = {**os.environ, **ENVIRONMENT}
            child = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=environment)
            self._children.add(child)
        status = child.wait()
        with self._lock:
            self._children.discard(child)
        if status and not self._stopping:
            print(f"{folder.name}: ended with status {status}, see {folder / 'console.log'}", flush=True)
        return status == 0


def validation_at(folder: Path, step: int) -> float | None:
    """Validation loss of a run after a step; None if it is not there."""
    if not (folder / "log.jsonl").exists():
        return None
    return read_log(folder).get(step, {}).get("validation_loss")


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process may work on the trial; another one that does has the lock."""
    with (folder / ".lock").open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
