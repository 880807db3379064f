"""Matrix products whose 16 bits a CPU without instructions for them computes in fp32.

There torch multiplies bf16 matrices element by element, 10 to 20 times slower than fp32 ones (torch 2.13,
AVX2). Both sum in fp32 and round once, so the result is the same to the rounding of a sum's order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_instructions(question: str) -> bool:
    asked = getattr(torch.ops.mkldnn, question, None)
    return asked is not None and bool(asked())


_SLOW_IN_BF16 = not _has_instructions("_is_mkldnn_bf16_supported")
_SLOW_IN_FP16 = not _has_instructions("_is_mkldnn_fp16_supported")
"""Of this CPU; constants, which torch.compile can read."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply tensors of ``dtype`` in: fp32 for 16 bits on a CPU without instructions for them."""
    slow = (dtype == torch.bfloat16 and _SLOW_IN_BF16) or (dtype == torch.float16 and _SLOW_IN_FP16)
    return torch.float32 if slow and device.type == "cpu" else dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ``, [..., C] and [W, C] → [..., W]."""
    dtype = product_dtype(x.dtype, x.device)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b``."""
    dtype = product_dtype(a.dtype, a.device)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


ROWS_AT_ONCE = 1024


def write_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in an fp32 matrix; ``a`` and ``b`` of their :func:`product_dtype`."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a b`` in place, as :func:`write_product`."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    # torch copies a summand of another type first: a few rows at a time it stays in the cache (7 x faster).
    for rows, product in zip(total.split(ROWS_AT_ONCE), (a @ b).split(ROWS_AT_ONCE), strict=True):
        rows.add_(product)
    return total
