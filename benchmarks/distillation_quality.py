#!/usr/bin/env python
"""What is left of an IIET with half of its evaluations, and is it its teacher's doing? E-IIET and controls.

    distillation_quality.py train [--teacher rms-two-stage] [--only e-iiet …] [--jobs 2] [--minutes 120]
    distillation_quality.py speed      tokens/s of generation and memory of the cache, on a quiet machine
    distillation_quality.py report     table and distillation_results.json

In the folder of benchmarks/quality.py, which prepares the data and trains the teachers (this trains those
that are missing): measures the influence of the teacher's iterations, makes the plan that keeps at most half
of its layer evaluations, and trains everything in distillation_trials.py for a third of the teacher's tokens,
on other batches than the teacher saw, all with one learning rate and the same batches. Resumable as that
benchmark is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distillation_trials import KEPT, MODELS, STUDENT_STEPS, TEACHER_STEPS, Student, plan_file
from inference_systems import cache_bytes
from inference_timing import Clock, decode, settings
from quality_report import best_rates, cpu_kind, load_results
from quality_runner import ROOT, Runner, data_keys, validation_at
from quality_trials import SEEDS, SYSTEMS, TOKENS_A_STEP, Trial, rate_of

from megatron_iiet.config import config_from_file, iterations_per_layer
from megatron_iiet.hf.generation import open_generator
from megatron_iiet.models import Transformer
from megatron_iiet.training.metrics import read_log

LR = 2e-3
"""Of every student; a quarter of the teachers', not tuned for any of them."""
SPEEDS = "distillation_speed.json"


def starts(system: str, seed: int, rates: dict[str, float]) -> dict[str, Trial]:
    """The trials that models start from, by the name that :class:`Model` gives them."""
    return {
        name: Trial(of, rate_of(rates, of), seed, TEACHER_STEPS)
        for name, of in {"iiet": system, "euler": "euler", "pcformer": "pcformer"}.items()
    }


def make_plan(output: Path, teacher: Trial) -> None:
    """Measure the influence of a teacher's iterations and write its plan, unless it is there."""
    plan = plan_file(output, teacher)
    if plan.exists():
        return
    command = [sys.executable, str(ROOT / "tools/iteration_influence.py"), "--output", str(plan.parent)]
    command += ["--model", str(output / "trials" / teacher.name), "--flops-ratio", str(KEPT)]
    command += ["--sequences", "64", "--ablation"]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
        sys.exit("error: tools/iteration_influence.py failed; its message is above")


def train(
    runner: Runner, output: Path, teachers: list[dict[str, Trial]], names: list[str], jobs: int
) -> None:
    """Whatever is missing of teachers, plans and students; all seeds of a model come one after another."""
    needed = dict.fromkeys(MODELS[name].start for name in names)
    runner.train([of[start] for start in needed for of in teachers], jobs)
    trained = [
        (name, of[MODELS[name].start])
        for name in names
        for of in teachers
        if (output / "trials" / of[MODELS[name].start].name / ".trained").exists()
    ]
    for teacher in dict.fromkeys(teacher for name, teacher in trained if MODELS[name].start == "iiet"):
        make_plan(output, teacher)
    runner.train([Student(name, teacher, LR, output) for name, teacher in trained], jobs)


def measured(folder: Path, steps: int) -> dict[str, Any] | None:
    """What a run's folder says of its model and training; None if it is not complete."""
    if not (folder / ".trained").exists():
        return None
    config = config_from_file(folder / "config.yaml")
    model, length = Transformer.on_meta(config), config.data.sequence_length
    log = read_log(folder)
    return {
        "start": validation_at(folder, 0),
        "loss": validation_at(folder, steps),
        "iterations": iterations_per_layer(config),
        "evaluations": sum(solver.evaluations for solver in model.solvers.values()),
        "flops_per_token": model.forward_flops(length) / length,
        "training_flops": sum(values.get("flops", 0.0) for values in log.values()),
        "teacher_flops": sum(values.get("teacher_flops", 0.0) for values in log.values()),
    }


def folders_of(output: Path, of: dict[str, Trial]) -> dict[str, Path]:
    """Where each model of a seed is."""
    students = {name: Student(name, of[model.start], LR, output).name for name, model in MODELS.items()}
    return {
        name: output / "trials" / run for name, run in ({k: t.name for k, t in of.items()} | students).items()
    }


def results(output: Path, teachers: list[dict[str, Trial]]) -> dict[str, dict[str, Any]]:
    """By model, then by seed and kind of CPU, what was measured; untrained models are absent."""
    cpu = cpu_kind()
    found: dict[str, dict[str, Any]] = {}
    for of in teachers:
        for start, trial in of.items():
            one = measured(output / "trials" / trial.name, trial.steps)
            if one is not None:
                found.setdefault(start, {"label": SYSTEMS[trial.system].label, "seeds": {}})
                found[start]["seeds"][f"{trial.seed} {cpu}"] = one
        for name, model in MODELS.items():
            student = Student(name, of[model.start], LR, output)
            one = measured(output / "trials" / student.name, student.steps)
            if one is not None:
                found.setdefault(name, {"label": model.label, "seeds": {}})
                found[name]["seeds"][f"{student.teacher.seed} {cpu}"] = one
    return found


