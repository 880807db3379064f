"""Several documents in a sample are as if each were alone; and what it costs in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.inputs import Inputs, inputs_of
from megatron_iiet.models import Transformer, attention_layout
from megatron_iiet.models.attention_layout import AttentionLayout, document_block_mask, document_mask
from megatron_iiet.ops.products import product_dtype
from megatron_iiet.parallel.vocabulary import IGNORED
from tests.models.conftest import Build, randomise_solvers

SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl"},
    "predictor-euler": {"kind": "iiet", "iterations": 2, "predictor": "euler"},
    "mixed": {"kind": "iiet", "iterations": [2, 0, 1, 3]},
    **{f"paper-{r}": {"kind": "iiet", "iterations": r} for r in range(4)},
    **{f"released-{r}": {"kind": "iiet", "variant": "released", "iterations": r} for r in range(4)},
}
# 17 tokens a row. A document of one token, one that ends with the window, one that starts with its last token
# (a token the model never reads), padding, and a row of one document alone.
LENGTHS = [[5, 1, 7, 4], [9, 7, 1], [2, 9, *[1] * 6], [17]]


def positions_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def packed(vocabulary: int = 61) -> Batch:
    positions = positions_of(LENGTHS)
    tokens = torch.randint(vocabulary, positions.shape, generator=torch.Generator().manual_seed(3))
    return Batch(tokens, positions, float((positions[:, 1:] > 0).sum()))


def documents_of(batch: Batch) -> list[tuple[int, int, Tensor]]:
    """Row, first column and tokens of each document."""
    documents = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            documents.append((row, start, batch.tokens[row, start : start + length]))
            start += length
    return documents


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 3], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_documents_are_as_if_alone(build: Build, solver: dict[str, Any], kv_heads: int) -> None:
    """Logits, loss and every gradient; the reference never sees a position or a mask."""
    model = build(**solver, model={"num_key_value_heads": kv_heads})
    randomise_solvers(model)
    batch = packed()
    inputs = inputs_of(batch)
    logits = model(inputs.tokens, positions_BT=inputs.positions)
    loss = model(*inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    total = torch.zeros(())
    for row, start, tokens in documents_of(batch):
        read = tokens[: 16 - start]
        if len(read) == 0:
            continue
        alone = model(read.unsqueeze(0))[0]
        torch.testing.assert_close(logits[row, start : start + len(read)], alone, rtol=1e-5, atol=1e-5)
        if len(tokens) > 1:
            total = total + F.cross_entropy(alone[: len(tokens) - 1], tokens[1:], reduction="sum")
    expected = total / batch.count
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        found = gradients[name]
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-5 * max(scale, 1e-2), msg=name)


def test_nothing_leaks(build: Build) -> None:
    """To the bit: other documents' tokens and padding change no logit of a document."""
    model = build(kind="iiet", iterations=2)
    randomise_solvers(model)
    inputs = inputs_of(packed())
    assert inputs.positions is not None
    wanted = model(inputs.tokens, positions_BT=inputs.positions)
    for row, start, tokens in documents_of(packed()):
        others = inputs.tokens.clone()
        inside = torch.zeros_like(others, dtype=torch.bool)
        inside[row, start : start + len(tokens)] = True
        others = torch.where(inside, others, (others + 7) % 61)
        found = model(others, positions_BT=inputs.positions)
        assert torch.equal(found[inside], wanted[inside])
        assert not torch.equal(found[~inside], wanted[~inside])


def test_one_document_is_the_plain_path(build: Build, tokens: Tensor) -> None:
    model = build(kind="iiet", iterations=1)
    positions = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model(tokens, positions_BT=positions), model(tokens), rtol=1e-5, atol=1e-6)


def test_positions_start_anew(build: Build) -> None:
    """Attention sees differences of rotary positions only: nothing but rounding would tell if they went on
    counting. So to the bit: what is rotated is as if its document were alone."""
    rotary = build().rotary
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 3, 17, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        for lengths in LENGTHS:
            layout = attention_layout.attention_layout(rotary, 17, dtype, positions_of([lengths]))
            parts = []
            for part in x.split(lengths, dim=2):
                alone = attention_layout.attention_layout(rotary, part.shape[2], dtype, None)
                parts.append(alone.rotate(part))
            assert torch.equal(layout.rotate(x), torch.cat(parts, dim=2))


