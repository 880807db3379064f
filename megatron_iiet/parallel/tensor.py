"""Tensor and sequence parallelism: what a layer's input and output pass through, and its linear maps.

A block of a layer is column-parallel, something pointwise or per head, then row-parallel. Between blocks the
residual stream is whole on every rank, or under sequence parallelism cut along the sequence::

    tensor only         enter: identity        backward: all-reduce
                        leave: all-reduce      backward: identity
    with sequence       enter: all-gather      backward: reduce-scatter
                        leave: reduce-scatter  backward: all-gather

Shoeybi et al. 2019, Korthikanti et al. 2022. How often is in docs/parallelism.md.

Shapes: B batch, T sequence, S the rank's part of it, C input columns, W output width of the rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.fp8 import Products
from megatron_iiet.parallel.group import Group, sum_in_fp32
from megatron_iiet.parallel.shard import Shard

PRODUCTS = Products()


@dataclass(frozen=True)
class TensorParallel:
    """How the ranks of one tensor-parallel group share a layer; the default is one rank alone."""

    group: Group = field(default_factory=Group)
    sequence: bool = False
    """Whether the residual stream is cut along the sequence between blocks."""

    @property
    def cuts_sequence(self) -> bool:
        """Whether a rank sees only its part of the sequence between blocks."""
        return self.sequence and self.group.size > 1

    def column_linear(self, in_features: int, blocks: tuple[int, ...], *, bias: bool = False) -> nn.Linear:
        """``x Wᵀ`` or ``x Wᵀ + b`` for a W whose rows are the sub-matrices ``blocks``, each split by rows, b
        with them; enters a block."""
        part = self._linear(_ColumnParallel, (sum(blocks), in_features), Shard(0, blocks), bias)
        if part.bias is not None:
            mark_sharded(part.bias, Shard(0, blocks), self.group.size)
        return part

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
        """``x Wᵀ`` or ``x Wᵀ + b`` for a W split by columns, x being a rank's part of the input; every rank
        has b; leaves a block."""
        return self._linear(_RowParallel, (out_features, in_features), Shard(1, (in_features,)), bias)

    def _linear(
        self, kind: type[_ParallelLinear], shape: tuple[int, int], shard: Shard, bias: bool
    ) -> nn.Linear:
        """Marked on one rank too, so that checkpoints know how it may be split."""
        rows, columns = shard.local_shape(shape, self.group.size)
        part = kind(columns, rows, self, bias)
        mark_sharded(part.weight, shard, self.group.size)
        return part

    def leave(self, partial_BTC: Tensor) -> Tensor:
        """Sum the ranks' parts, writing over them; [B, T, C] → [B, T, C], or [B, S, C] under sequence
        parallelism."""
        if self.group.size == 1:
            return partial_BTC
        function = _ScatterSequence if self.sequence else _Reduce
        return cast(Tensor, function.apply(partial_BTC, self.group))

    def sum_replicated_gradients(self, module: nn.Module) -> None:
        """Sum the gradients of replicated parameters over the group where each rank has a part of them.

        What all heads share sees a rank's own heads only; and under sequence parallelism norms and merge
        coefficients see a rank's part of the sequence only. A hook on the leaf sums once a backward pass,
        before any optimizer sees the gradient.
        """
        if self.group.size == 1:
            return
        for parameter in module.parameters():
            in_parts = self.sequence or getattr(parameter, "shared_by_heads", False)
            if in_parts and shard_of(parameter) is None:
                parameter.register_hook(lambda gradient: sum_in_fp32(gradient, self.group))


def mark_sharded(parameter: Tensor, shard: Shard, size: int) -> None:
    """Note how a parameter is split; DeepSpeed reads ``tensor_model_parallel`` for its gradient norm."""
    parameter.shard = shard  # type: ignore[attr-defined]
    if size > 1:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def mark_shared_by_heads(parameter: Tensor) -> None:
    """Note that a replicated parameter is applied to each head, of which a rank has its own only."""
    parameter.shared_by_heads = True  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """How a parameter is split over the tensor-parallel ranks; None if each holds all of it."""
    return cast("Shard | None", getattr(parameter, "shard", None))


def column_parallel(
    x: Tensor, weight: Tensor, parallel: TensorParallel, products: Products = PRODUCTS
) -> Tensor:
    """``enter(x) weightᵀ`` with the weight's rows of this rank: [B, S or T, C] → [B, T, W]."""
    if parallel.group.size == 1:
        return products(x, weight)
    return cast(Tensor, _ColumnLinear.apply(x, weight, parallel.group, parallel.sequence, products))


def multiply_in(module: nn.Module, products: Products) -> None:
    """Have the parallel linear maps of a module multiply so."""
    for part in module.modules():
        if isinstance(part, _ParallelLinear):
            part.products = products


class _ParallelLinear(nn.Linear):
    """A rank's part of a linear map; a bias starts at zero."""

    products = PRODUCTS

    def __init__(self, in_features: int, out_features: int, parallel: TensorParallel, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.parallel = parallel
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))


class _ColumnParallel(_ParallelLinear):
    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """``width``: only so many columns of this rank's output, its first ones."""
        weight = self.weight if width is None else self.weight[:width]
        out = column_parallel(x, weight, self.parallel, self.products)
        return out if self.bias is None else out + self.bias[:width]


class _RowParallel(_ParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        out = self.parallel.leave(self.products(x, self.weight))
        return out if self.bias is None else out + self.bias


class _ColumnLinear(torch.autograd.Function):
    """Enter and multiply in one node, so that the backward collective overlaps the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: Group, sequence: bool, products: Products
    ) -> Tensor:
        whole_BTC = gather_sequence(x, group) if sequence else x
        ctx.save_for_backward(whole_BTC, weight)
        ctx.group, ctx.sequence, ctx.products = group, sequence, products
        return products.linear(whole_BTC, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTW: Tensor) -> tuple[Tensor | None, ...]:
        whole_BTC, weight = ctx.saved_tensors
        for_x = for_weight = work = None
        if ctx.needs_input_grad[0]:
            for_x = ctx.products.for_input(gradient_BTW, weight)
            if ctx.sequence:
                for_x, work = ctx.group.reduce_scatter(split_sequence(for_x, ctx.group), asynchronous=True)
            else:
                work = ctx.group.all_reduce(for_x, asynchronous=True)
        if ctx.needs_input_grad[1]:
            for_weight = ctx.products.for_weight(gradient_BTW, whole_BTC)
        if work is not None:  # there was something to send
            work.wait()
        return for_x, for_weight, None, None, None


class _Reduce(torch.autograd.Function):
    """Sums in place: what a matrix product or a lookup puts out is nobody else's."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(partial)
        group.all_reduce(partial)
        return partial

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_BTC: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(split_sequence(partial_BTC, group))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSC: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(gradient_BSC, ctx.group), None


def split_sequence(x_BTC: Tensor, group: Group) -> Tensor:
    """[B, T, C] → [size, B, S, C]; a copy unless B = 1."""
    B, T, C = x_BTC.shape
    return x_BTC.view(B, group.size, T // group.size, C).transpose(0, 1).contiguous()


def gather_sequence(x_BSC: Tensor, group: Group) -> Tensor:
    """[B, S, C] of every rank → [B, T, C]; needs no copy after the collective if B = 1."""
    B, S, C = x_BSC.shape
    return group.all_gather(x_BSC).transpose(0, 1).reshape(B, group.size * S, C)
