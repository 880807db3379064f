"""Matrix products whose bf16 a CPU without bf16 instructions computes in fp32.

There torch multiplies bf16 matrices element by element, 10 to 20 times slower than fp32 ones (torch 2.13,
AVX2). Both sum in fp32 and round once, so the result is the same to the rounding of a sum's order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_bf16_instructions = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
_SLOW_IN_BF16 = _bf16_instructions is None or not _bf16_instructions()
"""Of this CPU; a constant, which torch.compile can read."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply tensors of ``dtype`` in: fp32 for bf16 on a CPU that has no instructions for it."""
    slow = dtype == torch.bfloat16 and device.type == "cpu" and _SLOW_IN_BF16
    return torch.float32 if slow else dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ``, [..., C] and [W, C] → [..., W]."""
    dtype = product_dtype(x.dtype, x.device)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b``."""
    dtype = product_dtype(a.dtype, a.device)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in an fp32 matrix; ``a`` and ``b`` of their :func:`product_dtype`."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a b`` in place, as :func:`write_product`."""
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
