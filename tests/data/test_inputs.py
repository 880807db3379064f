"""Which targets count, and what a batch's loss is divided by."""

from __future__ import annotations

import torch

from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.inputs import inputs_of
from megatron_iiet.data.loader.validation import ValidationBatch
from megatron_iiet.parallel.vocabulary import IGNORED

TOKENS = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
# A document that started before the window, another; a document of one token, one of two, padding.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 0, 0]])
TARGETS = [[11, 12, IGNORED, 14], [IGNORED, 22, IGNORED, IGNORED]]


def test_windows() -> None:
    tokens, targets, positions, divisor = inputs_of(Batch(TOKENS))
    assert tokens.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert targets.tolist() == [[11, 12, 13, 14], [21, 22, 23, 24]]
    assert positions is None
    assert divisor is None


def test_documents() -> None:
    inputs = inputs_of(Batch(TOKENS, POSITIONS, 2.5))
    assert inputs.tokens.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert inputs.targets.tolist() == TARGETS
    assert inputs.positions is not None
    assert inputs.positions.tolist() == [[0, 1, 2, 0], [0, 0, 1, 0]]
    assert inputs.divisor == 2.5
    assert inputs.counted.item() == 4


def test_a_global_batch_without_targets() -> None:
    """Its loss is 0, and not 0 / 0, which would end the run."""
    inputs = inputs_of(Batch(TOKENS, torch.zeros_like(TOKENS), 0.0))
    assert inputs.counted.item() == 0
    assert inputs.divisor == 1.0


def test_validation() -> None:
    """A filler row has no targets; the loss is a sum."""
    weights = torch.tensor([0.0, 1.0])
    plain = inputs_of(ValidationBatch(TOKENS, weights))
    assert plain.targets.tolist() == [[IGNORED] * 4, [21, 22, 23, 24]]
    assert (plain.positions, plain.divisor) == (None, 1.0)
    documents = inputs_of(ValidationBatch(TOKENS, weights, POSITIONS))
    assert documents.targets.tolist() == [[IGNORED] * 4, TARGETS[1]]
    assert documents.counted.item() == 1
