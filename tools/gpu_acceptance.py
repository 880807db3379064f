#!/usr/bin/env python
"""Prove this machine's GPU in ten minutes: what holds, with figures against the machine's own limits.

    python tools/gpu_acceptance.py --output gpu-report [--minutes 9] [--only kernels bandwidth]
    python tools/gpu_acceptance.py --output toy --device cpu --toy        # every check, small, without a GPU

Each check runs in a process of its own and none stops the others: a crash, a hang or a missing package ends
that check only. The most telling ones come first, and the last one uses up the time. The folder gets
report.md and report.json with every figure and its bound, each check's log, and pictures (see docs/gpu.md).

Exit status: 0 nothing failed (a check that could not run here is no failure, and is told), 1 a check failed,
2 the arguments do not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from gpu_checks import CHECKS  # noqa: E402
from gpu_checks.base import OUTCOME, SO_FAR, Setting, outcome_of  # noqa: E402
from gpu_checks.runner import Options, run_checks  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu-report"), metavar="FOLDER", help="where the report goes")
    add("--minutes", type=float, default=9.0, metavar="N", help="for all checks together")
    add("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"some of {', '.join(CHECKS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the checks, with --toy")
    add("--toy", action="store_true", help="sizes for a CPU: whether the checks work, no figure of speed")
    add("--shard", metavar="PREFIX", help="a corpus for the last check; default: one made up here")
    add("--tokenizer", metavar="FILE", help="the tokenizer of --shard")
    add("--check", choices=CHECKS, help=argparse.SUPPRESS)  # run one, here: what a child does
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    arguments.output = arguments.output.resolve()
    if arguments.check:
        folder = arguments.output / arguments.check
        setting = Setting(
            arguments.device,
            arguments.toy,
            folder,
            arguments.seconds,
            shard=arguments.shard,
            tokenizer=arguments.tokenizer,
        )
        outcome = outcome_of(
            CHECKS[arguments.check].load(), setting, lambda so_far: so_far.write(folder / SO_FAR)
        )
        outcome.write(folder / OUTCOME)
        return 0
    if arguments.minutes <= 0:
        print(f"error: --minutes is {arguments.minutes:g}; give a number above 0", file=sys.stderr)
        return 2
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"error: torch {torch.__version__} sees no GPU here; to try the checks without one: "
                  "--device cpu --toy", file=sys.stderr)  # fmt: skip
            return 2
    elif not arguments.toy:
        print("error: --device cpu is for trying the checks; add --toy", file=sys.stderr)
        return 2
    if bool(arguments.shard) != bool(arguments.tokenizer):
        print("error: --shard and --tokenizer go together; give both, or none", file=sys.stderr)
        return 2
    folder = arguments.output
    if folder.exists() and not (
        folder.is_dir() and ((folder / "report.json").exists() or not any(folder.iterdir()))
    ):
        print(
            f"error: --output {folder} holds something else than a report; name another folder",
            file=sys.stderr,
        )
        return 2
    options = Options(
        arguments.output,
        arguments.minutes * 60,
        arguments.only or list(CHECKS),
        arguments.device,
        arguments.toy,
        arguments.shard,
        arguments.tokenizer,
    )
    return run_checks(options)


if __name__ == "__main__":
    sys.exit(main())
