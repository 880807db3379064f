"""Where the tokens of a sample stand, and which of them attend to each other.

A sample is one document, or several one after another, maybe with padding at the end. ``positions_BT`` says
which: each token's place in its document within the sample, so that 0 starts a new one. A padding token has
position 0 as well: it is a document of its own and attends to itself, so that no row of a mask is empty.

Shapes: B batch, T sequence (always the whole one), H query heads, G key/value heads, K head width, N
blocks of queries or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.rope import rotary_frequencies
from megatron_iiet.ops.attention import causal_attention, has_causal_attention
from megatron_iiet.ops.pointwise import rotate, rotated_heads
from megatron_iiet.ops.products import product_dtype

FLEX_BLOCK = 128
"""Queries and keys of one block of flex_attention, its default."""

NARROWEST_FLEX_HEAD = 16
"""Head width below which the kernels of flex_attention do not compile."""


class Rotary(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), half-split layout as in LLaMA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length = config.max_position_embeddings
        frequencies, factor = rotary_frequencies(config)
        angles = torch.outer(torch.arange(self.length, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.register_buffer("cos", cos.repeat(1, 2), persistent=False)
        # The rotation swaps the halves and negates one: the sign sits in the table, so a roll does the swap.
        self.register_buffer("signed_sin", torch.cat((-sin, sin), dim=-1), persistent=False)

    def forward(
        self, length: int, dtype: torch.dtype, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines in ``dtype``: of the first ``length`` positions, [T, K] each, or of the
        positions given, [B, 1, T, K].

        Raises:
            ValueError: the sequence is longer than the table.
        """
        if length > self.length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the rotary table "
                f"(model.max_position_embeddings = {self.length}); shorten it or enlarge the table"
            )
        cos, sin = (self.get_buffer(name)[:length].to(dtype) for name in ("cos", "signed_sin"))
        if positions_BT is None:
            return cos, sin
        return cos[positions_BT].unsqueeze(1), sin[positions_BT].unsqueeze(1)


@dataclass(frozen=True)
class AttentionLayout:
    """Rotary tables and mask of one micro-batch: made once a forward pass, shared by all evaluations of all
    layers, and kept by none (recomputation holds a reference)."""

    cos: Tensor
    """[T, K]; with documents [B, 1, T, K]."""
    signed_sin: Tensor
    """As :attr:`cos`."""
    mask: Tensor | BlockMask | None = None
    """None: causal. Else causal within each document, as SDPA or as flex_attention wants it."""

    def rotate(self, x_BHTK: Tensor) -> Tensor:
        """Apply the rotary tables to queries or keys."""
        return rotate(x_BHTK, self.cos, self.signed_sin)

    def rotated_heads(
        self, qkv_BTW: Tensor, heads: tuple[int, int], backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one product, the first two rotated; ``heads``: H and G."""
        return rotated_heads(qkv_BTW, heads, self.cos, self.signed_sin, backend)

    def attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, backend: str = "reference") -> Tensor:
        """Masked attention of rotated queries and keys, [B, H, T, K]."""
        if self.mask is None and has_causal_attention(q_BHTK, k_BGTK, backend):
            return causal_attention(q_BHTK, k_BGTK, v_BGTK)
        dtype = q_BHTK.dtype
        q, k, v = (x.to(product_dtype(dtype, x.device)) for x in (q_BHTK, k_BGTK, v_BGTK))
        grouped, mask = q_BHTK.shape[1] != k_BGTK.shape[1], self.mask
        if isinstance(mask, BlockMask):
            out_BHTK = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
        else:
            out_BHTK = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        return out_BHTK.to(dtype)


def attention_layout(
    rotary: Rotary, length: int, dtype: torch.dtype, positions_BT: Tensor | None
) -> AttentionLayout:
    """The layout of a micro-batch of ``length`` tokens a sample, whose stream has ``dtype``.

    Documents are kept apart by flex_attention's kernels on CUDA, which skip the blocks between documents, and
    by SDPA with a mask elsewhere.

    Raises:
        ValueError: the sequence is longer than the rotary table.
    """
    cos, signed_sin = rotary(length, dtype, positions_BT)
    if positions_BT is not None:
        dtype = product_dtype(dtype, cos.device)
        flex = positions_BT.is_cuda and cos.shape[-1] >= NARROWEST_FLEX_HEAD
        mask = document_block_mask(positions_BT) if flex else document_mask(positions_BT, dtype)
        return AttentionLayout(cos, signed_sin, mask)
    return AttentionLayout(cos, signed_sin)


def document_mask(positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """For SDPA: 0 where a query attends to a key, -inf elsewhere; [B, 1, T, T] in ``dtype``.

    Not boolean: SDPA would turn it into this and keep the copy for the backward pass, one an evaluation of a
    layer; of this one all keep a reference.
    """
    documents_BT = _documents(positions_BT)
    same_BTT = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
    apart_BTT = same_BTT.tril_().logical_not_()
    mask_BTT = torch.zeros(apart_BTT.shape, dtype=dtype, device=positions_BT.device)
    return mask_BTT.masked_fill_(apart_BTT, -torch.inf).unsqueeze(1)


def document_block_mask(positions_BT: Tensor) -> BlockMask:
    """For flex_attention: the blocks of [B, 1, T, T] in which some query attends to some key, and those in
    which every query does to every key.

    Documents are numbered in order, so that the first and the last of a block decide: nothing T x T is made.
    """
    T = positions_BT.shape[-1]
    documents_BT = _documents(positions_BT)
    # What fills up the last block is a document of its own: the kernels must look into that block.
    padded_BT = F.pad(documents_BT, (0, -T % FLEX_BLOCK), value=T + 1)
    blocks = padded_BT.unflatten(-1, (-1, FLEX_BLOCK))
    first_BN, last_BN = blocks[..., 0], blocks[..., -1]
    causal_NN = torch.ones(2 * first_BN.shape[-1:], dtype=torch.bool, device=blocks.device).tril()
    some_BNN = causal_NN & (first_BN.unsqueeze(-1) <= last_BN.unsqueeze(-2))
    every_BNN = causal_NN.tril(-1) & (last_BN.unsqueeze(-1) == first_BN.unsqueeze(-2))

    def attends(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents_BT[b, query] == documents_BT[b, key])

    return BlockMask.from_kv_blocks(
        *_listed(some_BNN & ~every_BNN),
        *_listed(every_BNN),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=attends,
        seq_lengths=(T, T),
    )


def _listed(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of wanted blocks of keys, [B, 1, N], and the indices of all, the
    wanted ones first, [B, 1, N, N]."""
    indices = wanted_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_BNN.sum(-1, dtype=torch.int32).unsqueeze(1), indices.int().unsqueeze(1)


def _documents(positions_BT: Tensor) -> Tensor:
    """The number of each token's document within its sample, [B, T] int32."""
    return (positions_BT == 0).cumsum(-1, dtype=torch.int32)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled at first use, once for each shape; eager flex_attention has all T x T scores in memory."""
    return cast(Callable[..., Tensor], torch.compile(cast(Any, flex_attention), dynamic=False))