def test_mask_by_hand() -> None:
    """Two documents and two tokens of padding."""
    wanted = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    positions = torch.tensor([[0, 0, 1, 2, 0, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        mask = document_mask(positions, dtype)
        assert mask.dtype == dtype
        assert torch.equal(mask, torch.where(wanted, 0.0, -torch.inf).to(dtype).view(1, 1, 6, 6))
    # The same function of four indices, which is what flex_attention's kernels are compiled from.
    block_mask = document_block_mask(positions)
    at = torch.arange(6)
    zero = torch.tensor(0)
    assert torch.equal(block_mask.mask_mod(zero, zero, at.view(6, 1), at), wanted)


def test_too_long_a_sample_of_short_documents(build: Build) -> None:
    """A sample is no longer than the rotary table, even if each of its documents is far shorter."""
    with pytest.raises(ValueError, match="a sequence of 33 tokens is longer than the rotary table"):
        build()(torch.zeros(1, 33, dtype=torch.long), positions_BT=torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_mask_is_kept(build: Build, dtype: torch.dtype) -> None:
    """Of all that the backward pass needs, one tensor is T x T, however many layers and iterations there are;
    without positions none is."""
    model = build(kind="iiet", iterations=3).to(dtype)
    inputs = inputs_of(packed())

    def kept(inputs: Inputs) -> list[int]:
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[-2:] == (16, 16):
                storages[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*inputs).backward()
        return [tensor.untyped_storage().nbytes() for tensor in storages.values()]

    in_products = product_dtype(dtype, torch.device("cpu"))
    assert kept(inputs) == [len(LENGTHS) * 16 * 16 * in_products.itemsize]
    assert not kept(inputs._replace(positions=None))


@pytest.mark.parametrize("recompute", ["off", "layer", "evaluation"])
def test_one_mask_is_made(build: Build, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward and a backward pass together."""
    made = []

    def spy(*arguments: Any) -> Tensor:
        made.append(document_mask(*arguments))
        return made[-1]

    monkeypatch.setattr(attention_layout, "document_mask", spy)
    model = build(kind="iiet", iterations=3, training={"recompute": recompute})
    model(*inputs_of(packed())).backward()
    assert len(made) == 1


def test_ignored_targets(build: Build) -> None:
    """No loss, no gradient; the sum of the others over the divisor."""
    model = build()
    tokens, targets, positions, divisor = inputs_of(packed())
    assert divisor is not None
    y = model.integrate(*model.embed(tokens), tokens.shape[1], positions).detach().requires_grad_()
    loss = model.loss(y, targets, divisor)
    (found,) = torch.autograd.grad(loss, y)
    logits = model.project(y)[..., :61]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / divisor, y)
    torch.testing.assert_close(loss, expected / divisor)
    torch.testing.assert_close(found, wanted)
    assert not found[targets == IGNORED].any()
    assert (targets == IGNORED).sum() == targets.numel() - divisor
    nothing = model.loss(y, torch.full_like(targets, IGNORED), 1.0)
    assert nothing.item() == 0.0


LONG = [[130, 1, 60, 9, *[1] * 10], [40, 40, 40, 40, 40, 10], [210]]


def random_qkv(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, heads, 210, 16, generator=generator) for heads in (4, kv_heads, kv_heads)]


def layouts(lengths: list[list[int]] = LONG) -> tuple[AttentionLayout, AttentionLayout]:
    """The same documents for SDPA and for flex_attention; several blocks of 128 tokens."""
    positions, none = positions_of(lengths), torch.empty(0)
    masks = document_mask(positions, torch.float32), document_block_mask(positions)
    return AttentionLayout(none, none, masks[0]), AttentionLayout(none, none, masks[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_is_sdpa(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, on the CPU: outputs and gradients."""
    monkeypatch.setattr(attention_layout, "_compiled_flex_attention", lambda: flex.flex_attention)
    # It refuses gradients on CPUs, where its kernels have no backward pass; uncompiled there are no kernels.
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    results = []
    for layout in layouts():
        qkv = [x.requires_grad_() for x in random_qkv(kv_heads)]
        out = layout.attend(*qkv)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad((out * weights).sum(), qkv)))
    for sdpa, flexible in zip(*results, strict=True):
        torch.testing.assert_close(flexible, sdpa, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@given(st.data())
def test_blocks_are_those_of_the_mask(data: st.DataObject) -> None:
    """Torch's own search of the whole mask finds the same blocks, to be looked into and whole ones."""
    length = data.draw(st.sampled_from([1, 127, 128, 129, 384, 500]))
    starts = data.draw(st.lists(st.lists(st.integers(0, length - 1), max_size=8), min_size=1, max_size=3))
    rows = [sorted({0, *row, length}) for row in starts]
    positions = positions_of([[b - a for a, b in itertools.pairwise(row)] for row in rows])
    found = document_block_mask(positions)
    wanted = flex.create_block_mask(found.mask_mod, len(rows), None, length, length, device="cpu")
    assert found.seq_lengths == wanted.seq_lengths
    assert found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(found, f"{kind}_num_blocks"), getattr(wanted, f"{kind}_num_blocks")
        indices = getattr(found, f"{kind}_indices"), getattr(wanted, f"{kind}_indices")
        for ours, torchs in (counts, indices):
            assert ours.dtype == torchs.dtype
            assert torch.equal(ours, torchs), kind


@pytest.mark.slow
def test_compiled_flex_attention() -> None:
    """Compiled, on the CPU, forward only; other documents in the same shape do not compile it again."""
    counters.clear()
    qkv = random_qkv(2)
    with torch.no_grad():
        for lengths in (LONG, LONG[::-1], [[100, 110], [210], [1] * 210]):
            sdpa, flexible = layouts(lengths)
            torch.testing.assert_close(flexible.attend(*qkv), sdpa.attend(*qkv), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_bf16_documents(build: Build) -> None:
    """A model in bf16 learns from packed documents what the fp32 one does, to bf16's precision."""
    inputs = inputs_of(packed())
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model: Transformer = build(kind="iiet", iterations=2).to(dtype)
        loss = model(*inputs)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
