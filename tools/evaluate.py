#!/usr/bin/env python
"""Evaluate a model on lm-evaluation-harness tasks, by default the paper's suite.

    tools/evaluate.py --model runs/iiet-340m --tasks paper
    tools/evaluate.py --model exported --tasks lambada_openai,piqa --data-dir eval-data --limit 500
    torchrun --nproc-per-node 4 tools/evaluate.py --model runs/iiet-7b --tasks paper --parallel.tensor 4
    tools/evaluate.py --compare paper --results runs/iiet-340m runs/pcformer-340m --table table1

Prints the paper's table beside the paper's figures; writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_iiet.config import ArgumentParser, exit_with_error
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.evaluation.comparison import FORMATS, compare, read_results
from megatron_iiet.evaluation.paper_results import TABLES


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        help="output_dir of a run, a checkpoint, a model folder, or a Hugging Face folder",
    )
    add(
        "--tasks",
        default="paper",
        metavar="paper|NAME,NAME",
        help="names of lm-evaluation-harness; 'paper' stands for its seven (the default)",
    )
    add(
        "--data-dir",
        default="",
        metavar="DIR",
        help="work offline: NAME.jsonl (.gz, .zst) or NAME.parquet of each task; default: the hub",
    )
    add(
        "--include-path",
        default="",
        metavar="DIR",
        help="definitions of tasks of your own, as lm-evaluation-harness reads them; with data of their own",
    )
    add("--limit", type=int, metavar="N", help="the first N rows of each task only")
    add("--output", default="", metavar="DIR", help="folder to write into (default: evaluation in --model)")
    add("--step", type=int, metavar="N", help="of a run: the checkpoint of this step, not the newest")
    add(
        "--batch-size", type=int, default=8, metavar="B", help="sequences of full length at once (default: 8)"
    )
    add("--max-length", type=int, metavar="T", help="longest input in tokens (default: the model's)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    add("--tokenizer", default="", metavar="FILE", help="default: the model's")
    add(
        "--start",
        choices=("auto", "bos", "eos"),
        default="auto",
        help="token in front of a text without context; auto: bos where a Hugging Face tokenizer has one, "
        "eos for models trained here",
    )
    add("--trust-remote-code", action="store_true", help="run code that a Hugging Face folder brings")
    add("--parallel.tensor", type=int, default=1, metavar="t", help="tensor-parallel size")
    add("--parallel.pipeline", type=int, default=1, metavar="p", help="pipeline-parallel size")
    add("--parallel.sequence", action="store_true", help="with tensor: cut the streams along the sequence")
    add(
        "--compare",
        choices=("paper",),
        help="load no model: models evaluated before, above a table of the paper",
    )
    add("--results", nargs="+", metavar="DIR", help="with --compare: evaluated models, or results.json files")
    add("--table", choices=tuple(TABLES), default="table1", help="with --compare (default: table1)")
    add("--format", choices=FORMATS, default="markdown", help="with --compare (default: markdown)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare and (arguments.model or not arguments.results):
        parser.error("--compare takes --results with one or more evaluated models, and no --model")
    if not arguments.compare and (arguments.results or not arguments.model):
        parser.error("give a --model to evaluate, or --compare paper with --results of evaluated ones")
    return arguments


def main() -> None:
    """Parse, evaluate."""
    arguments = parse_arguments()
    if arguments.compare:
        try:
            results = [read_results(Path(path)) for path in arguments.results]
        except (ValueError, OSError) as error:
            exit_with_error(str(error))
        print(compare(results, arguments.table, arguments.format), end="")
        return
    values = vars(arguments)
    if arguments.data_dir:  # read as the libraries are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    grid = [values[f"parallel.{axis}"] for axis in ("tensor", "pipeline", "sequence")]
    from megatron_iiet.evaluation.tasks import check_installed

    try:
        check_installed()
        from megatron_iiet.evaluation.evaluate import Options, evaluate_model
        from megatron_iiet.evaluation.models import ModelOptions

        model = ModelOptions(
            arguments.model,
            step=arguments.step,
            tokenizer=arguments.tokenizer,
            start=arguments.start,
            max_length=arguments.max_length,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            trust_remote_code=arguments.trust_remote_code,
            parallel=ParallelConfig(*grid),
        )
        evaluate_model(
            Options(
                model,
                tuple(arguments.tasks.split(",")),
                data_dir=arguments.data_dir,
                limit=arguments.limit,
                output=arguments.output,
                include_path=arguments.include_path,
            )
        )
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(str(error))


if __name__ == "__main__":
    main()
