#!/usr/bin/env python
"""How fast is the fused merge-and-norm step on this CPU, against what it could be and what one would write?

Four comparisons, each with its peer in the same rounds:

    forward             a copy that moves the same bytes (the limit of the memory)
    forward, backward   plain eager torch, and torch.compile of the same expression compiled for this n
    all layers          24 layers' merges: transposed gradients against the same operator with one gradient
                        per edge, and against plain torch
    training step       (--step) a whole step of IIET r = 3, 12 layers, d = 512: this backend against
    `reference`

Rounds interleave the contenders of a comparison, medians are compared, and every ratio says how many times
faster ours is. The process is pinned (OMP_PROC_BIND, OMP_PLACES) and its allocator keeps freed memory
(MALLOC_*), for all contenders: otherwise page faults of fresh memory are what is measured. At the end a
*model* of the time on GPUs, from bytes moved and bandwidth; nothing in it was measured.

    python benchmarks/merge_norm.py [--step] [--rounds 25] [--no-compile] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PINNED = {
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "cores",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in PINNED.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PINNED})

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_iiet.config import config_from_dict  # noqa: E402
from megatron_iiet.models.history import History  # noqa: E402
from megatron_iiet.models.transformer import Transformer  # noqa: E402
from megatron_iiet.ops import merge_norm, resolve_backend  # noqa: E402

EPS = 1e-6
HISTORIES = (0, 4, 12, 23)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_BANDWIDTH = {"A100-80": 2.04e12, "H100 SXM": 3.35e12, "H200": 4.8e12}  # bytes/s, data sheets


SWEEP = torch.zeros(1 << 25)  # 128 MiB, more than a last-level cache


def race(contenders: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, interleaved, all from memory: what a cache kept of the one before is swept
    out first. A contender may return its own seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, run in contenders.items():
            SWEEP.add_(1)
            start = time.perf_counter()
            own = run()
            seconds = time.perf_counter() - start if own is None else own
            if round_ >= 2:  # the first ones warm up
                times[name].append(seconds)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def plain(
    residual: Tensor, increments: list[Tensor], coefficients: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The expression as one writes it, with the contract's rounding: sums in fp32, rounded once."""
    total = residual.float()
    for j, increment in enumerate(increments):
        total = total + coefficients[j] * increment.float()
    merged = total.to(residual.dtype)
    return merged, _norm(merged, weight)


