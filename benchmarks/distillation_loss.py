#!/usr/bin/env python
"""What do the losses of distillation take, in time and memory, against plain torch on whole logits?

    python benchmarks/distillation_loss.py [--tokens 2048 --width 768 --vocabulary 32000 --rounds 3]

One process, forward and backward, fp32: cross-entropy and KL divergence from the hidden states of a student
and a teacher, with gradients of the student's states and head. The peer holds both models' logits and leaves
the rest to cross_entropy, log_softmax and kl_div. Rounds interleave the two and medians are compared.

Peak bytes are those that torch's allocator had out at once above the inputs, gradients included, in a round
that is not timed; scratch of the matrix library is not seen. On a GPU (--device cuda) the device's own count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_iiet.parallel import TensorParallel
from megatron_iiet.parallel.distillation_loss import prediction_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Losses = Callable[[], tuple[Tensor, Tensor, Tensor]]


class Case:
    """States and heads of both models, and targets."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        tokens, width, vocabulary = arguments.tokens, arguments.width, arguments.vocabulary
        kind = {"dtype": DTYPES[arguments.dtype], "device": arguments.device}
        self.student, self.teacher = (torch.randn(1, tokens, width, **kind) for _ in range(2))
        self.weight, self.teacher_weight = (
            torch.randn(vocabulary, width, **kind) * width**-0.5 for _ in range(2)
        )
        self.targets = torch.randint(vocabulary, (1, tokens), device=arguments.device)
        self.temperature = arguments.temperature
        self.chunk_tokens = arguments.chunk_tokens
        self.leaves = [self.student.requires_grad_(), self.weight.requires_grad_()]

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        return prediction_loss(
            self.student,
            self.weight,
            self.teacher,
            self.teacher_weight,
            self.targets,
            vocab_size=len(self.weight),
            kl_weight=1.0,
            temperature=self.temperature,
            parallel=TensorParallel(),
            chunk_tokens=self.chunk_tokens,
        )

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        mine = F.linear(self.student, self.weight)[0].float()
        with torch.no_grad():
            taught = F.linear(self.teacher, self.teacher_weight)[0].float()
            taught = (taught / self.temperature).log_softmax(-1)
        ce = F.cross_entropy(mine, self.targets[0], reduction="sum")
        cooled = (mine / self.temperature).log_softmax(-1)
        kl = F.kl_div(cooled, taught, reduction="sum", log_target=True) * self.temperature**2
        return ce + kl, ce, kl

    def step(self, losses: Losses) -> tuple[Tensor, ...]:
        """Both terms, summed over tokens, and the gradients of the mean of their sum."""
        total, ce, kl = losses()
        return (ce.detach(), kl.detach(), *torch.autograd.grad(total / self.targets.numel(), self.leaves))


def milliseconds(case: Case, losses: Losses) -> float:
    _synchronize(case)
    start = time.perf_counter()
    case.step(losses)
    _synchronize(case)
    return (time.perf_counter() - start) * 1e3


def peak_bytes(case: Case, losses: Losses) -> int:
    """Most bytes out at once, above those of the inputs."""
    if case.student.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(losses)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        results = case.step(losses)
    del results
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _synchronize(case: Case) -> None:
    if case.student.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768, help="of both models' states")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--chunk-tokens", type=int, help="whose logits are made at once (default: its own choice)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    for name in ("tokens", "width", "vocabulary", "chunk_tokens", "rounds", "temperature"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            sys.exit(f"error: {flag} is {getattr(arguments, name)}; give a number above 0")
    case = Case(arguments)
    contenders = {"ours": case.ours, "plain": case.plain}
    print(
        f"{arguments.tokens} tokens, width {arguments.width}, vocabulary {arguments.vocabulary},"
        f" temperature {arguments.temperature:g}, {arguments.dtype} on {arguments.device},"
        f" torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    results = {name: case.step(losses) for name, losses in contenders.items()}  # warms up, too
    pairs = zip(*results.values(), strict=True)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    print("relative differences: ce {:.0e}, kl {:.0e}, states {:.0e}, head {:.0e}".format(*errors))
    del results
    peaks = {name: peak_bytes(case, losses) for name, losses in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, losses in contenders.items():
            times[name].append(milliseconds(case, losses))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("         milliseconds   peak bytes")
    for name in contenders:
        print(f"{name:8} {medians[name]:12.1f} {peaks[name]:12,}")
    time_ratio, byte_ratio = (x["ours"] / x["plain"] for x in (medians, peaks))
    print(f"ratio    {time_ratio:12.2f} {byte_ratio:12.2f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            numbers = {"milliseconds": times, "peak bytes": peaks, "relative differences": errors}
            json.dump({**vars(arguments), **numbers}, file, indent=2)


if __name__ == "__main__":
    main()
