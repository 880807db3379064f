"""What the tests of ``merge_norm`` share: its backends, and its formula in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.ops import extension
from megatron_iiet.ops.backends import unavailable

EPS = 1e-6
STORAGE = [torch.float32, torch.bfloat16, torch.float16]
# Results are rounded once to the storage type; fp32 sums of a few terms err in the last places.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# A library that is there but cannot be used is a failure, not a reason to skip.
needs_extension = pytest.mark.skipif(
    not list(Path(extension.__file__).parents[1].glob("_extension*.so")), reason="the extension is not built"
)
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=needs_extension),
    *(["cuda"] if unavailable("cuda") is None else []),
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def placed(value: Any, backend: str) -> Any:
    """Tensors (in lists and dicts, too) on the device that ``backend`` reads."""
    if isinstance(value, dict):
        return {name: placed(v, backend) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(placed(v, backend) for v in value)
    return value.to("cuda" if backend == "cuda" else "cpu") if isinstance(value, Tensor) else value


def exact(
    residual: Tensor | None, increments: list[Tensor], coefficients: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The formula in fp64, differentiable, without any rounding in between."""
    stack = torch.stack([t.double() for t in increments]) if increments else None
    if coefficients is None:
        total = stack.sum(0) if stack is not None else 0
    elif stack is None:
        assert residual is not None
        total = residual.new_zeros(*coefficients.shape[:-1], *residual.shape, dtype=torch.float64)
    else:
        total = torch.tensordot(coefficients.double(), stack, 1)
    merged = total if residual is None else residual.double() + total
    assert isinstance(merged, Tensor)
    return merged, None if weight is None else exact_norm(merged, weight)


def exact_norm(merged: Tensor, weight: Tensor) -> Tensor:
    """The RMSNorm in fp64."""
    x = merged.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_close(found: Tensor, wanted: Tensor, what: str = "", tolerance: float = 1e-5) -> None:
    """Every number within ``tolerance`` times the largest one."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    error = (found.double() - wanted.double()).abs().amax() if wanted.numel() else wanted.new_zeros(())
    scale = wanted.double().abs().amax() if wanted.numel() else wanted.new_ones(())
    assert error <= tolerance * scale, f"{what}: off by {error:.2e}, the largest value is {scale:.2e}"


def rms_error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean squared difference."""
    return (found.double() - wanted.double()).square().mean().sqrt().item()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_(grad)


def slabs(count: int, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [draw(*shape, dtype=dtype, seed=10 + i, grad=grad) for i in range(count)]


def flatten(results: Any) -> list[Tensor]:
    return [t for r in results for t in (r if isinstance(r, list) else [r])]
