"""A split takes what indexing takes, and joining undoes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.parallel.shard import Shard


@settings(max_examples=80)
@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    parts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    other=st.integers(1, 4),
    dim=st.integers(0, 1),
    flat=st.booleans(),
)
def test_take_is_indexing_and_join_undoes_it(
    size: int, parts: list[int], other: int, dim: int, flat: bool
) -> None:
    blocks = tuple(part * size for part in parts)
    dim = 0 if flat else dim
    shape = (sum(blocks),) if flat else (other, sum(blocks)) if dim else (sum(blocks), other)
    full, shard = torch.randn(shape), Shard(dim, blocks)
    locals_ = [shard.take(full, size, rank) for rank in range(size)]
    for rank, local in enumerate(locals_):
        held = torch.cat([block.chunk(size)[rank] for block in torch.arange(sum(blocks)).split(blocks)])
        assert torch.equal(local, full.index_select(dim, held))
        assert torch.equal(torch.cat([torch.arange(sum(blocks))[s] for s in shard.slices(size, rank)]), held)
        assert local.shape == shard.local_shape(shape, size)
        assert local.is_contiguous()
    assert torch.equal(shard.join(locals_), full)


def test_take_copies() -> None:
    full = torch.zeros(2, 2)
    Shard(0, (2,)).take(full, 1, 0).fill_(1.0)
    assert not full.any()


def test_blocks_must_make_up_the_shape() -> None:
    with pytest.raises(ValueError, match=r"blocks \[4, 2\] of dimension 0 sum to 6 .* shape \[8, 3\]"):
        Shard(0, (4, 2)).local_shape((8, 3), 2)
    with pytest.raises(ValueError, match=r"dimension 1 .* shape \[6\]"):
        Shard(1, (6,)).local_shape((6,), 2)
    for rows in (4, 8):  # neither is a part of it taken, nor one too short
        with pytest.raises(ValueError, match=rf"sum to 6 and do not make up a tensor of shape \[{rows}, 3\]"):
            Shard(0, (4, 2)).take(torch.zeros(rows, 3), 2, 0)


def test_every_block_must_divide() -> None:
    shard, message = Shard(0, (4, 2)), r"a block of 2 \(of \[4, 2\]\) does not split evenly over 4"
    with pytest.raises(ValueError, match=message):
        shard.local_shape((6,), 4)
    with pytest.raises(ValueError, match=message):
        shard.slices(4, 0)
    with pytest.raises(ValueError, match=message):
        shard.take(torch.zeros(6), 4, 0)
    with pytest.raises(ValueError, match=message):
        shard.join([torch.zeros(1)] * 4)


def test_the_rank_must_exist() -> None:
    with pytest.raises(ValueError, match="no tensor-parallel rank 2 of 2"):
        Shard(0, (4,)).slices(2, 2)