def plain_rounding(
    residual: Tensor, increments: list[Tensor], coefficients: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in the storage type throughout: cheaper, and in bf16 rounded after every term."""
    merged = residual
    for j, increment in enumerate(increments):
        merged = merged + coefficients[j] * increment
    return merged, _norm(merged, weight)


def _norm(merged: Tensor, weight: Tensor) -> Tensor:
    merged32 = merged.float()
    normed = merged32 * torch.rsqrt(merged32.pow(2).mean(-1, keepdim=True) + EPS)
    return normed.to(merged.dtype) * weight


def fused(
    residual: Tensor, increments: list[Tensor], coefficients: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    merged, normed = merge_norm(residual, increments, coefficients, weight, eps=EPS, backend="cpu")
    assert normed is not None
    return merged, normed


class Case:
    """Inputs of one merge: the layer's own increment and n of the history."""

    def __init__(self, tokens: int, width: int, n: int, dtype: torch.dtype) -> None:
        torch.manual_seed(n)
        self.residual, *self.increments = (torch.randn(tokens, width).to(dtype) for _ in range(n + 2))
        self.coefficients = torch.randn(n + 1)
        self.weight = torch.randn(width).to(dtype)
        self.gradients = [torch.randn(tokens, width).to(dtype) for _ in range(2)]
        self.leaves = [self.residual, *self.increments, self.coefficients, self.weight]

    def forward(self, function: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function(self.residual, self.increments, self.coefficients, self.weight)

        return run

    def backward(self, function: Callable[..., Any], *, both: bool) -> Callable[[], float]:
        """Gradients of everything; seconds of the backward pass, or of forward and backward."""

        def run() -> float:
            for leaf in self.leaves:
                leaf.requires_grad_()
            start = time.perf_counter()
            outputs = function(self.residual, self.increments, self.coefficients, self.weight)
            middle = time.perf_counter()
            torch.autograd.grad(outputs, self.leaves, self.gradients)
            end = time.perf_counter()
            for leaf in self.leaves:
                leaf.requires_grad_(False)
            return end - (start if both else middle)

        return run


def copy_of(slabs: int, case: Case) -> Callable[[], None]:
    """A copy that reads half of ``slabs`` slabs and writes the other half."""
    tokens, width = case.residual.shape
    source = torch.randn(slabs * tokens // 2, width).to(case.residual.dtype)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def one_merge(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of single merges."""
    rows = []
    print(f"one merge, {arguments.tokens} x {arguments.width}; ms, and how many times faster ours is")
    head = "dtype   n | forward    copy   | fwd+bwd   eager         (rounding)    "
    print(head + ("" if arguments.no_compile else "| fwd compiled fwd bwd compiled bwd"), flush=True)
    for name, dtype in DTYPES.items():
        for n in HISTORIES:
            case = Case(arguments.tokens, arguments.width, n, dtype)
            ms = race({"forward": case.forward(fused), "copy": copy_of(n + 4, case)}, arguments.rounds)
            contenders: dict[str, Callable[[], float | None]] = {
                "both": case.backward(fused, both=True),
                "eager": case.backward(plain, both=True),
            }
            if dtype != torch.float32:
                contenders["eager, rounding"] = case.backward(plain_rounding, both=True)
            ms |= race(contenders, arguments.rounds)
            if not arguments.no_compile:
                torch._dynamo.reset()
                compiled = torch.compile(plain, dynamic=False, fullgraph=True)
                against = {"fused forward": case.forward(fused), "compiled forward": case.forward(compiled)}
                ms |= race(against, arguments.rounds)
                ms |= race(
                    {
                        "backward": case.backward(fused, both=False),
                        "compiled backward": case.backward(compiled, both=False),
                    },
                    arguments.rounds,
                )
            ratios = {"copy": ms["copy"] / ms["forward"], "eager": ms["eager"] / ms["both"]}
            sloppy = ms.get("eager, rounding", ms["eager"])
            ratios["eager, rounding"] = sloppy / ms["both"]
            line = (
                f"{name} {n:4} | {ms['forward']:6.2f} {ms['copy']:7.2f} {ratios['copy']:5.2f}"
                f" | {ms['both']:6.2f} {ms['eager']:8.2f} {ratios['eager']:5.1f}"
                f" {sloppy:8.2f} {ratios['eager, rounding']:5.1f}"
            )
            if not arguments.no_compile:
                ratios["compiled forward"] = ms["compiled forward"] / ms["fused forward"]
                ratios["compiled backward"] = ms["compiled backward"] / ms["backward"]
                line += (
                    f" | {ms['compiled forward']:6.2f} {ratios['compiled forward']:5.2f}"
                    f"  {ms['backward']:6.2f} {ms['compiled backward']:6.2f}"
                    f" {ratios['compiled backward']:5.2f}"
                )
            print(line, flush=True)
            rows.append({"dtype": name, "n": n, "ms": ms, "times faster": ratios})
    return rows


class Leaves(NamedTuple):
    """Inputs of a stack of merges."""

    coefficients: list[nn.Parameter]
    start: Tensor
    increments: list[Tensor]


def _layers(leaves: Leaves, transposed: bool, backend: str, *, both: bool) -> Callable[[], float]:
    """Seconds of the backward pass, or of forward and backward."""
    gradient = torch.randn_like(leaves.start)

    def run() -> float:
        start = time.perf_counter()
        history = History(rows=leaves.coefficients, backend=backend, transposed=transposed)
        y = leaves.start
        for n, (row, increment) in enumerate(zip(leaves.coefficients, leaves.increments, strict=True)):
            (y,) = history.merge(y, (row,), n, own=increment)
            history.append(increment)
        middle = time.perf_counter()
        y.backward(gradient)
        seconds = time.perf_counter() - (start if both else middle)
        for leaf in (*leaves.coefficients, leaves.start, *leaves.increments):
            leaf.grad = None
        return seconds

    return run


def _listed(ms: dict[str, float], ratios: dict[str, float]) -> str:
    return ", ".join(
        f"{key} {value:.1f}" + (f" ({ratios[key]:.2f} times)" if key in ratios else "")
        for key, value in ms.items()
    )


def all_layers(arguments: argparse.Namespace, layers: int = 24) -> list[dict[str, Any]]:
    """The merges of a whole model, nothing between them."""
    rows = []
    print(f"\nthe merges of {layers} layers, {arguments.tokens} x {arguments.width}; ms")
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        coefficients = [nn.Parameter(torch.randn(n + 1) / layers) for n in range(layers)]
        shape = (arguments.tokens, arguments.width)
        increments = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(layers)]
        leaves = Leaves(coefficients, torch.randn(shape).to(dtype).requires_grad_(), increments)
        for both, what in ((False, "backward"), (True, "forward + backward")):
            contenders = {
                "transposed": _layers(leaves, True, "cpu", both=both),
                "per edge": _layers(leaves, False, "cpu", both=both),
                "per edge, plain torch": _layers(leaves, False, "reference", both=both),
            }
            ms = race(contenders, max(3, arguments.rounds // 5))
            ratios = {key: ms[key] / ms["transposed"] for key in list(ms)[1:]}
            print(f"{name} {what}: {_listed(ms, ratios)}", flush=True)
            rows.append({"dtype": name, "what": what, "ms": ms, "times faster": ratios})
    return rows


def _step(dtype: torch.dtype, backend: str, history_gradient: str) -> Callable[[], None]:
    config = config_from_dict(
        {
            "model": {
                "num_layers": 12,
                "hidden_size": 512,
                "ffn_hidden_size": 1408,
                "vocab_size": 4096,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
            "solver": {"kind": "iiet", "iterations": 3},
            "ops": {"history_gradient": history_gradient},
        }
    )
    model = Transformer(config, backend=backend)
    model.initialise(0)
    for parameter in model.parameters():
        if not hasattr(parameter, "keep_fp32"):
            parameter.data = parameter.data.to(dtype)
    tokens = torch.randint(0, 4096, (1, 513), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        model.zero_grad(set_to_none=True)

    return run


def training_step(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of a whole model (the optimizer is the same for all)."""
    rows = []
    print("\ntraining step, IIET r = 3, 12 layers, d = 512, 512 tokens; ms")
    for name, dtype in DTYPES.items():
        contenders = {
            "cpu, transposed": _step(dtype, "cpu", "transposed"),
            "cpu, per edge": _step(dtype, "cpu", "per_edge"),
            "reference, per edge": _step(dtype, "reference", "per_edge"),
        }
        ms = race(contenders, max(3, arguments.rounds // 5))
        ratios = {key: ms[key] / ms["cpu, transposed"] for key in list(ms)[1:]}
        print(f"{name}: {_listed(ms, ratios)}", flush=True)
        rows.append({"dtype": name, "ms": ms, "times faster": ratios})
    return rows


def gpu_model(arguments: argparse.Namespace) -> None:
    """Bytes over bandwidth: what the kernels would take if memory were the only limit."""
    print("\nMODEL, not measured: forward in bf16 on a GPU at 85 % of its bandwidth; microseconds")
    print("       n | slabs fused, eager | " + ", ".join(GPU_BANDWIDTH))
    slab = arguments.tokens * arguments.width * 2
    for n in HISTORIES:
        fused_slabs, eager_slabs = n + 4, 5 * (n + 1) + 8  # eager: a product and a sum each, the norm in fp32
        times = (f"{fused_slabs * slab / (0.85 * b) * 1e6:.0f}" for b in GPU_BANDWIDTH.values())
        print(f"      {n:2} | {fused_slabs:5} {eager_slabs:12}  | " + ", ".join(times))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: it compiles for minutes"
    )
    parser.add_argument("--step", action="store_true", help="also time whole training steps")
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    try:
        backend, reason = resolve_backend("cpu")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{backend} ({reason}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    results: dict[str, Any] = {"one merge": one_merge(arguments), "all layers": all_layers(arguments)}
    if arguments.step:
        results["training step"] = training_step(arguments)
    gpu_model(arguments)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
