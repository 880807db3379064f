"""The logits of a micro-batch are never whole in training, in one tensor or in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_iiet.parallel import head_loss
from tests.models.conftest import Build
from tests.ops.inputs import needs_extension

B, T, VOCABULARY = 4, 32, 5000


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator puts out."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_never_whole(
    build: Build, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is their gradient: all that there is at once takes less than one of them."""
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    model = build(model={"vocab_size": VOCABULARY, "tie_embeddings": tied}).to(dtype)
    head = model.head_weight.numel()
    tokens = torch.randint(VOCABULARY, (B, T + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()

    with Largest() as seen:
        step()
    assert seen.elements == head  # of its gradient; six chunks of 22 tokens are smaller
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    results = record.profiler.kineto_results  # type: ignore[union-attr]
    assert results is not None
    level = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    assert 2 * head * dtype.itemsize < most < B * T * VOCABULARY * 4


@needs_extension
def test_the_loss_is_the_kernels(build: Build, tokens: torch.Tensor) -> None:
    """Of the model's backend: they take a chunk's logits as the products give them."""
    model = build()
    model.backend = "cpu"
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert seen.count("megatron_iiet.cross_entropy_parts.default") == 2
    assert seen.count("megatron_iiet.cross_entropy_gradient_.default") == 2
