#!/usr/bin/env python
"""Is the demo's IIET better than Transformer++ of the same size?

Trains both through the DeepSpeed launcher with the demo's configuration: same parameters (but for the
solver's own), data order, steps, seeds and embedding scale. Prints validation loss and wall time of each run
and the ratios, writes them as JSON and draws the curves. Complete runs are reused, broken ones resume.

    python benchmarks/compare_demo.py --output-dir runs/demo-compare --seeds 1234 1235 [--training.steps 200]

Unknown flags go to pretrain_iiet.py for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_iiet.config import config_from_file
from megatron_iiet.evaluation.curves import plot_losses
from megatron_iiet.training.metrics import read_log

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples/configs/demo.yaml"
SYSTEMS = {"iiet": [], "euler": ["--solver.kind", "euler"]}


def train(folder: Path, ranks: int, flags: list[str]) -> None:
    """One run in ``folder``, unless it is complete already."""
    done = folder / ".trained"
    if done.exists():
        return
    command = [
        *("deepspeed", "--num_accelerators", str(ranks), str(ROOT / "pretrain_iiet.py")),
        *("--config", str(CONFIG), "--ds-config", str(ROOT / "examples/ds_configs/zero1.json")),
        *("--output_dir", str(folder), *flags),
    ]
    print("+", " ".join(command), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("a") as console:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        failed = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=environment).returncode
    if failed:
        sys.exit(f"error: training in {folder} ended with status {failed}; see {console.name}")
    done.touch()


def measure(folder: Path) -> dict[str, float]:
    """Final validation loss in nats per token, wall time from first to last step in seconds, tokens/s."""
    log = read_log(folder)
    last = max(s for s, values in log.items() if "validation_loss" in values)
    rates = [values["tokens_per_second"] for values in log.values() if "tokens_per_second" in values]
    return {
        "validation_loss": log[last]["validation_loss"],
        "wall_seconds": log[last]["time"] - log[0]["time"],
        "tokens_per_second": statistics.median(rates),
    }


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    """Train, compare, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235, 1236])
    parser.add_argument("--ranks", type=int, default=2)
    arguments, flags = parser.parse_known_args()
    output = Path(arguments.output_dir)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for seed in arguments.seeds:  # systems interleaved: what the machine does meanwhile hits both
        for name, solver_flags in SYSTEMS.items():
            folder = output / f"{name}-seed{seed}"
            train(folder, arguments.ranks, ["--training.seed", str(seed), *solver_flags, *flags])
            results[name].append(measure(folder))

    solver = config_from_file(output / f"iiet-seed{arguments.seeds[0]}" / "config.yaml").solver
    labels = {"iiet": f"IIET ({solver.variant}, r = {solver.iterations})", "euler": "Transformer++ (euler)"}
    print(f"\n{'system':28} {'seed':>6} {'validation loss':>16} {'wall time':>10} {'tokens/s':>9}")
    for name, rows in results.items():
        for seed, row in zip(arguments.seeds, rows, strict=True):
            print(
                f"{labels[name]:28} {seed:6d} {row['validation_loss']:16.4f} {row['wall_seconds']:8.0f} s "
                f"{row['tokens_per_second']:9,.0f}"
            )
    losses = {name: [row["validation_loss"] for row in rows] for name, rows in results.items()}
    walls = {name: sum(row["wall_seconds"] for row in rows) for name, rows in results.items()}
    for name in SYSTEMS:
        print(f"{labels[name]:28} mean validation loss {spread(losses[name])}")
    differences = [a - b for a, b in zip(losses["iiet"], losses["euler"], strict=True)]
    winner = labels["iiet" if statistics.mean(differences) < 0 else "euler"]
    print(
        f"IIET − Transformer++ per seed: {spread(differences)} nats; lower: {winner}. "
        f"Wall time ratio IIET / Transformer++: {walls['iiet'] / walls['euler']:.2f}"
    )
    (output / "results.json").write_text(json.dumps({"seeds": arguments.seeds, **results}, indent=2) + "\n")
    first = arguments.seeds[0]
    plot_losses({labels[name]: output / f"{name}-seed{first}" for name in SYSTEMS}, output / "losses.png")
    print(f"wrote {output / 'results.json'} and {output / 'losses.png'}")


if __name__ == "__main__":
    main()
