"""The CPU's causal attention in bf16 against its formula in fp64, and beside torch's own in bf16."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_iiet.ops.attention import causal_attention, has_causal_attention
from megatron_iiet.ops.extension import load_extension
from tests.ops.inputs import needs_extension

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _runs() -> bool:
    return load_extension().loaded and torch.ops.megatron_iiet.has_attention()


needs_kernels = pytest.mark.skipif(not _runs(), reason="this CPU does not multiply bf16")


def drawn(B: int, H: int, G: int, T: int, K: int, *, joined: bool) -> list[Tensor]:
    """q, k, v and a gradient, parts of one [B, T, heads, K] as they come in a layer, or each for itself."""
    generator = torch.Generator().manual_seed(1000 * T + K)
    all_BTHK = torch.randn(B, T, 2 * H + 2 * G, K, generator=generator).bfloat16()
    parts = all_BTHK.transpose(1, 2).split((H, G, G, H), dim=1)
    return [part if joined else part.contiguous() for part in parts]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def results(function: Function, qkv: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


# A query alone; blocks of 96 and 256 (128 backward) and their edges; heads that share keys; odd lengths.
SHAPES = [
    (1, 2, 2, 1, 16),
    (1, 2, 1, 2, 16),
    (2, 2, 2, 17, 32),
    (1, 4, 2, 96, 48),
    (1, 4, 1, 97, 80),
    (1, 2, 2, 257, 64),
    (2, 4, 2, 391, 128),
]


@needs_kernels
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_the_formula(shape: tuple[int, ...], joined: bool) -> None:
    """Output and gradients are as close to fp64's as torch's in bf16 are, each query's."""
    *qkv, upstream = drawn(*shape, joined=joined)
    exact = results(formula, [x.double() for x in qkv], upstream)
    ours, torchs = (results(function, qkv, upstream) for function in (causal_attention, sdpa))
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert mine.shape == wanted.shape
        size = wanted.norm()
        assert (mine - wanted).norm() <= 1.15 * (theirs - wanted).norm() + 1e-6 * size
        rows = (mine - wanted).norm(dim=-1)
        assert (rows <= 0.05 * wanted.norm(dim=-1) + 5e-3 * size / math.sqrt(rows.numel())).all()


@needs_kernels
def test_out_is_as_the_next_map_reads_it() -> None:
    *qkv, _ = drawn(2, 4, 2, 20, 32, joined=True)
    out = causal_attention(*qkv)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, causal_attention(*qkv))


@needs_kernels
def test_large_scores_stay_numbers() -> None:
    """Their exponentials are beyond fp32; the maximum is taken off, block by block."""
    *qkv, upstream = drawn(1, 2, 2, 300, 32, joined=False)
    qkv[0] = qkv[0] * 60
    exact = results(formula, [x.double() for x in qkv], upstream)
    for mine, wanted in zip(results(causal_attention, qkv, upstream), exact, strict=True):
        assert (mine - wanted).norm() < 0.02 * wanted.norm()


@needs_kernels
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_no_number_stays_none(part: int) -> None:
    """A NaN of a token reaches what attends to it; and nothing before it, but of a value, times weight 0."""
    *qkv, upstream = drawn(1, 2, 2, 120, 32, joined=False)
    qkv[part][0, 0, 50, 3] = math.nan
    out, *gradients = results(causal_attention, qkv, upstream)
    seen = out.isnan().any(-1)
    assert not seen[0, 1].any()
    assert seen[0, 0, 50 : 51 if part == 0 else None].all()
    if part < 2:
        assert seen.sum() == (1 if part == 0 else 70)
    assert any(gradient.isnan().any() for gradient in gradients)


@needs_kernels
def test_threads_share_the_heads() -> None:
    *qkv, upstream = drawn(2, 3, 3, 50, 32, joined=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(causal_attention, qkv, upstream))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@needs_kernels
def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _, _ = drawn(1, 2, 2, 8, 32, joined=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert has_causal_attention(q, k, "cpu")
    assert not has_causal_attention(q, k, "reference")
    assert not has_causal_attention(q.float(), k.float(), "cpu")
    assert not has_causal_attention(q[..., :8], k[..., :8], "cpu")
    assert not has_causal_attention(q.to("meta"), k.to("meta"), "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not has_causal_attention(q, k, "cpu")


@needs_extension
@pytest.mark.parametrize(
    ("q", "k", "said"),
    [
        ((1, 2, 5, 16), (1, 2, 6, 16), r"k is \[1, 2, 6, 16\] BFloat16, expected \[1, 2, 5, 16\]"),
        ((1, 3, 5, 16), (1, 2, 5, 16), "the heads of q one of those of k"),
        ((1, 2, 5, 24), (1, 2, 5, 24), "the width of a head is a multiple of 16"),
        ((2, 5, 16), (1, 2, 5, 16), r"q is \[2, 5, 16\]"),
    ],
)
def test_refusals(q: tuple[int, ...], k: tuple[int, ...], said: str) -> None:
    if not _runs():
        said = "this CPU does not multiply bf16"
    keys = torch.zeros(k, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=said):
        causal_attention(torch.zeros(q, dtype=torch.bfloat16), keys, keys)
