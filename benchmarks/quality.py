#!/usr/bin/env python
"""Which system learns better, at equal parameters, tokens, FLOPs and time? Trains them all at one small size.

    quality.py prepare --train-text T.jsonl.zst --validation-text V.jsonl.zst   tokenizer and shards
    quality.py train [sweep] [ablations] [main] [--jobs 2] [--minutes 120]      what is not trained yet
    quality.py train optimizers                                                 AdamW and Muon, 0.66 M tokens
    quality.py speed                                tokens/s of the main table's systems, on a quiet machine
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
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from quality_report import (
    Result,
    best_rates,
    cpu_kind,
    load_results,
    plot,
    read_results,
    report,
    save_results,
    sweep_losses,
)
from quality_runner import Runner, data_keys, prepare
from quality_trials import (
    BRIEF,
    READINGS,
    SYSTEMS,
    TOKENS_A_STEP,
    Trial,
    ablations,
    main_table,
    named,
    optimizers,
    sweep,
)

from megatron_iiet.config import strict_yaml
from megatron_iiet.training.metrics import read_log

PHASES = ("sweep", "ablations", "main", "optimizers")
"""Of training, in this order unless the command line says otherwise."""


def trials_of(phase: str, results: list[Result], best: str) -> list[Trial]:
    """The trials of a phase, most wanted first."""
    if phase == "sweep":
        return sweep(sweep_losses(results))
    if phase == "optimizers":
        return optimizers(sweep_losses(results, BRIEF))
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
            trial = Trial(name, 1e-3, 1, 24)
            settings: dict[str, Any] = trial.config(dict(data), str(folder))
            settings["evaluation"] = {"interval": 0, "samples": 1}
            settings["logging"] |= {"interval": 12, "solver_interval": 0}
            (folder / "trial.yaml").write_text(strict_yaml.dump(settings), encoding="utf-8")
            if not Runner(output, data, float("inf")).run(trial, folder, 24):
                sys.exit(1)
            seconds = [
                values["step_seconds"] for values in read_log(folder).values() if "step_seconds" in values
            ]
            rounds[name].append(TOKENS_A_STEP / sorted(seconds)[len(seconds) // 4])
    speeds = {name: max(values) for name, values in rounds.items()}
    (output / "speed.json").write_text(json.dumps(speeds, indent=2) + "\n", encoding="utf-8")
    for name, speed in speeds.items():
        print(f"{SYSTEMS[name].label:45} {speed:8,.0f} tokens/s")


def write_report(output: Path, earlier: list[Result], speeds: dict[str, float]) -> None:
    """Print the tables of a folder's trials and the ``earlier`` ones; leave report.md, curves.png and
    results.json in the folder."""
    results = read_results(output, earlier)
    if not results:
        sys.exit(f"error: {output} has no complete trial yet; run `quality.py train` first")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "speed.json"
    speeds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else speeds
    save_results(results, speeds, output / "results.json")
    text = report(results, speeds)
    print(text)
    (output / "report.md").write_text(text, encoding="utf-8")
    plot(results, speeds, output / "curves.png")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "train", "speed", "report"))
    parser.add_argument("phases", nargs="*", help=f"of train: {', '.join(PHASES)}")
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
    for phase in set(arguments.phases) - set(PHASES):
        parser.error(f"there is no phase {phase!r}; choose from {', '.join(PHASES)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; at least one trial has to run at a time")
    output = arguments.output_dir
    earlier, speeds = load_results(arguments.results) if arguments.results else ([], {})
    if arguments.command == "prepare":
        if not (arguments.train_text and arguments.validation_text):
            parser.error("prepare needs --train-text and --validation-text")
        prepare(output / "data", arguments.train_text, arguments.validation_text)
    elif arguments.command == "report":
        write_report(output, earlier, speeds)
    elif arguments.command == "speed":
        systems = arguments.only or list(
            dict.fromkeys(
                trial.system for trial in trials_of("main", read_results(output, earlier), arguments.best)
            )
        )
        measure_speed(output, data_keys(output / "data"), systems)
    else:
        runner = Runner(output, data_keys(output / "data"), time.time() + 60 * arguments.minutes)
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        try:
            for phase in arguments.phases or PHASES:
                while True:  # a sweep asks for more while the best rate is at an edge
                    results = read_results(output, earlier)
                    done = {
                        result.trial.name
                        for result in results
                        if phase != "ablations" or result.cpu == cpu_kind()  # single runs: all on one kind
                    }
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
