"""The head's loss on one rank against torch's on whole logits; several ranks are in
tests/distributed/test_distillation_loss.py and the parity matrix."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iiet.parallel import TensorParallel
from megatron_iiet.parallel.distillation_loss import prediction_loss
from megatron_iiet.parallel.head_loss import chunks_of, head_cross_entropy
from megatron_iiet.parallel.vocabulary import IGNORED
from tests.ops.inputs import needs_extension

B, T, D, VOCABULARY = 3, 5, 16, 40


def drawn(dtype: torch.dtype, padded: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """States, head and targets, of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, D, generator=generator).to(dtype) for n in (B * T, padded))
    targets = torch.randint(VOCABULARY, (B, T), generator=generator)
    targets[0, 3:] = IGNORED
    return states.view(B, T, D).requires_grad_(), weight.requires_grad_(), targets


def ours(
    states: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, backend: str = "reference"
) -> Tensor:
    parallel = TensorParallel()
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "chunk_tokens": chunk, "backend": backend}
    return head_cross_entropy(states, weight, targets, parallel=parallel, **options)


BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [40, 64])
@pytest.mark.parametrize("chunk", [1, 4, 1000, None])
def test_loss_and_gradients_are_torchs(
    dtype: torch.dtype, padded: int, chunk: int | None, backend: str
) -> None:
    states, weight, targets = drawn(dtype, padded)
    kept = states.detach().clone(), weight.detach().clone()
    loss = ours(states, weight, targets, chunk, backend)
    found = torch.autograd.grad(0.3 * loss, (states, weight))
    leaves = [x.detach().float().requires_grad_() for x in (states, weight)]
    logits = (leaves[0] @ leaves[1].t())[..., :VOCABULARY].flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    wanted = torch.autograd.grad(0.3 * expected, leaves)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - theirs).norm() < tolerance * theirs.norm()
    assert not found[0][targets == IGNORED].any()
    assert not found[1][VOCABULARY:].any()
    assert torch.equal(states, kept[0])
    assert torch.equal(weight, kept[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lifted", [False, True])
def test_small_gradients_in_fp16(lifted: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of a loss scale beforehand, it does not round small probabilities away where products are fp16."""
    monkeypatch.setattr("megatron_iiet.parallel.head_loss.product_dtype", lambda dtype, device: dtype)
    states, weight, targets = drawn(torch.float16)
    with torch.no_grad():  # token n of the vocabulary has a probability of about exp(-0.6 n)
        states.copy_(1 + 0.1 * states)
        weight.copy_(-0.6 / D * torch.arange(VOCABULARY).unsqueeze(1))
    targets = targets.clamp(min=IGNORED, max=5)
    upstream = torch.tensor(2.0**10)
    parallel, told = TensorParallel(), upstream if lifted else None
    loss = head_cross_entropy(
        states, weight, targets, vocab_size=VOCABULARY, parallel=parallel, upstream=told, backend=backend
    )
    found = torch.autograd.grad(0.5 * upstream * loss, (states, weight))
    leaves = [x.detach().double().requires_grad_() for x in (states, weight)]
    logits = (leaves[0] @ leaves[1].t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    wanted = torch.autograd.grad(0.5 * upstream * expected, leaves)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() < 2e-3 * theirs.norm()
    rare = slice(24, 30)
    error = (found[1] - wanted[1])[rare].norm() / wanted[1][rare].norm()
    assert bool(error < 3e-3) is lifted


def test_what_gets_no_gradient() -> None:
    states, weight, targets = drawn(torch.float32)
    loss = ours(states, weight, targets)
    with torch.no_grad():
        assert torch.equal(ours(states, weight, targets), loss)
        assert not ours(states, weight, targets).requires_grad
    whole = torch.autograd.grad(loss, (states, weight))
    for n, leaves in enumerate([(states, weight.detach()), (states.detach(), weight)]):
        (alone,) = torch.autograd.grad(ours(*leaves, targets), leaves[n])
        assert torch.equal(alone, whole[n])


class Counted(TorchDispatchMode):
    """Products, and passes that write logits of a chunk."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.shape, self.found = (chunk, VOCABULARY), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, made = function._schema.name.removeprefix("aten::"), function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_"):
            self.found["products"] += 1
        elif name.endswith("_") and isinstance(made, Tensor) and made.shape == self.shape:
            self.found["passes"] += 1
        return made


@pytest.mark.parametrize(("taught", "products", "passes"), [(False, 1, 2), (True, 2, 6)])
def test_a_loss_that_nobody_learns_from_costs_no_gradient(taught: bool, products: int, passes: int) -> None:
    """Validation and scoring: the head's product, and what the sum of exponentials takes."""
    states, weight, targets = drawn(torch.float32)
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "parallel": TensorParallel(), "chunk_tokens": 5}

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        if not taught:
            return head_cross_entropy(states, weight, targets, **options)
        options.update(kl_weight=0.5, temperature=1.0)
        return prediction_loss(states, weight, states.detach(), weight.detach(), targets, **options).total

    def counted(*leaves: Tensor) -> Counter[str]:
        with Counted(options["chunk_tokens"]) as mode:
            loss(*leaves)
        return mode.found

    chunks = B * T // options["chunk_tokens"]
    with torch.no_grad():
        validated = counted(states, weight)
    assert validated == {"products": chunks * products, "passes": chunks * passes}
    assert counted(states.detach(), weight.detach()) == validated
    learnt = counted(states, weight)
    assert learnt["products"] == chunks * (products + 2)
    assert learnt["passes"] > validated["passes"]


def test_gradients_are_handed_out_once() -> None:
    """They are scaled where they are: a second time would scale them again."""
    states, weight, targets = drawn(torch.float32)
    loss = ours(states, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="taken already"):
        loss.backward()


@pytest.mark.parametrize("tokens", [1, 2, 7, 512, 2048, 8192])
@pytest.mark.parametrize(("hidden", "width"), [(512, 32000), (16, 1 << 25), (4096, 128256), (64, 300)])
def test_chunks(tokens: int, hidden: int, width: int) -> None:
    chunks = chunks_of(tokens, hidden, width)
    assert [n for rows in chunks for n in range(rows.start, rows.stop)] == list(range(tokens))
    sizes = [rows.stop - rows.start for rows in chunks]
    assert max(sizes) <= max(hidden, (1 << 24) // width)
    assert len(chunks) >= 2 or tokens == 1
    assert max(sizes) - min(sizes) < len(sizes)
