"""Matrix products in fp8: both factors are scaled into the range of an 8-bit type, rounded to it, multiplied
with sums in fp32, and scaled back.

Scales are dynamic, of the factors as they are: one a factor (``tensorwise``), or one a row of the first and a
column of the second (``rowwise``). Values are e4m3; gradients are e5m2 where the scale is of the whole, whose
smallest numbers e4m3 would round to zero, and e4m3 by rows. So are torchao's recipes of these names. Of a
factor with NaN or infinity there is no finite product.

On GPUs the product is torch's scaled one, elsewhere the same numbers are multiplied in fp32.

Shapes: m, k, n of a product; C input and W output columns of a linear map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops import products

_VALUES, _WIDE = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-12
"""Largest magnitude of a factor that is taken for zero."""


@dataclass(frozen=True)
class Products:
    """The three products of a linear map and its gradients."""

    scaling: str = "off"
    """off: those of :mod:`megatron_iiet.ops.products`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x weightᵀ`` with its gradients, [..., C] and [W, C] → [..., W]."""
        if self.scaling == "off":
            return products.linear(x, weight)
        return cast(Tensor, _Linear.apply(x, weight, self))

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same for who has a backward pass of its own."""
        if self.scaling == "off":
            return products.linear(x, weight)
        product = self._product(x.flatten(0, -2), weight.t(), _VALUES)
        # No view: a row-parallel map sums it over the ranks in place, which autograd forbids of a view.
        return torch.ops.aten._unsafe_view(product, [*x.shape[:-1], len(weight)])

    def for_input(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """[..., W] and [W, C] → [..., C]."""
        if self.scaling == "off":
            return products.matmul(gradient, weight)
        flat = gradient.flatten(0, -2)
        return self._product(flat, weight, self._gradients).view(*gradient.shape[:-1], -1)

    def for_weight(self, gradient: Tensor, x: Tensor) -> Tensor:
        """[..., W] and [..., C] → [W, C]."""
        transposed, flat = gradient.flatten(0, -2).t(), x.flatten(0, -2)
        if self.scaling == "off":
            return products.matmul(transposed, flat)
        return self._product(transposed, flat, self._gradients)

    def check(self, device: torch.device) -> None:
        """Whether a device has such products.

        Raises:
            ValueError: it has not.
        """
        needed = {"off": (0, 0), "tensorwise": (8, 9), "rowwise": (9, 0)}[self.scaling]
        if device.type != "cuda" or (found := torch.cuda.get_device_capability(device)) >= needed:
            return
        instead = "tensorwise or off" if found >= (8, 9) else "off"
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"training.fp8 is {self.scaling}, which takes a GPU of compute capability "
            f"{needed[0]}.{needed[1]}, but {name} has {found[0]}.{found[1]}; set it to {instead}"
        )

    @property
    def _gradients(self) -> torch.dtype:
        return _WIDE if self.scaling == "tensorwise" else _VALUES

    def _product(self, a_mk: Tensor, b_kn: Tensor, of_a: torch.dtype) -> Tensor:
        by_rows = self.scaling == "rowwise"
        a, of_rows = rounded(a_mk, of_a, 1 if by_rows else None)
        b, of_columns = rounded(b_kn, _VALUES, 0 if by_rows else None)
        if not a.is_cuda:
            return (a.float() @ b.float()).mul_(of_rows).mul_(of_columns).to(a_mk.dtype)
        b = (
            b.t().contiguous().t()
        )  # as the product wants it: the first row by row, the second column by column
        a = a.contiguous()
        return torch._scaled_mm(a, b, scale_a=of_rows, scale_b=of_columns, out_dtype=a_mk.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by = by
        return by.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = ctx.by.for_input(gradient, weight) if ctx.needs_input_grad[0] else None
        for_weight = ctx.by.for_weight(gradient, x) if ctx.needs_input_grad[1] else None
        return for_x, for_weight, None


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """``x`` in an 8-bit type, and what that is to be multiplied by, fp32: a number, or one for every slice
    along ``dim``."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    limit = torch.finfo(dtype).max
    factor = limit / largest.float().clamp(min=_SMALLEST)
    return (x.float() * factor).clamp(-limit, limit).to(dtype), factor.reciprocal()
