#!/usr/bin/env python
"""What do the guards cost? Steps judged and gated against steps of the same engine that are not; and the
checksums of ``guards.replicas``.

    guards.py [--hidden-size 256 --layers 6 --vocabulary 8192 --length 256 --batch 2 --rounds 40]

One process under ZeRO-1. Pairs of steps are interleaved, the first of a pair in turn; the ratio is that of
the medians, beside it the middle half of the ratios of pairs. Numbers are read every step on both sides. On
a CPU the time is the process's own, which other programs on the machine lengthen least.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_iiet.config import LoadedConfig, RunConfig, config_from_dict
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.ops import resolve_backend
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine import Engine, engine_class
from megatron_iiet.training.pretrain import reconciled_ds_config
from megatron_iiet.training.replicas import checksum


class NoGate:
    """Hands a step's numbers on, whatever they are."""

    def begin(self, numbers: Tensor) -> None:
        """As :meth:`Gate.begin`."""
        self.numbers = numbers

    def decide(self, norm: Tensor | float) -> Tensor:
        """As :meth:`Gate.decide`, without one."""
        seen = torch.as_tensor(norm, dtype=torch.float64, device=self.numbers.device).reshape(1)
        return torch.cat((self.numbers[:1], seen, torch.zeros_like(seen)))


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """All guards on, and nothing that they would stop."""
    return config_from_dict(
        {
            "model": {
                "hidden_size": arguments.hidden_size,
                "ffn_hidden_size": arguments.hidden_size * 11 // 4,
                "num_layers": arguments.layers,
                "vocab_size": arguments.vocabulary,
                "max_position_embeddings": arguments.length,
            },
            "solver": {"kind": "iiet", "iterations": 1},
            "data": {"sequence_length": arguments.length},
            "training": {
                "global_batch_size": arguments.batch,
                "micro_batch_size": arguments.batch,
                "precision": arguments.precision,
            },
            "guards": {"spike": "rewind", "window": 100, "deviations": 1e9},
        }
    )


def gated_or_not(engine: Engine) -> dict[str, Callable[[], None]]:
    """What puts the gate in, and what takes it out, by name."""
    wrapped: Any = engine._engine
    optimizer, gate, none = wrapped.basic_optimizer, wrapped.gate, NoGate()
    guarded, plain = optimizer.step, type(optimizer).step.__get__(optimizer)

    def put_in() -> None:
        wrapped.gate, optimizer.step = gate, guarded

    def take_out() -> None:
        wrapped.gate, optimizer.step = none, plain
        optimizer.found_inf = None

    return {"on": put_in, "off": take_out}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = {"hidden-size": 256, "layers": 6, "vocabulary": 8192, "length": 256, "batch": 2, "rounds": 40}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    config = config_of(arguments)
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    with ParallelContext.start(config.parallel) as context:
        ds_config = reconciled_ds_config(LoadedConfig(config=config, ds_config_path=None), 1)
        backend, _ = resolve_backend(config.ops.backend, context.device)
        engine = engine_class(context)(config, ds_config, context, backend)
        tokens = torch.randint(arguments.vocabulary, (arguments.batch, arguments.length + 1))
        clock = time.process_time if context.device.type == "cpu" else time.perf_counter
        switch, batches = gated_or_not(engine), itertools.repeat(Batch(tokens))
        for number in range(-3, arguments.rounds):  # the first ones warm up
            for which in ("on", "off") if number % 2 else ("off", "on"):
                switch[which]()
                started = clock()
                result = engine.train_step(batches, 1e-4)
                result.read()
                if number >= 0:
                    seconds[which].append(clock() - started)
        looks = []
        for _ in range(arguments.rounds):
            started = clock()
            torch.stack([checksum(parameter) for parameter in engine.model.parameters()]).tolist()
            looks.append(clock() - started)
    medians = {which: statistics.median(times) for which, times in seconds.items()}
    low, _, high = statistics.quantiles(
        (on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)), n=4
    )
    for which, median in medians.items():
        print(f"guards {which:<3}  {1000 * median:8.2f} ms a step (median of {arguments.rounds})")
    look = statistics.median(looks)
    print(
        f"replicas    {1000 * look:8.2f} ms for the checksums of a comparison, without its gathering: "
        f"{look / medians['on']:.2%} of a step, {look / medians['on'] / 100:.4%} at guards.replicas 100"
    )
    print(f"on / off    {medians['on'] / medians['off']:.4f} (half of the pairs: {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
