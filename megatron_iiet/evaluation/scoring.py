"""Log-probabilities of given tokens from a model on any grid of processes. V: vocabulary of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.head_loss import Columns, Head, Targets, chunks_of, cross_entropy
from megatron_iiet.parallel.tensor import gather_sequence


class TokenScores(NamedTuple):
    """Of every token given its predecessors, on the CPU."""

    log_probs: Tensor
    """fp32 [B, T], nats."""
    greedy: Tensor
    """bool [B, T]: whether it is the likeliest token (of several equal ones the first)."""


class Scorer(Protocol):
    """A model as the harness needs it."""

    context: ParallelContext
    """Where this process stands; the replicas share the work."""
    max_length: int
    """The longest input, in tokens."""
    batch_size: int
    """Sequences of ``max_length`` at once."""
    multiple: int = 1
    """What the length of an input must be a multiple of."""
    has_fixed_shape: bool = False
    """Whether every batch must be [batch_size, max_length + 1]."""

    def score(self, batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        """Scores of the tokens behind the first one: int64 [B, T + 1] → [B, T], for each batch in order;
        nothing on ranks without the model's head. Every rank of a replica is given the same batches, every
        replica equally many. The iterator must be read to its end."""


@torch.no_grad()
def score_tokens(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int, group: Group) -> TokenScores:
    """Scores of ``targets`` from each rank's columns of the logits; five numbers a token are gathered,
    whatever the vocabulary. Columns from ``vocab_size`` on are padding."""
    logits_nV = logits_BTV.flatten(0, -2)
    columns = Columns.of(logits_nV.shape[1], vocab_size, group)

    def logits_of(rows: slice) -> Tensor:
        return logits_nV[rows, : columns.valid].to(torch.float32, copy=True)

    return _scores(logits_of, targets_BT, columns, chunks_of(len(logits_nV), 0, logits_nV.shape[1]), group)


@torch.no_grad()
def score_stream(model: Transformer, y_BTD: Tensor, targets_BT: Tensor) -> TokenScores:
    """Scores of ``targets`` from the final stream of a model, whose logits are never whole."""
    assert model.norm is not None
    group, weight, states_BTD = model.parallel.group, model.head_weight, model.norm(y_BTD)
    if model.parallel.cuts_sequence:
        states_BTD = gather_sequence(states_BTD, group)
    head = Head(states_BTD.flatten(0, -2), weight, model.config.model.vocab_size, group)
    chunks = chunks_of(targets_BT.numel(), weight.shape[1], len(weight))
    return _scores(head.logits, targets_BT, head.columns, chunks, group)


def _scores(
    logits_of: Callable[[slice], Tensor],
    targets_BT: Tensor,
    columns: Columns,
    chunks: list[slice],
    group: Group,
) -> TokenScores:
    """``logits_of``: a chunk's, fp32, to be written over."""
    targets_n = targets_BT.flatten()
    losses_n = targets_n.new_empty(targets_n.shape, dtype=torch.float32)
    # fp64 holds every id, and every logit exactly.
    best_2n = targets_n.new_full((2, len(targets_n)), -torch.inf, dtype=torch.float64)
    for rows in chunks:
        logits_nV = logits_of(rows)
        if columns.valid:
            best, index = logits_nV.max(-1)
            best_2n[0, rows], best_2n[1, rows] = best, index + columns.first
        losses_n[rows], _ = cross_entropy(logits_nV, Targets(targets_n[rows], columns), group)
    maxima, ids = group.all_gather(best_2n).unbind(1)
    likeliest_n = ids.masked_fill(maxima != maxima.amax(0), torch.inf).amin(0)
    greedy_BT = (likeliest_n == targets_n).view_as(targets_BT)
    return TokenScores(-losses_n.view_as(targets_BT).cpu(), greedy_BT.cpu())


@contextmanager
def noting_scores(model: Transformer) -> Iterator[list[TokenScores]]:
    """Inside the block the scores of every batch whose loss ``model`` computes are added to the list.

    An engine's forward pass ends in the loss in every layout (ZeRO-3, pipeline stages), and hands out no
    stream; this is where it is. Ranks without the head compute no loss and note nothing.
    """
    found: list[TokenScores] = []

    def loss(y_BTD: Tensor, targets_BT: Tensor, divisor: float | Tensor | None = None) -> Tensor:
        scores = score_stream(model, y_BTD, targets_BT)
        found.append(scores)
        losses = -scores.log_probs.to(y_BTD.device)
        return losses.mean() if divisor is None else losses.sum() / divisor

    model.loss = loss  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del model.loss  # the class's own again
