"""Log-probabilities of given tokens from a model on any grid of processes. V: vocabulary of a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.vocabulary import cross_entropy


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
    losses_BT = cross_entropy(logits_BTV, targets_BT, vocab_size, group)
    width = logits_BTV.shape[-1]
    first = group.rank * width
    valid = max(0, min(width, vocab_size - first))
    # fp64 holds every id, and every logit exactly.
    best_2BT = torch.full((2, *targets_BT.shape), -torch.inf, dtype=torch.float64, device=targets_BT.device)
    if valid:
        best, index = logits_BTV[..., :valid].max(-1)
        best_2BT[0], best_2BT[1] = best, index + first
    maxima, ids = group.all_gather(best_2BT).unbind(1)
    likeliest_BT = ids.masked_fill(maxima != maxima.amax(0), torch.inf).amin(0)
    return TokenScores(-losses_BT.cpu(), (likeliest_BT == targets_BT).cpu())


@contextmanager
def noting_scores(model: Transformer) -> Iterator[list[TokenScores]]:
    """Inside the block the scores of every batch whose loss ``model`` computes are added to the list.

    An engine's forward pass ends in the loss in every layout (ZeRO-3, pipeline stages), and hands out no
    logits; this is where they are. Ranks without the head compute no loss and note nothing.
    """
    found: list[TokenScores] = []
    vocab_size, group = model.config.model.vocab_size, model.parallel.group

    def loss(logits_BTV: Tensor, targets_BT: Tensor, divisor: float | Tensor | None = None) -> Tensor:
        scores = score_tokens(logits_BTV, targets_BT, vocab_size, group)
        found.append(scores)
        losses = -scores.log_probs.to(logits_BTV.device)
        return losses.mean() if divisor is None else losses.sum() / divisor

    model.loss = loss  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del model.loss  # the class's own again
