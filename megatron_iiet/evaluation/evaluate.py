"""The whole way from a trained model to a table: check, load, run the tasks, print, write."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_iiet import __version__, durable
from megatron_iiet.evaluation.harness import HarnessModel, TaskResults, run_tasks
from megatron_iiet.evaluation.models import ModelOptions, PreparedModel, prepare_model
from megatron_iiet.evaluation.paper_table import all_metrics_table, mean_accuracy, paper_size, paper_table
from megatron_iiet.evaluation.tasks import (
    PAPER_TASKS,
    check_installed,
    check_known,
    find_data,
    load_tasks,
    task_names,
    without_own,
)
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment

RESULTS, REPORT = "results.json", "results.md"
VERSION = 1
"""Of results.json."""


@dataclass(frozen=True)
class Options:
    """What tools/evaluate.py was asked for."""

    model: ModelOptions
    tasks: tuple[str, ...] = ("paper",)
    data_dir: str = ""
    """Local data of the tasks; empty: from the hub."""
    limit: int | None = None
    """Rows of each task; None: all."""
    output: str = ""
    """Folder to write into; empty: ``evaluation`` in the model's folder."""
    include_path: str = ""
    """Folder of definitions of tasks of one's own."""


def evaluate_model(options: Options) -> TaskResults:
    """Check, run, and let the main rank print and write; the results, on every rank.

    Raises:
        ValueError: (and its subclass ConfigError) the model, its tokenizer, a task or its data cannot be
            used, or the grid fits neither the model nor the number of processes.
    """
    check_installed()
    names = task_names(options.tasks)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}, but must be at least 1")
    check_known(names, options.include_path)
    if options.data_dir:
        find_data(without_own(names, options.include_path), options.data_dir)
    folder = _output_folder(options)
    prepared = prepare_model(options.model, launch_environment().world_size)
    out = sys.stdout  # the harness's own lines are kept from it
    with ParallelContext.start(options.model.parallel) as context:

        def say(line: str) -> None:
            if context.is_main:
                print(line, file=out, flush=True)

        places = (options.data_dir, options.include_path, prepared.no_generation)
        tasks = _load_in_turn(names, *places, context)
        say(f"model: {prepared.description}: {prepared.system}, {options.model.precision}")
        generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values())
        scorer = prepared.load(context, generates)
        started = time.perf_counter()
        results = run_tasks(HarnessModel(scorer, prepared.codec, say), tasks, limit=options.limit)
        seconds = time.perf_counter() - started
        text = _report(options, prepared, results)
        say(f"{sum(results.rows.values()):,} rows of {len(names)} tasks in {seconds:.1f} s\n\n{text}")
        if context.is_main:
            data = _as_data(options, prepared, results, scorer.max_length, seconds)
            folder.mkdir(parents=True, exist_ok=True)
            durable.write_text(folder / RESULTS, json.dumps(data, indent=2) + "\n")
            durable.write_text(folder / REPORT, text + "\n")
            say(f"wrote {folder / RESULTS}, {folder / REPORT}")
        context.barrier()
    return results


def _output_folder(options: Options) -> Path:
    step = "" if options.model.step is None else f"step_{options.model.step:08d}"
    folder = Path(options.output) if options.output else Path(options.model.path) / "evaluation" / step
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output is {folder}, which is no folder; name another")
    return folder


def _load_in_turn(
    names: list[str], data_dir: str, include_path: str, no_generation: str, context: ParallelContext
) -> dict[str, Any]:
    """The first process of each host downloads what is to be downloaded, the others read its cache."""
    given = (names, data_dir, include_path, no_generation)
    tasks = load_tasks(*given) if context.local_rank == 0 else {}
    context.barrier()
    return tasks or load_tasks(*given)


def _report(options: Options, prepared: PreparedModel, results: TaskResults) -> str:
    """What is printed, and written as results.md."""
    lines = []
    if set(results.metrics) & {task.name for task in PAPER_TASKS}:
        size = paper_size(prepared.hidden_size, prepared.num_layers)
        lines += [paper_table(prepared.system, results.metrics, size), ""]
        if size is None:
            lines += ["The paper (arXiv 2509.22463) reports no model of this size.", ""]
        else:
            lines += [f"The paper's (arXiv 2509.22463) models of {size.name} saw {size.tokens} tokens.", ""]
    if options.limit is not None:
        lines += [
            f"Measured on the first {options.limit} rows of each task: no figures of the whole tasks.",
            "",
        ]
    return "\n".join([*lines, all_metrics_table(results.metrics, results.rows)])


def _as_data(
    options: Options, prepared: PreparedModel, results: TaskResults, max_length: int, seconds: float
) -> dict[str, Any]:
    size = paper_size(prepared.hidden_size, prepared.num_layers)
    return {
        "version": VERSION,
        "model": prepared.description,
        "system": prepared.system,
        "precision": options.model.precision,
        "max_length": max_length,
        "limit": options.limit,
        "tasks": {
            name: {
                "metrics": {key: v if math.isfinite(v) else None for key, v in values.items()},
                "rows": results.rows[name],
                "definition": results.versions.get(name),
            }
            for name, values in results.metrics.items()
        },
        "mean_accuracy": mean_accuracy(results.metrics),
        "paper": None
        if size is None
        else {
            "size": size.name,
            "systems": {
                row.system: {"perplexity": row.perplexity, "mean_accuracy_percent": row.mean_accuracy}
                for row in size.rows
            },
        },
        "seconds": round(seconds, 3),
        "software": {
            "megatron_iiet": __version__,
            "lm_eval": version("lm_eval"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }
