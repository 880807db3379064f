"""The CPU's kernels of the cross-entropy against its formula in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.ops.extension import load_extension
from tests.ops.inputs import needs_extension

pytestmark = needs_extension

ROWS = 6
COLUMNS = (0, -1, 2, 4, -1, 3)
"""Of each row; -1 where another rank has the target."""
FACTORS = (1.0, 0.25, 0.0, 2.0, 1.0, 1.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels() -> Any:
    assert load_extension().loaded
    return torch.ops.megatron_iiet


def drawn(width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (6 * torch.randn(ROWS, width, generator=generator)).to(dtype)


def columns_of(width: int) -> Tensor:
    """The last column is among them."""
    return torch.tensor([min(column, width - 1) if column != 3 else width - 1 for column in COLUMNS])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 127, 128, 131, 1000, 32001])
def test_parts(width: int, dtype: torch.dtype) -> None:
    logits, columns = drawn(width, dtype), columns_of(width)
    before = logits.clone()
    tops, sums, own = kernels().cross_entropy_parts(logits, columns)
    exact = logits.double()
    assert torch.equal(tops, exact.amax(-1).float())
    wanted = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(sums.double(), wanted, rtol=3e-6, atol=0)
    here = columns >= 0
    assert torch.equal(own[here], logits[here].gather(1, columns[here, None]).squeeze(1).float())
    assert not own[~here].any()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 127, 128, 131, 1000, 32001])
def test_gradient_is_rounded_once(width: int, dtype: torch.dtype) -> None:
    logits, columns = drawn(width, dtype), columns_of(width)
    exact, factors = logits.double(), torch.tensor(FACTORS)
    # As of a vocabulary of which this is a part: top and sum are of all of it.
    tops, sums = (exact.amax(-1) + 0.5).float(), torch.full((ROWS,), 3.0 * width)
    shares = factors / sums
    wanted = (exact - tops.unsqueeze(1)).exp() * shares.double().unsqueeze(1)
    here = columns >= 0
    wanted[here] -= torch.nn.functional.one_hot(columns[here], width) * factors.double()[here].unsqueeze(1)
    found = kernels().cross_entropy_gradient_(logits, columns, tops, shares, factors)
    assert found.data_ptr() == logits.data_ptr()
    tiny = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-30
    torch.testing.assert_close(
        found.double(), wanted, rtol=torch.finfo(dtype).eps / 2 + 5e-6, atol=tiny * torch.finfo(dtype).eps
    )
    assert not found[factors == 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 130, 200])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none(value: float, place: int, dtype: torch.dtype) -> None:
    """Of its row alone."""
    logits = drawn(201, dtype)
    logits[1, place] = value
    columns = columns_of(201)
    tops, sums, own = kernels().cross_entropy_parts(logits, columns)
    assert (tops + sums.log() - own).isnan().tolist() == [row == 1 for row in range(ROWS)]
    found = kernels().cross_entropy_gradient_(logits, columns, tops, 1 / sums, torch.ones(ROWS))
    assert found[1].isnan().all()
    assert found[[0, 2, 3, 4, 5]].isfinite().all()


def test_threads_share_the_rows() -> None:
    logits = drawn(50_000, torch.bfloat16)
    columns = columns_of(50_000)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = kernels().cross_entropy_parts(logits, columns)
            numbers = columns, parts[0], 1 / parts[1], torch.ones(ROWS)
            gradient = kernels().cross_entropy_gradient_(logits.clone(), *numbers)
            found.append((parts, gradient))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": torch.tensor([0, 8, 0, 0, 0, 0])}, r"columns\[1\] is 8, beyond the logits' 8"),
        ({"columns": torch.zeros(5, dtype=torch.int64)}, r"columns is \[5\].*expected int64 \[6\]"),
        ({"columns": torch.zeros(6)}, "columns is .* Float, expected int64"),
        ({"logits": torch.zeros(6, 8, dtype=torch.float64)}, "logits is Double"),
        ({"logits": torch.zeros(8, 6).t()}, r"logits is \[6, 8\], expected \[n, V\], contiguous"),
        ({"logits": torch.zeros(6, 0)}, "V > 0"),
        ({"factors": torch.ones(5)}, r"factors is \[5\] Float, expected fp32 \[6\]"),
        ({"tops": torch.ones(6, dtype=torch.float64)}, "tops is .* Double, expected fp32"),
        ({"shares": torch.ones(6, 1)}, r"shares is \[6, 1\] Float, expected fp32 \[6\]"),
    ],
)
def test_refusals(changes: dict[str, Tensor], said: str) -> None:
    arguments = {
        "logits": torch.zeros(6, 8),
        "columns": torch.zeros(6, dtype=torch.int64),
        "tops": torch.ones(6),
        "shares": torch.ones(6),
        "factors": torch.ones(6),
    } | changes
    with pytest.raises((ValueError, IndexError), match=said):
        kernels().cross_entropy_gradient_(*arguments.values())
    if not changes.keys() & {"factors", "tops", "shares"}:
        with pytest.raises((ValueError, IndexError), match=said):
            kernels().cross_entropy_parts(arguments["logits"], arguments["columns"])
