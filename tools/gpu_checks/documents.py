"""Attention within documents: flex_attention's kernels and SDPA with a mask are one function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gpu_checks.base import Figure, Setting, largest, race
from megatron_iiet.config import config_from_dict
from megatron_iiet.models.attention_layout import (
    AttentionLayout,
    Rotary,
    attention_layout,
    document_block_mask,
    document_mask,
)
from megatron_iiet.ops.products import product_dtype

BOUNDS = {torch.float32: "<= 1e-04", torch.bfloat16: "<= 0.01"}


def positions(length: int, batch: int, documents: int) -> Tensor:
    """Samples of documents one after another, [B, T]; each sample cut elsewhere."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch):
        starts = torch.randperm(length - 1, generator=generator)[: documents - 1] + 1
        edges = [0, *sorted(starts.tolist()), length]
        rows.append(torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(edges)]))
    return torch.stack(rows)


def run(layout: AttentionLayout, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in qkv]
    q, k, v = leaves
    out = layout.attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def by_documents(positions_BT: Tensor, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Each document by itself, in fp64, written out: what both must be."""
    leaves = [t.detach().double().requires_grad_() for t in qkv]
    q, k, v = leaves
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    number = (positions_BT == 0).cumsum(-1)
    apart = (number.unsqueeze(-1) != number.unsqueeze(-2)) | torch.ones_like(
        scores[0, 0], dtype=torch.bool
    ).triu(1)
    out = scores.masked_fill(apart.unsqueeze(1), -torch.inf).softmax(-1) @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.double())]


def check(setting: Setting) -> Iterator[Figure]:
    """Both against each document by itself; and the time of each on long samples."""
    length, batch, heads, width = (160, 2, 4, 16) if setting.toy else (2048, 2, 16, 64)
    model = {"hidden_size": heads * width, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    model |= {"ffn_hidden_size": 32, "num_layers": 1, "vocab_size": 64, "max_position_embeddings": length}
    config = config_from_dict({"model": model, "data": {"sequence_length": length}})
    rotary = Rotary(config.model).to(setting.device)
    positions_BT = positions(length, batch, 7).to(setting.device)
    for dtype, bound in BOUNDS.items():
        generator = torch.Generator().manual_seed(1)
        q, k, v, gradient = (
            torch.randn(batch, h, length, width, generator=generator).to(setting.device, dtype)
            for h in (heads, heads // 2, heads // 2, heads)
        )
        wanted = by_documents(positions_BT, [q, k, v], gradient)
        tables = attention_layout(rotary, length, dtype, positions_BT)
        products = product_dtype(dtype, positions_BT.device)
        masks: dict[str, Tensor | BlockMask] = {"mask": document_mask(positions_BT, products)}
        if setting.device == "cuda":
            masks["flex"] = document_block_mask(positions_BT)
        contenders: dict[str, Callable[[], list[Tensor]]] = {}
        for name, mask in masks.items():
            layout = AttentionLayout(tables.cos, tables.signed_sin, mask)
            contenders[name] = partial(run, layout, [q, k, v], gradient)
            errors = [
                ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
                for a, b in zip(contenders[name](), wanted, strict=True)
            ]
            label = f"error of {name}, {str(dtype)[6:]}, values and gradients"
            yield Figure(label, largest(errors), "", "each document alone, fp64", bound)
        if "flex" in masks:
            times = race(contenders, setting.device, 15, lambda: setting.left > 3)
            faster, note = times["mask"] / times["flex"], f"{times['flex'] * 1e3:.2f} ms"
            label = f"flex, {str(dtype)[6:]}, forward and backward"
            yield Figure(label, faster, "times faster", "SDPA with the mask", note=note)