def with_earlier(
    found: dict[str, dict[str, Any]], earlier: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Both; where they have the same, ``found``'s."""
    return {
        name: {
            "label": MODELS[name].label if name in MODELS else (found.get(name) or earlier[name])["label"],
            "seeds": {**earlier.get(name, {}).get("seeds", {}), **found.get(name, {}).get("seeds", {})},
        }
        for name in ("iiet", "euler", "pcformer", *MODELS)
        if name in found or name in earlier
    }


def measure_speed(output: Path, found: dict[str, dict[str, Any]], folders: dict[str, Path]) -> None:
    """Tokens/s of greedy decoding, one sequence, one thread, median time between tokens in the best of
    interleaved rounds; bytes of cache a token. To distillation_speed.json."""
    import torch

    torch.set_num_threads(1)
    models = {name: open_generator(str(folders[name])).model for name in found}
    prompt = torch.zeros(1, 32, dtype=torch.long)
    seconds = dict.fromkeys(models, float("inf"))
    for _ in range(4):
        for name, model in models.items():
            decode(model, prompt, settings("dynamic", 96), clock := Clock(prompt.device))
            between = [after - before for before, after in itertools.pairwise(clock.times[1:])]
            seconds[name] = min(seconds[name], statistics.median(between))
    speeds = {
        name: {"tokens_per_second": 1 / seconds[name], "cache": cache_bytes(models[name])} for name in models
    }
    (output / SPEEDS).write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, dict[str, Any]], speeds: dict[str, dict[str, float]]) -> str:
    """Loss against the full IIET, the share of its gain over Transformer++ that is kept, and what a model
    costs, as markdown."""
    names = (
        "model",
        "evaluations",
        "runs",
        "before",
        "validation loss",
        "perplexity",
        "− full IIET",
        "gain kept",
    )
    names = (*names, "training, TFLOP (its teacher)", "FLOPs a token", "tokens/s", "cache, bytes a token")
    lines = [_row(names), _row(["---"] * len(names))]
    full = {seed: one["loss"] for seed, one in found.get("iiet", {"seeds": {}})["seeds"].items()}
    plain = {seed: one["loss"] for seed, one in found.get("euler", {"seeds": {}})["seeds"].items()}
    for name, entry in found.items():
        seeds = entry["seeds"]
        losses = [one["loss"] for one in seeds.values()]
        relative = [one["loss"] / full[seed] - 1 for seed, one in seeds.items() if seed in full]
        # Of all runs together: a single run's gain may be near nothing.
        both = [seed for seed in seeds if seed in full and seed in plain]
        gain = sum(plain[seed] - full[seed] for seed in both)
        kept = [sum(plain[seed] - seeds[seed]["loss"] for seed in both) / gain] if gain > 0 else []
        starts_at = [one["start"] for one in seeds.values()]
        lines.append(
            _row(
                [
                    entry["label"],
                    "/".join(str(one["evaluations"]) for one in seeds.values()),
                    str(len(seeds)),
                    f"{statistics.mean(starts_at):.4f}",
                    _spread(losses, "{:.4f}"),
                    f"{math.exp(statistics.mean(losses)):.2f}",
                    _spread(relative, "{:+.2%}"),
                    _spread(kept, "{:.0%}"),
                    _training_cost(next(iter(seeds.values()))),
                    f"{next(iter(seeds.values()))['flops_per_token'] / 1e6:.2f} M",
                    f"{speeds[name]['tokens_per_second']:.1f}" if name in speeds else "",
                    f"{speeds[name]['cache']:,}" if name in speeds else "",
                ]
            )
        )
    return "\n".join(lines)


def _training_cost(one: dict[str, Any]) -> str:
    teacher = f" ({one['teacher_flops'] / 1e12:.0f})" if one["teacher_flops"] else ""
    return f"{one['training_flops'] / 1e12:.0f}{teacher}"


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("train", "speed", "report"))
    parser.add_argument("--output-dir", default="runs/quality", type=Path, metavar="DIR")
    parser.add_argument("--teacher", default="rms-r3", choices=SYSTEMS, metavar="SYSTEM", help="an IIET")
    parser.add_argument("--seeds", type=int, default=1, help=f"how many of {SEEDS}")
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks/quality_results.json",
        metavar="JSON",
        help="of benchmarks/quality.py, with the learning rates of the systems",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="JSON",
        help="distillation_results.json of another machine, whose runs count beside this one's in the report",
    )
    arguments = parser.parse_args()
    rates = best_rates(load_results(arguments.results)[0])
    teachers = [starts(arguments.teacher, seed, rates) for seed in SEEDS[: arguments.seeds]]
    output = arguments.output_dir.resolve()
    if arguments.command == "train":
        runner = Runner(output, data_keys(output / "data"), time.time() + 60 * arguments.minutes)
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        train(runner, output, teachers, arguments.only, arguments.jobs)
        return
    found = results(output, teachers)
    if not found:
        sys.exit(f"error: nothing is trained in {output}; run `distillation_quality.py train` first")
    if arguments.command == "speed":
        measure_speed(output, found, folders_of(output, teachers[0]))
        return
    speeds = json.loads((output / SPEEDS).read_text(encoding="utf-8")) if (output / SPEEDS).exists() else {}
    if arguments.earlier:
        found = with_earlier(found, json.loads(arguments.earlier.read_text(encoding="utf-8")))
    (output / "distillation_results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        f"students: {STUDENT_STEPS * TOKENS_A_STEP / 1e6:.1f} M tokens at lr {LR:g}\n\n{table(found, speeds)}"
    )


if __name__ == "__main__":
    main()
