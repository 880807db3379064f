#!/usr/bin/env python
"""Is the demo's IIET better than Transformer++ of the same size, and is it the iterations?

Trains both through the DeepSpeed launcher with the demo's configuration: same parameters (but for the
solver's own), data order, steps, hyperparameters and seeds; and the same IIET without corrector iterations,
the control that keeps the answer honest. Prints validation loss and wall time of each run, the differences
and the ratios, writes them as JSON and draws the curves. Complete runs are reused, broken ones resume.

    python benchmarks/compare_demo.py --output-dir runs/demo-compare --seeds 1234 1235 [--training.steps 200]

Unknown flags go to pretrain_iiet.py for all systems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_iiet.training.curves import plot_losses
from megatron_iiet.training.metrics import incomparable, read_log
from megatron_iiet.training.summary import check_complete

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples/configs/demo.yaml"
SYSTEMS = {
    "iiet": ("the demo's IIET", []),
    "euler": ("Transformer++", ["--solver.kind", "euler"]),
    "iiet-r0": ("the same IIET with r = 0", ["--solver.iterations", "0"]),
}


def train(folder: Path, ranks: int, flags: list[str]) -> None:
    """One run in ``folder``, unless it is complete already; the run's own record says whether it is, for a
    launcher that lost its ranks may end with 0."""
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
    with (folder / "console.log").open("a", encoding="utf-8") as console:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        status = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=environment).returncode
    try:
        check_complete(folder)
    except ValueError as error:
        sys.exit(f"error: {error} (its launcher's status is {status}; see {console.name})")
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


def report(results: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    """The table, and what the demo's IIET gains over each other system, seed by seed."""
    lines = [f"{'system':36} {'seed':>6} {'validation loss':>16} {'wall time':>10} {'tokens/s':>9}"]
    for name, rows in results.items():
        lines += [
            f"{SYSTEMS[name][0]:36} {seed:6d} {row['validation_loss']:16.4f} {row['wall_seconds']:8.0f} s "
            f"{row['tokens_per_second']:9,.0f}"
            for seed, row in zip(seeds, rows, strict=True)
        ]
    ours = results["iiet"]
    for name, rows in list(results.items())[1:]:
        losses = [a["validation_loss"] - b["validation_loss"] for a, b in zip(ours, rows, strict=True)]
        walls = [a["wall_seconds"] / b["wall_seconds"] for a, b in zip(ours, rows, strict=True)]
        lower = SYSTEMS["iiet" if statistics.mean(losses) < 0 else name][0]
        lines.append(
            f"the demo's IIET − {SYSTEMS[name][0]}: {spread(losses)} nats (lower: {lower}), "
            f"{statistics.mean(walls):.2f} × the wall time"
        )
    return "\n".join(lines)


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235])
    parser.add_argument("--ranks", type=int, default=2)
    arguments, flags = parser.parse_known_args()
    output = Path(arguments.output_dir)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for seed in arguments.seeds:  # systems interleaved: what the machine does meanwhile hits all
        for name, (_, solver_flags) in SYSTEMS.items():
            folder = output / f"{name}-seed{seed}"
            train(folder, arguments.ranks, ["--training.seed", str(seed), *flags, *solver_flags])
            results[name].append(measure(folder))
    if found := incomparable({str(f): read_log(f) for f in output.glob("*-seed*")}):
        sys.exit(f"error: {found}; train those of one rule anew")
    print(report(results, arguments.seeds))
    (output / "results.json").write_text(
        json.dumps({"seeds": arguments.seeds, **results}, indent=2) + "\n", encoding="utf-8"
    )
    first = arguments.seeds[0]
    plot_losses(
        {label: output / f"{n}-seed{first}" for n, (label, _) in SYSTEMS.items()}, output / "losses.png"
    )
    print(f"wrote {output / 'results.json'} and {output / 'losses.png'}")


if __name__ == "__main__":
    main()
