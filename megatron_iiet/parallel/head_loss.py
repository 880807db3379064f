"""Losses of logits that are never whole, with the vocabulary split over the tensor-parallel ranks.

They are made a chunk of tokens at a time, of this rank's part of the vocabulary, and turned into a loss and,
where somebody wants them, its gradients at once: none of them is kept or made again. Of every token each rank
contributes a few numbers (the cross-entropy its maximum, sum of exponentials and target logit): one
all-gather for each chunk, whatever the vocabulary. The backward pass only scales, and sends what entering any
block does.

Shapes: B batch, T sequence, S this rank's part of it or T, D hidden, V vocabulary of a rank without padding,
n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.extension import has_cpu_kernels
from megatron_iiet.ops.products import add_product, product_dtype, write_product
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import TensorParallel, gather_sequence, split_sequence
from megatron_iiet.parallel.vocabulary import IGNORED

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk of tokens, 64 MB in fp32; more where that were fewer tokens than D."""


def chunks_of(tokens: int, hidden: int, width: int, most: int | None = None) -> list[slice]:
    """Equal chunks of so many tokens, of ``most`` or, if that is not given, at least two.

    To add a chunk's part to the head's gradient moves as many bytes as a pass over D tokens' logits: chunks
    of fewer would be slower, and save no more memory than that gradient takes.
    """
    if most is None:
        most = min(-(-tokens // 2), max(hidden, CHUNK_ELEMENTS // max(1, width), 1))
    count = -(-tokens // most)
    size = -(-tokens // count)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class Columns(NamedTuple):
    """A rank's columns of the logits that are no padding: ``valid`` from ``first`` on."""

    first: int
    valid: int

    @classmethod
    def of(cls, width: int, vocab_size: int, group: Group) -> Columns:
        """``width``: a rank's columns; those from ``vocab_size`` on are padding."""
        first = group.rank * width
        return cls(first, max(0, min(width, vocab_size - first)))


class Targets:
    """What the tokens of a chunk predict."""

    def __init__(self, targets_n: Tensor, columns: Columns) -> None:
        local_n = targets_n - columns.first
        self.counts_n = targets_n != IGNORED
        self._here_n = (local_n >= 0) & (local_n < columns.valid) & self.counts_n
        self.columns_n = local_n.masked_fill(~self._here_n, -1)
        """This rank's; -1 where another rank has the target or nothing counts."""

    def logits_of(self, logits_nV: Tensor) -> Tensor:
        """The target's logit, 0 where another rank has it, [n]."""
        if not logits_nV.shape[1]:
            return logits_nV.new_zeros(len(logits_nV))
        columns_n1 = self.columns_n.clamp(min=0).unsqueeze(-1)
        return logits_nV.gather(-1, columns_n1).squeeze(-1).masked_fill(~self._here_n, 0.0)

    def subtract_from(self, softmax_nV: Tensor, scale: Tensor | None) -> Tensor:
        """``softmax - scale · one-hot target``, in place; scale None is 1."""
        if not softmax_nV.shape[1]:
            return softmax_nV
        ones_n = self._here_n.to(softmax_nV.dtype)
        columns_n1 = self.columns_n.clamp(min=0).unsqueeze(-1)
        return softmax_nV.scatter_add_(-1, columns_n1, -_scaled(ones_n, scale).unsqueeze(-1))


def _scaled(factor_n: Tensor, scale: Tensor | None) -> Tensor:
    return factor_n if scale is None else factor_n * scale


class Head:
    """States and a rank's rows of the head, in the type that they are multiplied in; ``dtype``: of the
    logits, if not this one."""

    def __init__(
        self,
        states_nD: Tensor,
        weight: Tensor,
        vocab_size: int,
        group: Group,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.columns = Columns.of(len(weight), vocab_size, group)
        products = product_dtype(states_nD.dtype, states_nD.device)
        self.states_nD = states_nD.to(products)
        self.weight = weight[: self.columns.valid].to(products)
        self._buffer = states_nD.new_empty(0, dtype=dtype or products)

    def logits(self, rows: slice) -> Tensor:
        """Of a chunk, [n, V]; to be written over, and the next call's are in the same place."""
        states_nD = self.states_nD[rows]
        if not len(self._buffer):  # the first chunk is the largest
            self._buffer = self._buffer.new_empty(len(states_nD), self.columns.valid)
        return write_product(self._buffer[: len(states_nD)], states_nD, self.weight.t())


Gradient = Callable[[Tensor | None], Tensor]
"""Makes the gradient by a chunk's logits, for an upstream gradient, of which None is 1."""


def cross_entropy(
    logits_nV: Tensor, targets: Targets, group: Group, *, fused: bool = False
) -> tuple[Tensor, Gradient]:
    """Cross-entropy in nats of each token of a chunk, [n] fp32, 0 where the target is IGNORED, and what makes
    the gradient of their sum by the logits. These are written over now or then: fp32 ones by torch's
    operators; ``fused``: those of any type by kernels of the CPU, one for the sums, one for the gradient."""
    wide = bool(logits_nV.shape[1])
    if wide and fused:
        parts_3n = torch.ops.megatron_iiet.cross_entropy_parts(logits_nV, targets.columns_n)
    else:
        parts_3n = logits_nV.new_zeros(3, len(logits_nV), dtype=torch.float32)
        parts_3n[0] = -torch.inf
        parts_3n[2] = targets.logits_of(logits_nV)
    if wide and not fused:
        top_n1 = logits_nV.amax(-1, keepdim=True)
        parts_3n[0] = top_n1.squeeze(-1)
        parts_3n[1] = logits_nV.sub_(top_n1).exp_().sum(-1)
    tops, sums, of_targets = group.all_gather(parts_3n).unbind(1)
    top_n = tops.amax(0)
    sum_n = (sums * (tops - top_n).exp()).sum(0)
    losses_n = top_n + sum_n.log() - of_targets.sum(0)

    def gradient(scale: Tensor | None) -> Tensor:
        if fused:
            factor_n = _scaled(targets.counts_n.float(), scale)
            numbers = targets.columns_n, top_n, factor_n / sum_n, factor_n
            return torch.ops.megatron_iiet.cross_entropy_gradient_(logits_nV, *numbers) if wide else logits_nV
        factor_n = ((parts_3n[0] - top_n).exp() / sum_n).masked_fill(~targets.counts_n, 0.0)
        return targets.subtract_from(logits_nV.mul_(_scaled(factor_n, scale).unsqueeze(-1)), scale)

    return losses_n.masked_fill(~targets.counts_n, 0.0), gradient


ChunkLoss = Callable[[slice, Tensor, Targets], tuple[Tensor, Gradient]]
"""From a chunk's rows, logits (its own to write over) and targets: sums over its tokens, [k] fp32, and what
makes the gradient of the first by the logits, which is called at most once, and where nothing is to learn
(validation) not at all."""


def head_loss(
    states_BSD: Tensor,
    weight: Tensor,
    targets_BT: Tensor,
    of_chunk: ChunkLoss,
    *,
    vocab_size: int,
    parallel: TensorParallel,
    chunk_tokens: int | None = None,
    upstream: Tensor | None = None,
    logits_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The sums of all chunks: the first, an fp32 scalar, which has a gradient, and the others, [k - 1].

    ``states_BSD`` are what the head multiplies, ``weight`` this rank's rows of it; columns of the logits from
    ``vocab_size`` on are padding and count nothing. ``upstream``: about the gradient that the first sum will
    get, by which a loss scale lifts gradients above what fp16 rounds to zero; they are lifted here already.
    ``logits_dtype``: in which ``of_chunk`` gets them, None for what the products are made in.
    """
    wanted = tuple(x.requires_grad and torch.is_grad_enabled() for x in (states_BSD, weight))
    options = of_chunk, vocab_size, parallel, chunk_tokens, upstream, logits_dtype, wanted
    return cast(tuple[Tensor, Tensor], _HeadLoss.apply(states_BSD, weight, targets_BT, *options))


def head_cross_entropy(
    states_BSD: Tensor,
    weight: Tensor,
    targets_BT: Tensor,
    *,
    vocab_size: int,
    parallel: TensorParallel,
    chunk_tokens: int | None = None,
    upstream: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORED; see :func:`head_loss`. Backend
    ``cpu`` has kernels of its own for it, which leave logits in the type that products are made in.

    Raises:
        ValueError: the backend is not there.
    """
    fused = has_cpu_kernels(backend)

    def of_chunk(rows: slice, logits_nV: Tensor, targets: Targets) -> tuple[Tensor, Gradient]:
        losses_n, gradient = cross_entropy(logits_nV, targets, parallel.group, fused=fused)
        return losses_n.sum().unsqueeze(0), gradient

    options: dict[str, Any] = {"vocab_size": vocab_size, "parallel": parallel}
    options |= {"chunk_tokens": chunk_tokens, "upstream": upstream}
    options |= {"logits_dtype": None if fused else torch.float32}
    return head_loss(states_BSD, weight, targets_BT, of_chunk, **options)[0]


class _HeadLoss(torch.autograd.Function):
    """The gradients are computed beside the loss, for an upstream gradient of 1 or the one that is expected,
    and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        states_BSD: Tensor,
        weight: Tensor,
        targets_BT: Tensor,
        of_chunk: ChunkLoss,
        vocab_size: int,
        parallel: TensorParallel,
        chunk_tokens: int | None,
        expected: Tensor | None,
        logits_dtype: torch.dtype | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        states_BTD = gather_sequence(states_BSD, parallel.group) if parallel.cuts_sequence else states_BSD
        targets_n = targets_BT.flatten()
        head = Head(states_BTD.flatten(0, -2), weight, vocab_size, parallel.group, logits_dtype)
        for_states = torch.empty_like(head.states_nD) if wanted[0] else None
        for_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted[1] else None
        sums = []
        for rows in chunks_of(len(targets_n), weight.shape[1], len(weight), chunk_tokens):
            of_rows, gradient = of_chunk(rows, head.logits(rows), Targets(targets_n[rows], head.columns))
            sums.append(of_rows)
            if not any(wanted):
                continue
            gradient_nV = gradient(expected).to(head.weight.dtype)
            if for_states is not None:
                torch.mm(gradient_nV, head.weight, out=for_states[rows])
            if for_weight is not None:
                add_product(for_weight[: head.columns.valid], gradient_nV.t(), head.states_nD[rows])
        if for_states is not None:
            for_states = for_states.view(states_BTD.shape)
        ctx.gradients, ctx.expected = (for_states, for_weight), expected
        ctx.parallel, ctx.dtypes = parallel, (states_BSD.dtype, weight.dtype)
        total, others = torch.stack(sums).sum(0).split([1, len(sums[0]) - 1])
        total, others = total.squeeze(0).clone(), others.clone()
        ctx.mark_non_differentiable(others)
        return total, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of the head's loss were taken already"
        # Ours alone from here on: they are scaled in place.
        (for_states, for_weight), ctx.gradients = ctx.gradients, None
        group, work = ctx.parallel.group, None
        upstream = upstream if ctx.expected is None else upstream / ctx.expected
        if for_states is not None:
            # In fp32: a rounded factor would be a bias of the whole gradient.
            for_states = for_states.float().mul_(upstream).to(ctx.dtypes[0])
            if ctx.parallel.cuts_sequence:
                for_states, work = group.reduce_scatter(split_sequence(for_states, group), asynchronous=True)
            else:
                work = group.all_reduce(for_states, asynchronous=True)
        if for_weight is not None:
            for_weight = for_weight.mul_(upstream).to(ctx.dtypes[1])
        if work is not None:
            work.wait()
        return for_states, for_weight, *(None,) * 8
