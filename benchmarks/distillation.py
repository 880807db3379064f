#!/usr/bin/env python
"""What does a teacher cost? A step of distillation against the teacher's forward plus the student's step.

    distillation.py [--hidden-size 256 --layers 8 --vocabulary 8192 --length 512 --batch 2 --rounds 5]

One process, no optimizer: forward and backward of a student (the given iterations), the forward pass of its
teacher with its logits, and both side by side with all three terms of the loss. Rounds are interleaved and
the best of each is taken. Also the peak memory above the weights, and plain torch's losses on whole logits.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.models.distilled import Distilled
from megatron_iiet.ops import resolve_backend

PLAIN = "distillation, plain torch's losses"


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once of what operations inside put out; kernels' own scratch is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self.alive:
            return
        self.alive[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self.now -= self.alive.pop(place)


def model(arguments: argparse.Namespace, iterations: int | list[int]) -> Transformer:
    """A model of the given shape with random weights."""
    config: RunConfig = config_from_dict(
        {
            "model": {
                "hidden_size": arguments.hidden_size,
                "ffn_hidden_size": round(arguments.hidden_size * 2.75 / 32) * 32,
                "num_layers": arguments.layers,
                "num_attention_heads": max(1, arguments.hidden_size // 64),
                "vocab_size": arguments.vocabulary,
                "max_position_embeddings": arguments.length,
            },
            "solver": {"kind": "iiet", "iterations": iterations},
            "data": {"sequence_length": arguments.length},
        }
    )
    made = Transformer(config, backend=resolve_backend("auto")[0])
    made.initialise(1)
    return made


def plain_distillation(student: Transformer, teacher: Transformer, tokens: Tensor) -> Tensor:
    """The same loss with every layer's output kept, whole logits, and torch's own losses."""

    def run(one: Transformer) -> tuple[list[Tensor], Tensor]:
        y, history = one.embed(tokens)
        outputs = list(one.trajectory(y, history, one.layout(tokens.shape[1], y.dtype)))
        return outputs, one.project(outputs[-1])

    with torch.no_grad():
        taught, taught_logits = run(teacher)
    outputs, logits = run(student)
    mse = torch.stack([F.mse_loss(a, b) for a, b in zip(outputs, taught, strict=True)]).mean()
    ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    logs = [z.flatten(0, 1).log_softmax(-1) for z in (logits, taught_logits)]
    return ce + mse + F.kl_div(*logs, reduction="batchmean", log_target=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden-size", 256), ("layers", 8), ("vocabulary", 8192), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = [1 if layer % 3 == 0 else 0 for layer in range(arguments.layers)]
    student, teacher = model(arguments, plan), model(arguments, 3)
    pair = Distilled(student, teacher)
    tokens = torch.randint(arguments.vocabulary, (arguments.batch, arguments.length))

    def teacher_forward() -> None:
        with torch.no_grad():
            teacher(tokens, tokens)

    works: dict[str, Callable[[], object]] = {
        "teacher, forward": teacher_forward,
        "student, forward and backward": lambda: student(tokens, tokens).backward(),
        "distillation, forward and backward": lambda: pair(tokens, tokens).backward(),
        PLAIN: lambda: plain_distillation(student, teacher, tokens).backward(),
    }
    seconds = {name: float("inf") for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            student.zero_grad()
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            pair.parts.clear()
    print(f"student's iterations {plan}, teacher's 3; {arguments.batch * arguments.length:,} tokens")
    for name, best in seconds.items():
        student.zero_grad()
        with PeakMemory() as memory:
            works[name]()
        pair.parts.clear()
        print(f"{name:36} {best * 1e3:9.1f} ms   {memory.peak / 2**20:8.1f} MiB")
    apart = seconds["teacher, forward"] + seconds["student, forward and backward"]
    whole = seconds["distillation, forward and backward"]
    print(f"distillation / (teacher forward + student step): {whole / apart:.3f}")
    print(f"distillation / plain torch's losses: {whole / seconds[PLAIN]:.3f}")


if __name__ == "__main__":
    main()
