"""The losses of distillation, with the vocabulary or the sequence split over the tensor-parallel ranks.

Logits are made a chunk of tokens at a time, of this rank's part of the vocabulary, and made again in the
backward pass: kept are the hidden states and a few numbers a token. Every rank contributes its maxima and
sums of exponentials: one all-gather of seven numbers a token, whatever the vocabulary.

Shapes: B batch, T sequence, S this rank's part of it or T, D hidden, V padded vocabulary of a rank, n tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.products import matmul
from megatron_iiet.parallel.tensor import TensorParallel, gather_sequence, split_sequence
from megatron_iiet.parallel.vocabulary import CHUNK_ELEMENTS, IGNORED


def cross_entropy_and_kl(
    student_BSD: Tensor,
    student_weight: Tensor,
    teacher_BSD: Tensor,
    teacher_weight: Tensor,
    targets_BT: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    parallel: TensorParallel,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """``(cross-entropy, KL(teacher || student) · temperature²)`` in nats of every token, fp32 [B, T] each.

    Hidden states are what the heads multiply, weights this rank's rows of the heads [V, D]; columns of the
    logits from ``vocab_size`` on are padding and count nothing. The divergence is of softmax(logits /
    temperature); the cross-entropy knows no temperature. The teacher gets no gradient, and both are 0,
    without gradient, where the target is IGNORED. ``chunk_elements``: logits of one model made at once.
    """
    parts = _CrossEntropyAndKL.apply(
        student_BSD,
        student_weight,
        teacher_BSD,
        teacher_weight,
        targets_BT,
        vocab_size,
        temperature,
        parallel,
        chunk_elements,
    )
    ignored_BT = targets_BT == IGNORED
    ce_BT, kl_BT = (part.view_as(targets_BT).masked_fill(ignored_BT, 0.0) for part in cast(Any, parts))
    return ce_BT, kl_BT


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


class _CrossEntropyAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_BSD: Tensor,
        student_weight: Tensor,
        teacher_BSD: Tensor,
        teacher_weight: Tensor,
        targets_BT: Tensor,
        vocab_size: int,
        temperature: float,
        parallel: TensorParallel,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor]:
        group = parallel.group
        if parallel.cuts_sequence:
            student_BSD, teacher_BSD = (gather_sequence(x, group) for x in (student_BSD, teacher_BSD))
        student_nD, teacher_nD = student_BSD.flatten(0, -2), teacher_BSD.flatten(0, -2)
        width = len(student_weight)
        valid = max(0, min(width, vocab_size - group.rank * width))
        local_n = targets_BT.flatten() - group.rank * width
        here_n = (local_n >= 0) & (local_n < valid)
        local_n = local_n.masked_fill(~here_n, 0)
        n = len(local_n)
        step = max(1, chunk_elements // max(1, width))
        chunks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        t = temperature

        # maxima of both models; sums of exponentials; the target's logit; the teacher's mean difference
        parts = torch.zeros(7, n, dtype=torch.float32, device=student_nD.device)
        parts[:2] = -torch.inf
        for rows in chunks if valid else []:
            mine = _logits(student_nD[rows], student_weight, valid)
            taught = _logits(teacher_nD[rows], teacher_weight, valid)
            top, taught_top = mine.amax(-1, keepdim=True), taught.amax(-1, keepdim=True)
            hit = mine.gather(-1, local_n[rows, None]).squeeze(-1)
            parts[0, rows], parts[1, rows] = top.squeeze(-1), taught_top.squeeze(-1)
            parts[2, rows] = (mine - top).exp_().sum(-1)
            parts[3, rows] = ((mine - top) / t).exp_().sum(-1)
            likely = ((taught - taught_top) / t).exp_()
            parts[4, rows] = likely.sum(-1)
            parts[5, rows] = hit.masked_fill(~here_n[rows], 0.0)
            parts[6, rows] = likely.mul_(taught.sub_(mine).div_(t)).sum(-1)
        tops, taught_tops, sums, cooled, taught_sums, targets, differences = group.all_gather(parts).unbind(1)
        top_n, taught_top_n = tops.amax(0), taught_tops.amax(0)
        shrink = ((taught_tops - taught_top_n) / t).exp()
        log_sum_n = top_n + (sums * (tops - top_n).exp()).sum(0).log()
        cooled_n = top_n / t + (cooled * ((tops - top_n) / t).exp()).sum(0).log()
        taught_sum_n = (taught_sums * shrink).sum(0)
        taught_n = taught_top_n / t + taught_sum_n.log()
        mean_n = (differences * shrink).sum(0) / taught_sum_n

        ctx.save_for_backward(
            student_nD,
            student_weight,
            teacher_nD,
            teacher_weight,
            local_n,
            here_n,
            log_sum_n,
            cooled_n,
            taught_n,
        )
        ctx.chunks, ctx.valid, ctx.temperature, ctx.parallel = chunks, valid, t, parallel
        ctx.shape = student_BSD.shape
        return log_sum_n - targets.sum(0), (mean_n - taught_n + cooled_n) * t**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_ce_n: Tensor, of_kl_n: Tensor) -> tuple[Tensor | None, ...]:
        student_nD, weight, teacher_nD, teacher_weight, local_n, here_n, *log_sums = ctx.saved_tensors
        log_sum_n, cooled_n, taught_n = log_sums
        t, valid, group = ctx.temperature, ctx.valid, ctx.parallel.group
        for_student = torch.zeros_like(student_nD)
        for_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in ctx.chunks if valid else []:
            mine = _logits(student_nD[rows], weight, valid)
            gradient = (mine - log_sum_n[rows, None]).exp_()
            gradient.scatter_add_(-1, local_n[rows, None], -here_n[rows, None].to(gradient.dtype))
            gradient *= of_ce_n[rows, None]
            taught = (_logits(teacher_nD[rows], teacher_weight, valid) / t - taught_n[rows, None]).exp_()
            cooled = (mine / t - cooled_n[rows, None]).exp_()
            gradient += cooled.sub_(taught).mul_(of_kl_n[rows, None] * t)
            gradient = gradient.to(student_nD.dtype)
            for_student[rows] = matmul(gradient, weight[:valid])
            for_weight[:valid] += matmul(gradient.t(), student_nD[rows])
        for_student_BTD = for_student.view(ctx.shape)
        if ctx.parallel.cuts_sequence:
            for_student_BTD, _ = group.reduce_scatter(split_sequence(for_student_BTD, group))
        else:
            group.all_reduce(for_student_BTD)
        return for_student_BTD, for_weight.to(weight.dtype), *(None,) * 7


def _logits(hidden_nD: Tensor, weight: Tensor, valid: int) -> Tensor:
    """fp32 [n, valid]."""
    return matmul(hidden_nD, weight[:valid].t()).float()


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
