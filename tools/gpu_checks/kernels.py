"""``merge_norm`` and the transposed backward, every backend of the device, against the formula in fp64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_checks.base import Figure, NeedsGpuError, Setting, largest
from megatron_iiet.ops import merge_norm
from megatron_iiet.ops.backends import NAMES, Backend, get_backend, unavailable

EPS = 1e-6
SHAPES, TOY_SHAPES = 100, 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": "<= 1e-05", "bf16": "<= 0.01", "fp16": "<= 0.0015"}
"""Of the root mean squared error over that of the values: a few roundings to the storage type."""


class Call(NamedTuple):
    """Arguments of one ``merge_norm``, and the gradients that come back to its results."""

    residual: Tensor | None
    increments: list[Tensor]
    coefficients: Tensor | None
    norm_weight: Tensor | None
    gradients: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        given = (self.residual, *self.increments, self.coefficients, self.norm_weight)
        return [t for t in given if t is not None]

    def converted(self, change: Callable[[Tensor], Tensor]) -> Call:
        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else change(t.detach()).requires_grad_()

        increments = [change(t.detach()).requires_grad_() for t in self.increments]
        first, second = (change(g) for g in self.gradients)
        return Call(
            of(self.residual), increments, of(self.coefficients), of(self.norm_weight), (first, second)
        )


def draw_call(rng: random.Random, generator: torch.Generator, dtype: torch.dtype, device: str) -> Call:
    """Any admissible call: with and without residual, coefficients (rows, too) and norm; odd widths."""
    width = rng.choice([rng.randrange(1, 70), 64, 512, 1000, 1024, 2048, 4096 + rng.randrange(2)])
    shape = (rng.randrange(1, 40), width)
    k = rng.choice([0, 1, 1, 2, 5, 13, 24])
    rows = rng.choice([None, None, None, 1, 2, 3]) if k else None
    with_coefficients = k > 0 and (rows is not None or rng.random() < 0.7)

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    norm = rows is None and rng.random() < 0.7
    lead = () if rows is None else (rows,)
    return Call(
        tensor(*shape, dtype=dtype) if k == 0 or rng.random() < 0.7 else None,
        [tensor(*shape, dtype=dtype) for _ in range(k)],
        tensor(*lead, k) if with_coefficients else None,
        tensor(width, dtype=dtype) if norm else None,
        (tensor(*lead, *shape, dtype=dtype).detach(), tensor(*shape, dtype=dtype).detach()),
    )


def results(call: Call, backend: str) -> list[Tensor]:
    """Values and all gradients."""
    merged, normed = merge_norm(*call[:4], eps=EPS, backend=backend)
    return _with_gradients(call, merged, normed)


def exact(call: Call) -> list[Tensor]:
    """The same by the formula, in the type of the call: fp64."""
    stack = torch.stack(call.increments) if call.increments else None
    if stack is None:
        merged = call.residual
    else:
        total = stack.sum(0) if call.coefficients is None else torch.tensordot(call.coefficients, stack, 1)
        merged = total if call.residual is None else call.residual + total
    assert merged is not None
    normed = None
    if call.norm_weight is not None:
        normed = merged * (merged.square().mean(-1, keepdim=True) + EPS).rsqrt() * call.norm_weight
    return _with_gradients(call, merged, normed)


def _with_gradients(call: Call, merged: Tensor, normed: Tensor | None) -> list[Tensor]:
    outputs = [merged, *([] if normed is None else [normed])]
    used = list(call.gradients[: len(outputs)])
    gradients = torch.autograd.grad(outputs, call.leaves, used, allow_unused=True)
    return [t.detach() for t in (*outputs, *gradients) if t is not None]


def transposed(backend: Backend, call: Call) -> list[Tensor]:
    """What an entry of the history receives, and its products with the gradients that read it."""
    direct, entry, *gradients = call.increments
    coefficients = torch.linspace(-1, 1, len(gradients), device=entry.device)
    with torch.no_grad():
        return list(backend.transposed_merge(direct, entry, gradients, coefficients, True))


def exact_transposed(call: Call) -> list[Tensor]:
    direct, entry, *gradients = (t.detach() for t in call.increments)
    stack = torch.stack(gradients)
    coefficients = torch.linspace(-1, 1, len(gradients), device=entry.device).double()
    return [direct + torch.tensordot(coefficients, stack, 1), (stack * entry).sum((1, 2))]


def error(found: list[Tensor], wanted: list[Tensor], elements: int) -> float:
    """The largest root mean squared error over that of the values; NaN if anything is not finite.

    A sum over ``elements`` that happens to cancel is measured against a typical one, their root.
    """
    errors = [0.0]
    for a, b in zip(found, wanted, strict=True):
        typical = max(1.0, elements / b.numel()) ** 0.5
        scale = max(b.double().square().mean().sqrt().item(), typical)
        errors.append((a.double() - b.double()).square().mean().sqrt().item() / scale)
    return largest(errors)


def check(setting: Setting) -> Iterator[Figure]:
    """Random shapes of every form, on every backend that runs on the device."""
    other = {"cuda": "cpu", "cpu": "cuda"}[setting.device]
    names = [name for name in NAMES if name != other and unavailable(name) is None]
    if setting.device == "cuda" and "cuda" not in names:
        raise RuntimeError(f"there are no CUDA kernels: {unavailable('cuda')}")
    if names == ["reference"]:
        raise NeedsGpuError("kernels; or the extension built for this CPU (make setup)")
    for name in names:
        for dtype_name, dtype in DTYPES.items():
            if not setting.time_for(f"{name} in {dtype_name}", 3):
                continue
            worst, differ, tried = _compare(setting, name, dtype)
            where = f"{name}, {dtype_name}, {tried} shapes"
            yield Figure(f"error of values and gradients ({where})", worst, "", "fp64", BOUNDS[dtype_name])
            yield Figure(f"calls that differ when repeated ({where})", differ, "", "bit for bit", "== 0")


def _compare(setting: Setting, name: str, dtype: torch.dtype) -> tuple[float, int, int]:
    """The largest error, how many calls were not the same twice, and how many shapes were tried."""
    backend = get_backend(name)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    worst, differ, tried = 0.0, 0, 0
    shapes = TOY_SHAPES if setting.toy else SHAPES
    while tried < shapes and (
        tried == 0 or setting.time_for(f"{shapes - tried} of {shapes} shapes, {name}, {dtype}", 3)
    ):
        call = draw_call(rng, generator, dtype, setting.device)
        precise = call.converted(Tensor.double)
        compared = [(partial(results, call, name), exact(precise))]
        if len(call.increments) > 2:
            compared.append((partial(transposed, backend, call), exact_transposed(precise)))
        for run, wanted in compared:
            found, again = run(), run()
            worst = largest((worst, error(found, wanted, call.gradients[1].numel())))
            differ += not all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        tried += 1
    return worst, differ, tried
