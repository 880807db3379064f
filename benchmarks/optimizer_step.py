#!/usr/bin/env python
"""What does a step of Muon cost beside one of AdamW? The optimizers' own steps, without gradients and ranks.

    optimizer_step.py [--config examples/configs/transformer-pp-55m.yaml --rounds 5 --model.num_layers 4 …]

Both step fp32 weights of one model in one process. Steps are interleaved, the first of a pair in turn; the
ratio is that of the medians, beside it the middle half of the ratios of pairs. On a CPU the time is the
process's own, which other programs lengthen least; where more of them run than there are cores, it says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_iiet.config import RunConfig, config_from_file
from megatron_iiet.config.optimizers import AdamW, Muon, OptimizerConfig
from megatron_iiet.models import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.optimizers import MasterPart, prepare_optimizer

CONFIG = Path(__file__).resolve().parents[1] / "examples/configs/transformer-pp-55m.yaml"
KINDS: dict[str, OptimizerConfig] = {"AdamW": AdamW(), "Muon": Muon()}


def step_of(config: RunConfig, kind: OptimizerConfig, context: ParallelContext) -> Callable[[], object]:
    """A step of a model's weights by gradients that stay as they are."""
    model = Transformer(config)
    model.initialise(0)
    model.to(context.device)
    prepared = prepare_optimizer(model, kind)
    optimizer = prepared.build(prepared.groups)
    flats = list(prepared.moments)
    parts = [MasterPart(p, tuple(p.shape), 0, i, p, 0, p.numel()) for i, p in enumerate(flats)]
    prepared.connect(optimizer, flats, parts, context)
    for parameter in flats:
        parameter.grad = torch.randn_like(parameter)
    return optimizer.step


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, options = parser.parse_known_args()
    config = config_from_file(arguments.config, options)
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    with ParallelContext.start() as context:
        on_cpu = context.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        steps = {name: step_of(config, kind, context) for name, kind in KINDS.items()}
        for number in range(-1, arguments.rounds):  # the first ones make the moments
            for name in KINDS if number % 2 else reversed(KINDS):
                started = clock()
                steps[name]()
                if not on_cpu:
                    torch.cuda.synchronize()
                if number >= 0:
                    seconds[name].append(clock() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    parameters = Transformer.on_meta(config).num_parameters()
    print(f"{parameters:,} parameters, {torch.get_num_threads()} threads, {context.device.type}")
    for name, median in medians.items():
        print(f"{name:<6} {1000 * median:10.2f} ms a step (median of {arguments.rounds})")
    print(
        f"Muon / AdamW  {medians['Muon'] / medians['AdamW']:.1f} (half of the pairs: {low:.1f} to {high:.1f})"
    )
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores:
        print(f"noisy: {load:.1f} processes want this machine's {cores} cores")


if __name__ == "__main__":
    main()
