"""The fused step against a copy of as many bytes, against eager torch, torch.compile and Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_checks.base import Figure, Setting, race
from megatron_iiet.ops import merge_norm
from megatron_iiet.ops.backends import get_backend, unavailable

EPS = 1e-6
SHARE = ">= 0.85"
"""Of the bandwidth of a copy."""


def eager(
    residual: Tensor, increments: list[Tensor], coefficients: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The expression as one writes it, sums in fp32, rounded once."""
    total = residual.float()
    for j, increment in enumerate(increments):
        total = torch.addcmul(total, increment.float(), coefficients[j])
    merged = total.to(residual.dtype)
    x = merged.float()
    return merged, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).to(merged.dtype) * weight


def copy_of(slabs: int, slab: Tensor) -> Callable[[], object]:
    """Reads half of ``slabs`` slabs and writes as many."""
    source = torch.empty(slabs * slab.numel() // 2, dtype=slab.dtype, device=slab.device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    """Several launches a reading of the clock: one alone is as short as starting it."""

    def several() -> None:
        for _ in range(times):
            run()

    return several


@torch.no_grad()
def check(setting: Setting) -> Iterator[Figure]:
    """Forward of merges with n of the history, and the transposed backward of an entry that n merges read."""
    tokens, width = (64, 96) if setting.toy else (16384, 2048)
    rounds, launches = (3, 1) if setting.toy else (15, 10)
    own = setting.device if unavailable(setting.device) is None else "reference"
    peers = ["triton"] if setting.device == "cuda" and unavailable("triton") is None else []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        for n in (0, 4, 12, 23):
            if not setting.time_for(f"{name}, n = {n}", 8):
                continue
            generator = torch.Generator(setting.device).manual_seed(n)
            residual, *increments = (
                torch.randn(tokens, width, generator=generator, device=setting.device).to(dtype)
                for _ in range(n + 2)
            )
            coefficients = torch.randn(n + 1, generator=generator, device=setting.device)
            weight = torch.ones(width, dtype=dtype, device=setting.device)
            call = (residual, increments, coefficients, weight)
            contenders: dict[str, Callable[[], object]] = {
                own: partial(merge_norm, *call, eps=EPS, backend=own),
                "copy": copy_of(n + 4, residual),
                "eager": partial(eager, *call),
            }
            contenders |= {peer: partial(merge_norm, *call, eps=EPS, backend=peer) for peer in peers}
            if n in (4, 12) and not setting.toy:
                torch._dynamo.reset()
                contenders["torch.compile"] = partial(
                    torch.compile(eager, dynamic=False, fullgraph=True), *call
                )
            contenders = {k: repeated(run, launches) for k, run in contenders.items()}
            times = race(contenders, setting.device, rounds, lambda: setting.left > 5)
            where = f"merge_norm, {name}, n = {n}"
            moved = (n + 4) * residual.nbytes * launches
            note = f"{moved / times[own] / 1e9:,.0f} GB/s"
            share = times["copy"] / times[own]
            label = f"{where}: share of a copy's bandwidth"
            yield Figure(label, share, "", "copy", setting.judged(SHARE), note)
            for peer in contenders:
                if peer not in (own, "copy"):
                    yield Figure(f"{where}: faster than {peer}", times[peer] / times[own], "times", peer)
            if n:
                yield _transposed(setting, own, call, name, rounds, launches)


def _transposed(
    setting: Setting,
    own: str,
    call: tuple[Tensor, list[Tensor], Tensor, Tensor],
    name: str,
    rounds: int,
    launches: int,
) -> Figure:
    """An entry's gradient from the n merges that read it: reads n + 2 slabs, writes one."""
    direct, (entry, *gradients), coefficients, _ = call
    n, backend = len(gradients), get_backend(own)
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: backend.transposed_merge(direct, entry, gradients, coefficients[:n], True),
        "copy": copy_of(n + 3, direct),
    }
    contenders = {k: repeated(run, launches) for k, run in contenders.items()}
    times = race(contenders, setting.device, rounds, lambda: setting.left > 4)
    share = times["copy"] / times["ours"]
    return Figure(f"transposed backward, {name}, {n} merges: share of a copy's bandwidth", share, "", "copy",
                  setting.judged(SHARE))  # fmt: skip
