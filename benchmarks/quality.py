#!/usr/bin/env python
"""Which system learns better, at equal parameters, tokens, FLOPs and time? Trains them all at one small size.

    quality.py prepare --train-text T.jsonl.zst --validation-text V.jsonl.zst   tokenizer and shards
    quality.py train [sweep] [ablations] [main] [--jobs 2] [--minutes 120]      what is not trained yet
    quality.py speed                                                            tokens/s, on a quiet machine
    quality.py report                                                           tables, picture, results.json

All trials of a seed see the same batches in the same order, start from the same decoder weights and have the
same hyperparameters, but for the learning rate, which the sweep chooses for each system by itself. A trial is
one process with one thread (`--jobs` of them at a time), started as `pretrain_iiet.py`; what was interrupted
is resumed from its newest checkpoint, and a trial that is 0.3 nats behind Transformer++ at a quarter of its
steps is given up. `--minutes` ends the command in time: trials in progress are stopped and resume the next
time. Several commands may work in one folder at once, on several machines too; `--results` takes the
results of another folder as trained.

Systems, phases and the shape of the model are in quality_trials.py.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quality_report import (
    Result,
    best_rates,
    load_results,
    plot,
    read_results,
    report,
    save_results,
    sweep_losses,
)
from quality_trials import BASE, READINGS, SYSTEMS, TOKENS_A_STEP, Trial, ablations, main_table, named, sweep

from megatron_iiet.config import strict_yaml
from megatron_iiet.training.metrics import read_log

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIG = ROOT / "examples/ds_configs/zero1.json"
HOPELESS = 0.3
"""Nats behind Transformer++ at a quarter of the steps."""


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

    def train(self, trials: list[Trial], jobs: int) -> bool:
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
        """End the trials in progress; they keep their newest checkpoint."""
        with self._lock:
            self._stopping = True
            for child in self._children:
                child.terminate()

    def _work(self, queue: Iterator[Trial]) -> None:
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

    def _train(self, trial: Trial, folder: Path) -> None:
        started = time.time()
        (folder / "trial.yaml").write_text(strict_yaml.dump(trial.config(dict(self.data), str(folder))))
        quarter = trial.steps // 4
        reference = self.output / "trials" / Trial("euler", trial.lr, trial.seed, trial.steps).name
        judged = trial.system != "euler" and reference.joinpath(".trained").exists()
        if judged and validation_at(folder, quarter) is None and not self._run(folder, stop_after=quarter):
            return
        if judged:
            behind = (validation_at(folder, quarter) or 0.0) - (validation_at(reference, quarter) or 0.0)
            if behind > HOPELESS:
                (folder / ".given-up").write_text(
                    f"{behind:.3f} nats behind Transformer++ at step {quarter}\n"
                )
                self._finished += 1
                print(f"{trial.name}: given up, {behind:.3f} nats behind Transformer++", flush=True)
                return
        if not self._run(folder, stop_after=trial.steps):
            return
        (folder / ".trained").touch()
        self._finished += 1
        loss = validation_at(folder, trial.steps)
        print(f"{trial.name}: {loss:.4f} in {(time.time() - started) / 60:.1f} min", flush=True)

    def _run(self, folder: Path, stop_after: int) -> bool:
        command = [
            *(sys.executable, str(ROOT / "pretrain_iiet.py"), "--config", str(folder / "trial.yaml")),
            *("--ds-config", str(DS_CONFIG), "--training.stop_after", str(stop_after)),
        ]
        with (folder / "console.log").open("ab") as console, self._lock:
            if self._stopping:
                return False
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def trials_of(phase: str, results: list[Result], best: str) -> list[Trial]:
    """The trials of a phase, most wanted first."""
    if phase == "sweep":
        return sweep(sweep_losses(results))
    rates = best_rates(results)
    if "euler" not in rates:
        sys.exit("error: there is no learning rate yet; run `quality.py train sweep` first")
    return main_table(rates, best) if phase == "main" else ablations(rates)


def measure_speed(output: Path, data: dict[str, str], systems: list[str]) -> None:
    """Tokens/s of each system, one process, one thread, the best of interleaved rounds; to speed.json."""
    rounds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(3):
        for name in systems:
            folder = output / "speed" / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            trial: dict[str, Any] = Trial(name, 1e-3, 1, 24).config(dict(data), str(folder))
            trial["evaluation"] = {"interval": 0, "samples": 1}
            trial["logging"] |= {"interval": 12, "solver_interval": 0}
            (folder / "trial.yaml").write_text(strict_yaml.dump(trial))
            runner = Runner(output, data, float("inf"))
            if not runner._run(folder, 24):
                sys.exit(1)
            seconds = [
                values["step_seconds"] for values in read_log(folder).values() if "step_seconds" in values
            ]
            rounds[name].append(TOKENS_A_STEP / sorted(seconds)[len(seconds) // 4])
    speeds = {name: max(values) for name, values in rounds.items()}
    (output / "speed.json").write_text(json.dumps(speeds, indent=2) + "\n")
    for name, speed in speeds.items():
        print(f"{SYSTEMS[name].label:45} {speed:8,.0f} tokens/s")


def write_report(output: Path, earlier: list[Result], speeds: dict[str, float]) -> None:
    """Print the tables of a folder's trials and the ``earlier`` ones; leave report.md, curves.png and
    results.json in the folder."""
    output.mkdir(parents=True, exist_ok=True)
    results = read_results(output, earlier)
    path = output / "speed.json"
    speeds = json.loads(path.read_text()) if path.exists() else speeds
    save_results(results, speeds, output / "results.json")
    text = report(results, speeds)
    print(text)
    (output / "report.md").write_text(text)
    plot(results, speeds, output / "curves.png")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "train", "speed", "report"))
    parser.add_argument("phases", nargs="*", help="of train: sweep, ablations, main")
    parser.add_argument("--output-dir", default="runs/quality", type=Path, metavar="DIR")
    parser.add_argument("--train-text", metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--validation-text", metavar="FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", choices=SYSTEMS, help="these systems")
    parser.add_argument(
        "--results", type=Path, metavar="JSON", help="results.json of another folder: not trained again"
    )
    parser.add_argument("--best", choices=READINGS, default="rms", help="reading of IIET")
    arguments = parser.parse_args()
    output = arguments.output_dir
    earlier, speeds = load_results(arguments.results) if arguments.results else ([], {})
    if arguments.command == "prepare":
        if not (arguments.train_text and arguments.validation_text):
            parser.error("prepare needs --train-text and --validation-text")
        prepare(output / "data", arguments.train_text, arguments.validation_text)
    elif arguments.command == "report":
        write_report(output, earlier, speeds)
    elif arguments.command == "speed":
        measure_speed(output, data_keys(output / "data"), arguments.only or list(SYSTEMS))
    else:
        runner = Runner(output, data_keys(output / "data"), time.time() + 60 * arguments.minutes)
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        try:
            for phase in arguments.phases or ("sweep", "ablations", "main"):
                while True:  # a sweep asks for more while the best rate is at an edge
                    results = read_results(output, earlier)
                    done = {result.trial.name for result in results}
                    trials = named(trials_of(phase, results, arguments.best)).values()
                    wanted = [
                        trial
                        for trial in trials
                        if trial.name not in done and trial.system in (arguments.only or SYSTEMS)
                    ]
                    if not wanted or not runner.train(wanted, arguments.jobs):
                        break
        except KeyboardInterrupt:
            runner.stop()
            sys.exit(130)


if __name__ == "__main__":
    main()
