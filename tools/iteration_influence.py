#!/usr/bin/env python
"""Measure what each iteration of each layer of a trained IIET changes, and plan which of them stay (E-IIET).

    tools/iteration_influence.py --model runs/iiet-55m --output runs/iiet-55m/influence --flops-ratio 0.5
    torchrun --nproc-per-node 4 tools/iteration_influence.py --model … --output … --parallel.tensor 2

Writes influence.json, plan.json (for --solver.iterations and distill_iiet.py --plan) and three pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from megatron_iiet.config import ArgumentParser, exit_with_error
from megatron_iiet.config.schema import ParallelConfig


def threshold(word: str) -> float | Literal["auto"]:
    try:
        return "auto" if word == "auto" else float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{word}' is neither a number nor 'auto'") from None


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="output_dir of a run, a checkpoint, or a model folder")
    add("--output", required=True, metavar="DIR", help="folder to write into")
    add(
        "--data",
        default="",
        metavar="PATH",
        help="prefix of a corpus, or a file of text (docs/data.md); default: what the run validates on",
    )
    add("--tokenizer", default="", metavar="FILE", help="default: the model's")
    add("--sequences", type=int, default=256, metavar="N", help="to measure on (default: 256)")
    add("--sequence-length", type=int, metavar="T", help="tokens of a sequence (default: as in training)")
    add("--micro-batch-size", type=int, default=8, metavar="B", help="sequences of a pass (default: 8)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the layers (default: fp32)")
    add("--parallel.tensor", type=int, default=1, metavar="t", help="tensor-parallel size")
    add("--parallel.pipeline", type=int, default=1, metavar="p", help="pipeline-parallel size")
    add("--parallel.sequence", action="store_true", help="with tensor: cut the streams along the sequence")
    add(
        "--ablation",
        action="store_true",
        help="also measure the loss without each iteration: as many more passes as all layers have of them",
    )
    add = parser.add_argument_group("the plan, by one of (default: --threshold auto)").add_argument
    add(
        "--threshold",
        type=threshold,
        metavar="auto|X",
        help="iterations of at least this influence; auto: the smallest of any layer's predictor",
    )
    add("--budget", type=int, metavar="K", help="the K most influential iterations of all layers")
    add("--flops-ratio", type=float, metavar="X", help="within this share of the FLOPs of full layers")
    add("--lower-bound", action="store_true", help="no iterations")
    add("--rank-by", choices=("cosine", "loss"), default="cosine", help="loss: by what --ablation finds")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Parse, analyse."""
    arguments = parse_arguments()
    values = vars(arguments)
    rules = (arguments.threshold, arguments.budget, arguments.flops_ratio, arguments.lower_bound or None)
    if all(rule is None for rule in rules):
        arguments.threshold = "auto"
    grid = [values[f"parallel.{axis}"] for axis in ("tensor", "pipeline", "sequence")]
    try:
        from megatron_iiet.distillation.analysis import Options, analyse
        from megatron_iiet.distillation.plans import PlanRequest

        request = PlanRequest(
            arguments.threshold,
            arguments.budget,
            arguments.flops_ratio,
            arguments.lower_bound,
            arguments.rank_by,
        )
        analyse(
            Options(
                arguments.model,
                Path(arguments.output),
                request,
                data=arguments.data,
                tokenizer=arguments.tokenizer,
                sequences=arguments.sequences,
                micro_batch_size=arguments.micro_batch_size,
                sequence_length=arguments.sequence_length,
                precision=arguments.precision,
                parallel=ParallelConfig(*grid),
                ablation=arguments.ablation,
            )
        )
    except (ValueError, OSError) as error:
        exit_with_error(str(error))


if __name__ == "__main__":
    main()
