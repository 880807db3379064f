"""The losses of distillation, with the vocabulary or the sequence split over the tensor-parallel ranks.

Logits are made a chunk of tokens at a time, of this rank's part of the vocabulary, and turned into losses and
gradients at once: none of them is kept or made again. Every rank contributes its maxima and sums of
exponentials: one all-gather of seven numbers a token for each chunk, whatever the vocabulary.

Shapes: B batch, T sequence, S this rank's part of it or T, D hidden, V padded vocabulary of a rank, n tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.products import matmul
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import TensorParallel, gather_sequence, split_sequence
from megatron_iiet.parallel.vocabulary import CHUNK_ELEMENTS, IGNORED


class PredictionLoss(NamedTuple):
    """Sums over the tokens that count, in nats, fp32 scalars."""

    total: Tensor
    """Cross-entropy + kl_weight · divergence; the one that has a gradient."""
    cross_entropy: Tensor
    kl_divergence: Tensor


def prediction_loss(
    student_BSD: Tensor,
    student_weight: Tensor,
    teacher_BSD: Tensor,
    teacher_weight: Tensor,
    targets_BT: Tensor,
    *,
    vocab_size: int,
    kl_weight: float,
    temperature: float,
    parallel: TensorParallel,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> PredictionLoss:
    """Cross-entropy of the student, and temperature² · KL(teacher || student) of their
    softmax(logits / temperature).

    Hidden states are what the heads multiply, weights this rank's rows of the heads [V, D]; columns of the
    logits from ``vocab_size`` on are padding and count nothing. The cross-entropy knows no temperature. The
    teacher gets no gradient, and a token whose target is IGNORED does not count. ``chunk_elements``: logits
    of one model made at once.
    """
    sums = _PredictionLoss.apply(
        student_BSD,
        student_weight,
        teacher_BSD,
        teacher_weight,
        targets_BT,
        vocab_size,
        kl_weight,
        temperature,
        parallel,
        chunk_elements,
    )
    return PredictionLoss(*cast(tuple[Tensor, Tensor, Tensor], sums))


def hidden_mse(
    student_BSD: Tensor, teacher_BSD: Tensor, counts_BT: Tensor, parallel: TensorParallel
) -> Tensor:
    """Sum over the tokens that count of the mean over D of (teacher - student)², fp32 scalar.

    ``counts_BT``: 1 or true where a token counts, of the whole sequence. Under sequence parallelism the value
    is the sum over all ranks' parts; the gradient is this rank's, and sends nothing. The teacher gets none.
    """
    if parallel.cuts_sequence:
        counts_BT = counts_BT.chunk(parallel.group.size, dim=1)[parallel.group.rank]
    return cast(Tensor, _HiddenMSE.apply(student_BSD, teacher_BSD, counts_BT, parallel))


class _PredictionLoss(torch.autograd.Function):
    """The gradient is computed beside the loss, for an upstream gradient of 1, and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        student_BSD: Tensor,
        student_weight: Tensor,
        teacher_BSD: Tensor,
        teacher_weight: Tensor,
        targets_BT: Tensor,
        vocab_size: int,
        kl_weight: float,
        temperature: float,
        parallel: TensorParallel,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = parallel.group
        if parallel.cuts_sequence:
            student_BSD, teacher_BSD = (gather_sequence(x, group) for x in (student_BSD, teacher_BSD))
        student_nD, teacher_nD = student_BSD.flatten(0, -2), teacher_BSD.flatten(0, -2)
        targets_n = targets_BT.flatten()
        width = len(student_weight)
        valid = max(0, min(width, vocab_size - group.rank * width))
        rows_of_heads = student_weight[:valid], teacher_weight[:valid]
        for_student = torch.zeros_like(student_nD)
        for_weight = torch.zeros(student_weight.shape, dtype=torch.float32, device=student_weight.device)
        sums = torch.zeros(2, dtype=torch.float32, device=student_nD.device)
        step = max(1, chunk_elements // width)
        for start in range(0, len(targets_n), step):
            rows = slice(start, start + step)
            mine_nV = matmul(student_nD[rows], rows_of_heads[0].t()).float()
            taught_nV = matmul(teacher_nD[rows], rows_of_heads[1].t()).float()
            local_n = targets_n[rows] - group.rank * width
            counts_n = targets_n[rows] != IGNORED
            losses, gradient = _chunk(mine_nV, taught_nV, local_n, counts_n, kl_weight, temperature, group)
            sums += losses
            gradient = gradient.to(student_nD.dtype)
            for_student[rows] = matmul(gradient, rows_of_heads[0])
            for_weight[:valid] += matmul(gradient.t(), student_nD[rows])
        ctx.save_for_backward(for_student.view(student_BSD.shape), for_weight)
        ctx.parallel, ctx.dtype = parallel, student_weight.dtype
        ce, kl = sums.unbind()
        ce, kl = ce.clone(), kl.clone()
        ctx.mark_non_differentiable(ce, kl)
        return ce + kl_weight * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        for_student_BTD, for_weight = ctx.saved_tensors
        group = ctx.parallel.group
        # In fp32: a rounded factor would be a bias of the whole gradient.
        for_student_BTD = (for_student_BTD.float() * upstream).to(for_student_BTD.dtype)
        if ctx.parallel.cuts_sequence:
            for_student_BTD, _ = group.reduce_scatter(split_sequence(for_student_BTD, group))
        else:
            group.all_reduce(for_student_BTD)
        return for_student_BTD, (for_weight * upstream).to(ctx.dtype), *(None,) * 8


def _chunk(
    mine_nV: Tensor,
    taught_nV: Tensor,
    local_n: Tensor,
    counts_n: Tensor,
    kl_weight: float,
    temperature: float,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and divergence over the tokens that count, [2], and the gradient of cross-entropy
    + kl_weight · divergence by ``mine_nV``, [n, V]; both logits are overwritten.

    ``local_n``: the targets' columns, outside [0, V) on other ranks.
    """
    t, n, valid = temperature, *mine_nV.shape
    here_n = (local_n >= 0) & (local_n < valid)
    local_n1 = local_n.masked_fill(~here_n, 0).unsqueeze(-1)
    # Maxima of both models; sums of exponentials, the student's without temperature and with it, the
    # teacher's; the target's logit; the teacher's exponentials times how far its logits are above, summed.
    parts = mine_nV.new_zeros(7, n)
    parts[:2] = -torch.inf
    if valid:
        top_n1, taught_top_n1 = mine_nV.amax(-1, keepdim=True), taught_nV.amax(-1, keepdim=True)
        parts[0], parts[1] = top_n1.squeeze(-1), taught_top_n1.squeeze(-1)
        parts[5] = mine_nV.gather(-1, local_n1).squeeze(-1).masked_fill(~here_n, 0.0)
        above_nV = taught_nV - mine_nV
        taught_nV = taught_nV.sub_(taught_top_n1).div_(t).exp_()
        parts[4] = taught_nV.sum(-1)
        parts[6] = above_nV.mul_(taught_nV).sum(-1).div_(t)
        mine_nV.sub_(top_n1)
        cooled_nV = mine_nV if t == 1 else (mine_nV / t).exp_()
        mine_nV.exp_()
        parts[2], parts[3] = mine_nV.sum(-1), cooled_nV.sum(-1)

    tops, taught_tops, sums, cooled_sums, taught_sums, targets, aboves = group.all_gather(parts).unbind(1)
    top_n, taught_top_n = tops.amax(0), taught_tops.amax(0)
    shrink = ((taught_tops - taught_top_n) / t).exp()
    sum_n = (sums * (tops - top_n).exp()).sum(0)
    cooled_sum_n = (cooled_sums * ((tops - top_n) / t).exp()).sum(0)
    taught_sum_n = (taught_sums * shrink).sum(0)
    ce_n = top_n + sum_n.log() - targets.sum(0)
    log_ratio_n = (top_n - taught_top_n) / t + cooled_sum_n.log() - taught_sum_n.log()
    kl_n = ((aboves * shrink).sum(0) / taught_sum_n + log_ratio_n) * t**2
    losses = torch.stack([x.masked_fill(~counts_n, 0.0).sum() for x in (ce_n, kl_n)])
    if not valid:
        return losses, mine_nV

    # Softmaxes are the exponentials above times a number a token.
    factor_n = (parts[0] - top_n).exp() / sum_n
    cooled_factor_n = kl_weight * t * ((parts[0] - top_n) / t).exp() / cooled_sum_n
    taught_factor_n = kl_weight * t * ((parts[1] - taught_top_n) / t).exp() / taught_sum_n
    factors = [
        x.masked_fill(~counts_n, 0.0).unsqueeze(-1) for x in (factor_n, cooled_factor_n, taught_factor_n)
    ]
    if t == 1:
        gradient_nV = mine_nV.mul_(factors[0] + factors[1])
    else:
        gradient_nV = mine_nV.mul_(factors[0]).addcmul_(cooled_nV, factors[1])
    gradient_nV.addcmul_(taught_nV, factors[2], value=-1.0)
    hit_n = (here_n & counts_n).to(gradient_nV.dtype)
    return losses, gradient_nV.scatter_add_(-1, local_n1, -hit_n.unsqueeze(-1))


class _HiddenMSE(torch.autograd.Function):
    """Keeps the states as they came, no fp32 copy of them."""

    @staticmethod
    def forward(
        ctx: Any, student_BSD: Tensor, teacher_BSD: Tensor, counts_BS: Tensor, parallel: TensorParallel
    ) -> Tensor:
        ctx.save_for_backward(student_BSD, teacher_BSD, counts_BS)
        squares_BS = (student_BSD.float() - teacher_BSD).square_().mean(-1)
        total = (squares_BS * counts_BS).sum()
        if parallel.cuts_sequence:
            parallel.group.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student_BSD, teacher_BSD, counts_BS = ctx.saved_tensors
        difference = student_BSD.float() - teacher_BSD
        scale_BS = counts_BS * (gradient * 2 / student_BSD.shape[-1])
        return difference.mul_(scale_BS.unsqueeze(-1)).to(student_BSD.dtype), None, None, None
