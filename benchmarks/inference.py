#!/usr/bin/env python
"""What does inference cost? Table 3 and Figure 3b of the paper: every system at one size, and transformers'
own LLaMA.

    inference.py [--size 340m] [--precision fp32] [--batch 1] [--new-tokens 24] [--prompt 64] [--rounds 3]
    inference.py --precision bf16 --new-tokens 128 --caches dynamic static --compile --output runs/inference
    inference.py --iterations 0 1 2 3 4 5 6 7 8 --output runs/inference-r

Random weights (the cost does not depend on them), `generate()` of transformers with its DynamicCache or
StaticCache and greedy decoding. Printed for each system: decoded tokens a second (by the time between two
tokens, its lower quartile over rounds), tokens a second of the prompt (in the fastest round), time a token
against Transformer++ and against transformers' LlamaForCausalLM, how many times faster than the full IIET,
FLOPs of 512 tokens by the paper's formula and as torch counts them, bytes of cache a token against 2 · d_kv ·
bytes · Σ(r_n + 1), memory, and whether the text is that of a DynamicCache. Where it is not, or where decoding
failed (unless it was the compiler that did), the exit status is 1.

On a CPU the rounds of all systems are interleaved, since such a machine is often shared, and memory is
computed: weights and cache. On CUDA (and with --alone or --compile) one system is measured after the other,
alone on the device, and memory is the peak of what torch gave out on CUDA while it decoded.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inference_report import PAPER_RATIOS, add_ratios, draw, machine, row, table
from inference_systems import (
    SIZES,
    TOY,
    System,
    cache_bytes,
    cache_formula,
    evaluations,
    flops_counted,
    flops_formula,
    systems,
    weight_bytes,
)
from inference_timing import COMPILED, Decoding, Subject, compare, measure
from transformers.utils import logging

from megatron_iiet import durable
from megatron_iiet.config import ArgumentParser, exit_with_error
from megatron_iiet.hf.export import DTYPES

TOY_DEFAULTS = {"prompt": 8, "new_tokens": 4, "rounds": 1}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, complete."""
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", default="340m", choices=SIZES, help="default: 340m")
    size.add_argument("--toy", action="store_true", help="a tiny model and few tokens, for tests")
    add("--precision", default="fp32", choices=tuple(DTYPES), help="default: fp32")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if torch sees one")
    add("--batch", type=_positive, default=1, help="sequences (default: 1)")
    add("--prompt", type=_positive, help="tokens (default: 64)")
    add("--new-tokens", type=_several, help="at least 2 (default: 24)")
    add("--rounds", type=_positive, help="besides one to warm up (default: 3)")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="of the CPU")
    add(
        "--iterations", type=int, nargs="+", default=[0, 1, 3], choices=range(9), metavar="r",
        help="of IIET, 0 to 8 (default: 0 1 3)",
    )  # fmt: skip
    add("--plan", type=Path, metavar="PLAN.json", help="an E-IIET by tools/iteration_influence.py as well")
    add("--caches", nargs="+", default=["dynamic"], choices=("dynamic", "static"), help="default: dynamic")
    add("--compile", action="store_true", help="the static cache compiled as well (CUDA graphs on CUDA)")
    add("--alone", action="store_true", help="one model in memory at a time; always so on CUDA")
    add("--output", type=Path, metavar="FOLDER", help="for inference.json and inference.png")
    arguments = parser.parse_args(words)
    defaults = TOY_DEFAULTS if arguments.toy else {"prompt": 64, "new_tokens": 24, "rounds": 3}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.size = TOY if arguments.toy else arguments.size
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device; leave it out, or make it cpu")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A compiler's memory of one model counts against the next.
    arguments.alone |= arguments.compile or arguments.device == "cuda"
    return arguments


def _positive(word: str) -> int:
    return _at_least(1, word)


def _several(word: str) -> int:
    return _at_least(2, word)


def _at_least(least: int, word: str) -> int:
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word} is no whole number of at least {least}")
    return int(word)


def measured(chosen: Sequence[System], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of systems that share the device while they are measured."""
    device, precision = torch.device(arguments.device), arguments.precision
    caches = [*dict.fromkeys(arguments.caches)] + [COMPILED] * arguments.compile
    torch.manual_seed(1234)
    prompt_BT = torch.randint(chosen[0].config.model.vocab_size, (arguments.batch, arguments.prompt)).to(
        device
    )
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    subjects = [
        Subject(system, system.build(precision, device), {cache: Decoding() for cache in caches})
        for system in chosen
    ]
    measure(subjects, prompt_BT, arguments.new_tokens, arguments.rounds)
    rows = []
    for subject in subjects:
        system, model = subject.system, subject.model
        compare(subject, prompt_BT, arguments.new_tokens, precision)
        per_token = cache_bytes(model)
        held = arguments.batch * (arguments.prompt + arguments.new_tokens - 1)  # the last token is not fed
        facts = {
            "layers": system.config.model.num_layers,
            "evaluations": evaluations(system.config),
            "allocated_before_bytes": before,
            "weights_bytes": weight_bytes(model),
            "weights_and_cache_bytes": weight_bytes(model) + held * per_token,
            "cache_bytes_per_token": per_token,
            "cache_bytes_per_token_formula": cache_formula(system.config, precision),
            "flops_formula": flops_formula(system.config),
            "flops_counted": flops_counted(model),
        }
        rows += [
            row(system, cache, decoding, facts, arguments.batch, arguments.prompt)
            for cache, decoding in subject.decodings.items()
        ]
    return rows


def forget(device: torch.device) -> None:
    """Free what the models before held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failed(found: dict[str, Any]) -> bool:
    """Whether a row is not as it has to be; what cannot be compiled is no failure of the model."""
    unmeasured = bool(found["refused"]) and found["cache"] != COMPILED
    return unmeasured or (found["comparison"] or "").startswith("UNEQUAL")


def heading(arguments: argparse.Namespace, of: dict[str, Any]) -> str:
    """What was measured, and where."""
    where = of["device"]["name"] + (f", {arguments.threads} threads" if arguments.device == "cpu" else "")
    return (
        f"{arguments.size}{' (no size of the paper: for tests)' if arguments.toy else ''}, "
        f"{arguments.precision}, batch {arguments.batch}, prompt {arguments.prompt}, "
        f"{arguments.new_tokens} new tokens, {where}, torch {torch.__version__}"
    )


def write(arguments: argparse.Namespace, of: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All figures, and the picture, into the output folder."""
    content = {
        "toy": arguments.toy,
        **of,
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "matmul_precision": torch.get_float32_matmul_precision(),
        "paper_time_ratios": PAPER_RATIOS,
        "rows": rows,
    }
    folder = arguments.output
    durable.make_parent(folder / "inference.json")
    durable.write_text(folder / "inference.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    draw(rows, heading(arguments, of), folder / "inference.png")


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    arguments = parse(words)
    device = torch.device(arguments.device)
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.output is not None:
            durable.check_output(arguments.output / "inference.json")
        chosen = systems(arguments.size, arguments.iterations, arguments.plan)
    except ValueError as error:
        exit_with_error(str(error))
    of = machine(device)
    print(heading(arguments, of) + "\n")
    for note in filter(None, (system.note for system in chosen)):
        print(f"{note}\n")
    rows: list[dict[str, Any]] = []
    for group in [[system] for system in chosen] if arguments.alone else [chosen]:
        rows += measured(group, arguments)
        forget(device)
    add_ratios(rows)
    print(table(rows), flush=True)
    if arguments.output is not None:
        write(arguments, of, rows)
    return int(any(failed(found) for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
