"""The vocabulary split over the tensor-parallel ranks: embedding, and a loss that never gathers logits.

Shapes: B batch, T sequence, D hidden, V padded vocabulary of one rank, n tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import TensorParallel, mark_sharded

IGNORED = -100
"""The target of a token whose prediction does not count; its loss is 0, and so is its gradient."""

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk of tokens; bounds the fp32 temporaries of the loss to 64 MB each."""

_CPU_CHUNK_ELEMENTS = 1 << 19
"""The same on a CPU: temporaries that stay in its cache, and that the allocator does not give back to the
system each time (fresh pages took a quarter of the training step of a small model)."""


class VocabularyEmbedding(nn.Module):
    """An embedding whose rows are split over the tensor-parallel ranks; leaves a block (one collective)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.parallel = parallel
        shard = Shard(0, (num_embeddings,))
        rows, _ = shard.local_shape((num_embeddings, embedding_dim), parallel.group.size)
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim))
        mark_sharded(self.weight, shard, parallel.group.size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → [B, T, D], or [B, S, D] under sequence parallelism."""
        if self.parallel.group.size == 1:
            return F.embedding(tokens_BT, self.weight)
        rows = self.weight.shape[0]
        local_BT = tokens_BT - self.parallel.group.rank * rows
        elsewhere_BT = (local_BT < 0) | (local_BT >= rows)
        found_BTD = F.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return self.parallel.leave(found_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0.0))


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int, group: Group) -> Tensor:
    """Cross-entropy in nats of every token, [B, T] fp32, from each rank's columns of the logits.

    Each rank contributes its maximum, sum of exponentials and target logit: one all-gather of three
    numbers a token, whatever the vocabulary. Columns from ``vocab_size`` on are padding and count nothing.
    The backward pass sends nothing. Where the target is IGNORED there is no loss and no gradient.
    """
    loss = _CrossEntropy.apply(logits_BTV.flatten(0, -2), targets_BT.flatten(), vocab_size, group)
    return cast(Tensor, loss).view_as(targets_BT).masked_fill(targets_BT == IGNORED, 0.0)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came (not an fp32 copy, nor the softmax) and works through them in chunks."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, targets_n: Tensor, vocab_size: int, group: Group) -> Tensor:
        width = logits_nV.shape[1]
        first = group.rank * width
        valid = max(0, min(width, vocab_size - first))
        local_n = targets_n - first
        here_n = (local_n >= 0) & (local_n < valid)
        local_n = local_n.masked_fill(~here_n, 0)
        parts_3n = torch.empty(3, len(targets_n), dtype=torch.float32, device=logits_nV.device)
        for rows in _chunks(logits_nV):
            x = logits_nV[rows, :valid].float()
            if valid == 0:  # all of this rank's columns are padding
                parts_3n[:, rows] = torch.tensor([[-torch.inf], [0.0], [0.0]], device=x.device)
                continue
            maximum = x.amax(-1)
            target = x.gather(-1, local_n[rows, None]).squeeze(-1).masked_fill(~here_n[rows], 0.0)
            parts_3n[0, rows] = maximum
            parts_3n[1, rows] = (x - maximum.unsqueeze(-1)).exp_().sum(-1)
            parts_3n[2, rows] = target
        maxima, sums, targets = group.all_gather(parts_3n).unbind(1)
        maximum = maxima.amax(0)
        log_sum_n = maximum + (sums * (maxima - maximum).exp()).sum(0).log()
        ctx.save_for_backward(logits_nV, local_n, here_n, log_sum_n)
        ctx.valid = valid
        return log_sum_n - targets.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n: Tensor) -> tuple[Tensor | None, ...]:
        logits_nV, local_n, here_n, log_sum_n = ctx.saved_tensors
        out = torch.empty_like(logits_nV)
        out[:, ctx.valid :] = 0.0
        if ctx.valid == 0:
            return out, None, None, None
        for rows in _chunks(logits_nV):
            softmax = (logits_nV[rows, : ctx.valid].float() - log_sum_n[rows, None]).exp_()
            hit = -here_n[rows, None].to(softmax.dtype)
            softmax.scatter_add_(-1, local_n[rows, None], hit)
            out[rows, : ctx.valid] = softmax.mul_(gradient_n[rows, None]).to(out.dtype)
        return out, None, None, None


def _chunks(logits_nV: Tensor) -> list[slice]:
    n, width = logits_nV.shape
    elements = _CPU_CHUNK_ELEMENTS if logits_nV.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, elements // max(1, width))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
