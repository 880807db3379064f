"""The vocabulary-parallel loss on one rank against torch's; several ranks are the parity matrix's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_iiet.parallel import Group, vocabulary
from megatron_iiet.parallel.vocabulary import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("padded", "vocab"), [(40, 40), (64, 40)])
@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_loss_and_gradient_are_torchs(
    dtype: torch.dtype, padded: int, vocab: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_CPU_CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 5, padded, generator=generator)).to(dtype)
    kept = logits.clone()
    targets = torch.randint(vocab, (3, 5), generator=generator)
    weights = torch.rand(3, 5, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy(ours, targets, vocab, Group())
    expected = F.cross_entropy(
        theirs[..., :vocab].float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view(3, 5)
    torch.testing.assert_close(loss, expected)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(ours.detach(), kept), "the logits were written over"
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[..., vocab:].any()
