"""The losses of distillation, with the vocabulary or the sequence split over the tensor-parallel ranks.

Neither model's logits are ever whole, see :mod:`megatron_iiet.parallel.head_loss`; of every token a rank
contributes seven numbers.

Shapes: B batch, T sequence, S this rank's part of it or T, D hidden, V vocabulary of a rank without padding,
n tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.head_loss import Gradient, Head, Targets, head_loss
from megatron_iiet.parallel.tensor import TensorParallel, gather_sequence


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
    chunk_tokens: int | None = None,
    upstream: Tensor | None = None,
) -> PredictionLoss:
    """Cross-entropy of the student, and temperature² · KL(teacher || student) of their
    softmax(logits / temperature).

    Hidden states are what the heads multiply, weights this rank's rows of the heads; columns of the
    logits from ``vocab_size`` on are padding and count nothing. The cross-entropy knows no temperature. The
    teacher gets no gradient, and a token whose target is IGNORED does not count. ``chunk_tokens``: whose
    logits are made at once; ``upstream`` as in :func:`head_loss`.
    """
    group = parallel.group
    with torch.no_grad():
        if parallel.cuts_sequence:
            teacher_BSD = gather_sequence(teacher_BSD, group)
        teacher = Head(teacher_BSD.flatten(0, -2), teacher_weight, vocab_size, group)

    def of_chunk(rows: slice, mine_nV: Tensor, targets: Targets) -> tuple[Tensor, Gradient]:
        losses, gradient = _chunk(mine_nV, teacher.logits(rows), targets, kl_weight, temperature, group)
        return torch.cat(((losses[0] + kl_weight * losses[1]).unsqueeze(0), losses)), gradient

    total, parts = head_loss(
        student_BSD,
        student_weight,
        targets_BT,
        of_chunk,
        vocab_size=vocab_size,
        parallel=parallel,
        chunk_tokens=chunk_tokens,
        upstream=upstream,
    )
    return PredictionLoss(total, *parts.unbind())


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


def _chunk(
    mine_nV: Tensor,
    taught_nV: Tensor,
    targets: Targets,
    kl_weight: float,
    temperature: float,
    group: Group,
) -> tuple[Tensor, Gradient]:
    """Sums of cross-entropy and divergence over the tokens that count, [2], and what makes the gradient of
    cross-entropy + kl_weight · divergence by ``mine_nV``, [n, V]; both logits are overwritten."""
    t, n, valid = temperature, *mine_nV.shape
    # Maxima of both models; sums of exponentials, the student's without temperature and with it, the
    # teacher's; the target's logit; the teacher's exponentials times how far its logits are above, summed.
    parts = mine_nV.new_zeros(7, n)
    parts[:2] = -torch.inf
    parts[5] = targets.logits_of(mine_nV)
    if valid:
        top_n1, taught_top_n1 = mine_nV.amax(-1, keepdim=True), taught_nV.amax(-1, keepdim=True)
        parts[0], parts[1] = top_n1.squeeze(-1), taught_top_n1.squeeze(-1)
        above_nV = taught_nV - mine_nV
        taught_nV = taught_nV.sub_(taught_top_n1).div_(t).exp_()
        parts[4] = taught_nV.sum(-1)
        parts[6] = above_nV.mul_(taught_nV).sum(-1).div_(t)
        mine_nV.sub_(top_n1)
        cooled_nV = mine_nV if t == 1 else (mine_nV / t).exp_()
        mine_nV.exp_()
        parts[2], parts[3] = mine_nV.sum(-1), cooled_nV.sum(-1)

    tops, taught_tops, sums, cooled_sums, taught_sums, of_targets, aboves = group.all_gather(parts).unbind(1)
    top_n, taught_top_n = tops.amax(0), taught_tops.amax(0)
    shrink = ((taught_tops - taught_top_n) / t).exp()
    sum_n = (sums * (tops - top_n).exp()).sum(0)
    cooled_sum_n = (cooled_sums * ((tops - top_n) / t).exp()).sum(0)
    taught_sum_n = (taught_sums * shrink).sum(0)
    ce_n = top_n + sum_n.log() - of_targets.sum(0)
    log_ratio_n = (top_n - taught_top_n) / t + cooled_sum_n.log() - taught_sum_n.log()
    kl_n = ((aboves * shrink).sum(0) / taught_sum_n + log_ratio_n) * t**2
    losses = torch.stack([x.masked_fill(~targets.counts_n, 0.0).sum() for x in (ce_n, kl_n)])

    def gradient(scale: Tensor | None) -> Tensor:
        if not valid:
            return mine_nV
        # Softmaxes are the exponentials above times a number a token.
        factor_n = (parts[0] - top_n).exp() / sum_n
        cooled_factor_n = kl_weight * t * ((parts[0] - top_n) / t).exp() / cooled_sum_n
        taught_factor_n = kl_weight * t * ((parts[1] - taught_top_n) / t).exp() / taught_sum_n
        factors = [
            x.masked_fill(~targets.counts_n, 0.0).mul(1.0 if scale is None else scale).unsqueeze(-1)
            for x in (factor_n, cooled_factor_n, taught_factor_n)
        ]
        if t == 1:
            gradient_nV = mine_nV.mul_(factors[0] + factors[1])
        else:
            gradient_nV = mine_nV.mul_(factors[0]).addcmul_(cooled_nV, factors[1])
        return targets.subtract_from(gradient_nV.addcmul_(taught_nV, factors[2], value=-1.0), scale)

    return losses, gradient


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
