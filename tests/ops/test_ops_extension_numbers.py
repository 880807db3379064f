"""The numbers of the extension: instruction sets, layouts, values at the edge, large slabs, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.ops import backends, extension
from tests.marks import long_but
from tests.ops.inputs import EPS, STORAGE, assert_close, draw, flatten, needs_extension, slabs

torch.set_num_threads(1)
pytestmark = needs_extension

ROOT = Path(__file__).parents[2]

bf16, fp32 = torch.bfloat16, torch.float32


# ------------------------------------------------------------------------------------ instruction sets

ON_ONE_ISA = """
import torch

from tests.ops.test_ops_extension_numbers import check_against_reference

torch.set_num_threads(2)
check_against_reference()
print(torch.backends.cpu.get_cpu_capability())
"""


def check_against_reference(
    widths: tuple[int, ...] = (1, 7, 64, 100, 128, 1000, 1024, 4099, 16384),
    heights: tuple[int, ...] = (0, 1, 3, 33),
) -> None:
    """Every operator in all storage types, on rows that are and are not whole vectors."""
    extension.load_extension()
    ops = torch.ops.megatron_iiet
    for h in widths:
        for rows in heights:
            for dtype in STORAGE:
                _check_one(ops, rows, h, dtype)


def _check_one(ops: Any, rows: int, h: int, dtype: torch.dtype) -> None:
    k = 1 + (h + rows) % 6  # with and without a whole group of slabs
    what = f"{rows} rows of {h} in {dtype}"
    x, *increments = slabs(1 + k, rows, h, dtype=dtype)
    c, w = draw(k, seed=1), draw(h, seed=2)
    # One rounding each: two results may be neighbours. And fp32 sums of h terms in another order.
    step = {fp32: 1e-6, bf16: 2**-8, torch.float16: 2**-11}[dtype]
    merged, normed, rstd = ops.merge_norm(x, increments, c, w, EPS)
    wanted, _ = backends.get_backend("reference").merge_norm(x, increments, c, None, EPS)
    assert_close(merged, wanted, f"{what}: merged", 2 * step)
    exact_rstd = (merged.double().square().mean(-1) + EPS).rsqrt()
    assert_close(rstd, exact_rstd, f"{what}: rstd", 2e-6)
    exact_normed = merged.double() * exact_rstd.unsqueeze(-1) * w.double()
    assert_close(normed, exact_normed, f"{what}: normed", 2 * step)

    grad_merged, grad_normed = draw(rows, h, seed=3).to(dtype), draw(rows, h, seed=4).to(dtype)
    base, for_weight, for_increments, for_row = ops.merge_norm_backward(
        grad_merged, grad_normed, merged, rstd, w, increments, c, True, True
    )
    y, dy, s = merged.double(), grad_normed.double(), exact_rstd.unsqueeze(-1)
    pulled = w.double() * dy
    gradient = grad_merged.double() + s * pulled - y * s**3 * (pulled * y).mean(-1, keepdim=True)
    # Rows of one number cancel: what is left is small beside its terms.
    scale = (s * pulled).abs().amax() if rows else 1
    assert (base.double() - gradient).abs().le(2 * step * (scale + gradient.abs())).all(), f"{what}: base"
    assert_close(for_weight, (dy * y * s).sum(0), f"{what}: weight", 1e-5)
    _check_increments(base, increments, c, for_increments, for_row, what)

    two_rows, gradients = draw(2, k, seed=5), draw(2, rows, h, seed=6).to(dtype)
    merged, _, _ = ops.merge_norm(x, increments, two_rows, None, EPS)
    wanted, _ = backends.get_backend("reference").merge_norm(x, increments, two_rows, None, EPS)
    assert_close(merged, wanted, f"{what}: two merges", 2 * step)
    _, _, for_increments, for_rows = ops.merge_norm_backward(
        gradients, *(None,) * 4, increments, two_rows, True, True
    )
    _check_increments(gradients, increments, two_rows, for_increments, for_rows, what)

    stack = torch.stack([t.double() for t in increments])
    for direct in (x, None) if h < 2000 else (x,):
        found, products = ops.transposed_merge(direct, x, increments, c, True)
        total = torch.tensordot(c.double(), stack, 1) + (0 if direct is None else direct.double())
        assert_close(found, total, f"{what}: transposed", 2 * step)
        inner = torch.einsum("th,kth->k", x.double(), stack)
        assert (products - inner).abs().le(1e-6 * (1 + stack.square().sum().item())).all(), (
            f"{what}: products"
        )
        unwanted, none = ops.transposed_merge(direct, x, increments, c, False)
        assert torch.equal(unwanted, found), what
        assert none.numel() == 0


def _check_increments(
    gradient: Tensor,
    increments: list[Tensor],
    coefficients: Tensor,
    for_increments: list[Tensor],
    for_coefficients: Tensor,
    what: str,
) -> None:
    """From the rounded gradient of one merge or of several rows of them."""
    step = {fp32: 1e-6, bf16: 2**-8, torch.float16: 2**-11}[gradient.dtype]
    stack, c = torch.stack([t.double() for t in increments]), coefficients.double().view(-1, len(increments))
    rounded = gradient.double().view(len(c), *increments[0].shape)
    for j, found in enumerate(for_increments):
        assert_close(found, torch.tensordot(c[:, j], rounded, 1), f"{what}: increment {j}", 2 * step)
    scale = (stack.square().sum().sqrt() * rounded.square().sum().sqrt()).item()
    products = torch.einsum("rth,kth->rk", rounded, stack).view(coefficients.shape)
    assert (for_coefficients - products).abs().le(1e-6 * scale).all(), f"{what}: coefficients"


def test_this_instruction_set(ops: Any) -> None:
    check_against_reference((1, 7, 100, 128, 1000, 4099), (0, 1, 33))


@pytest.mark.slow
@pytest.mark.parametrize("capability", long_but(["default", "avx2", None], "default", None))
def test_every_instruction_set(capability: str | None) -> None:
    """In a process of its own: torch chooses once."""
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ("AVX2", "AVX512") and capability is not None:
        pytest.skip(f"this processor has {own} alone")
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_ISA],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = own if capability is None else {"default": ("DEFAULT", "NO AVX"), "avx2": "AVX2"}[capability]
    assert done.stdout.strip() in expected


# ------------------------------------------------------------------------------------ layouts


def views(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers, laid out otherwise."""
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.empty(x.numel() + 1, dtype=x.dtype)
    padded[1:] = x.reshape(-1)
    yield "misaligned", padded[1:].view(x.shape)
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield "strided", wide[..., ::2]
    yield "negated", torch._neg_view(-x)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("h", [96, 101])
def test_layouts_do_not_matter(ops: Any, h: int, dtype: torch.dtype) -> None:
    shape = (3, 7, h)
    x, a, b, g, n = slabs(5, *shape, dtype=dtype)
    c, rows, w = draw(2), draw(2, 2, seed=2), draw(h, seed=1)
    merged, normed, rstd = ops.merge_norm(x, [a, b], c, w, EPS)
    two_merges = ops.merge_norm(x, [a, b], rows, None, EPS)
    backward = ops.merge_norm_backward(g, n, merged, rstd, w, [a, b], c, True, True)
    both = torch.stack((g, n))
    two_backward = ops.merge_norm_backward(both, *(None,) * 4, [a, b], rows, True, True)
    transposed = ops.transposed_merge(x, a, [g, n], c, True)
    for (name, x2), (_, a2), (_, b2) in zip(views(x), views(a), views(b), strict=True):
        odd = {"transposed": 0, "misaligned": 1, "strided": 2, "negated": 3}[name]

        def laid_out(t: Tensor, odd: int = odd) -> Tensor:
            return [*views(t)][odd][1]

        found = ops.merge_norm(x2, [a2, b2], laid_out(c), laid_out(w), EPS)
        for ours, wanted in zip(found, (merged, normed, rstd), strict=True):
            assert torch.equal(ours, wanted), name
        found = ops.merge_norm(x2, [a2, b2], laid_out(rows), None, EPS)
        assert torch.equal(found[0], two_merges[0]), name
        found = ops.merge_norm_backward(
            *map(laid_out, (g, n, merged, rstd, w)), [a2, b2], laid_out(c), True, True
        )
        for ours, wanted in zip(flatten(found), flatten(backward), strict=True):
            assert torch.equal(ours, wanted), name
        found = ops.merge_norm_backward(laid_out(both), *(None,) * 4, [a2, b2], laid_out(rows), True, True)
        for ours, wanted in zip(flatten(found), flatten(two_backward), strict=True):
            assert torch.equal(ours, wanted), name
        found = ops.transposed_merge(x2, a2, [laid_out(g), laid_out(n)], laid_out(c), True)
        for ours, wanted in zip(found, transposed, strict=True):
            assert torch.equal(ours, wanted), name


def test_expanded_inputs(ops: Any) -> None:
    row = draw(1, 20)
    x = row.expand(5, 20)
    c, w = draw(1).expand(3), draw(1, seed=1).expand(20)
    found = ops.merge_norm(x, [x] * 3, c, w, EPS)
    wanted = ops.merge_norm(x.clone(), [x.clone()] * 3, c.clone(), w.clone(), EPS)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    one = torch.ones(()).expand(5, 20)  # what sum() sends back
    found = ops.merge_norm_backward(one, one, wanted[0], wanted[2], w, [x] * 3, c, True, True)
    again = ops.merge_norm_backward(
        one.clone(), one.clone(), wanted[0], wanted[2], w.clone(), [x.clone()] * 3, c.clone(), True, True
    )
    for ours, theirs in zip(flatten(found), flatten(again), strict=True):
        assert torch.equal(ours, theirs)
    found = ops.transposed_merge(one, x, [one, x], c[:2], True)
    again = ops.transposed_merge(one.clone(), x.clone(), [one.clone(), x.clone()], c[:2].clone(), True)
    for ours, theirs in zip(found, again, strict=True):
        assert torch.equal(ours, theirs)


def test_results_are_new_memory_and_inputs_stay(ops: Any) -> None:
    x, a, g = slabs(3, 6, 100)
    c, w = draw(1), draw(100, seed=1)
    inputs = [x, a, g, c, w]
    before = [t.clone() for t in inputs]
    merged, normed, rstd = ops.merge_norm(x, [a], c, w, EPS)
    kept = [merged.clone(), rstd.clone()]
    results = flatten(ops.merge_norm_backward(g, g, merged, rstd, w, [a], c, True, True))
    results += flatten(ops.transposed_merge(x, a, [g], c, True))
    for now, then in zip([*inputs, merged, rstd], [*before, *kept], strict=True):
        assert torch.equal(now, then)
    places = [t.untyped_storage().data_ptr() for t in (*inputs, merged, normed, rstd, *results)]
    assert len(set(places)) == len(places)


# ------------------------------------------------------------------------------------ numbers at the edge


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate(ops: Any, bad: float, dtype: torch.dtype) -> None:
    """Into their own row and what sums over it; nowhere else."""
    rows, h = 33, 100
    for at in ((0, 0), (13, 50), (32, 99)):
        x, a, g, n = slabs(4, rows, h, dtype=dtype)
        c, w = torch.tensor([2.0]), torch.ones(h)
        a[at] = bad
        merged, normed, rstd = ops.merge_norm(x, [a], c, w, EPS)
        others = torch.arange(rows) != at[0]
        assert torch.equal(merged[at], torch.tensor(bad, dtype=dtype)) or (bad != bad and merged[at].isnan())
        assert merged.isfinite().sum() == rows * h - 1
        assert normed[at].isnan()
        assert normed[others].isfinite().all()
        assert rstd[at[0]] == 0 or rstd[at[0]].isnan()
        base, for_weight, (for_a,), for_c = ops.merge_norm_backward(g, n, merged, rstd, w, [a], c, True, True)
        assert base[at].isnan()
        assert base[others].isfinite().all()
        assert for_weight[at[1]].isnan()
        assert for_a[at].isnan()
        assert for_a[others].isfinite().all()
        assert for_c.isnan().all()
        found, products = ops.transposed_merge(x, n, [g, a], torch.tensor([1.0, 2.0]), True)
        assert not found[at].isfinite()
        assert found.isfinite().sum() == rows * h - 1
        assert products[0].isfinite()
        assert not products[1].isfinite()


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_nan_of_any_bits_stays_one(ops: Any, dtype: torch.dtype) -> None:
    """Rounded as a number is, one with all bits set would become zero, one with few of them infinite."""
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x3FFFFF], dtype=torch.int32)
    one = torch.ones(2, 150, dtype=dtype)
    for nan in bits.view(fp32):
        assert nan.isnan()
        assert ops.merge_norm(one, [one], nan.view(1), None, EPS)[0].isnan().all()
        assert ops.transposed_merge(one, one, [one], nan.view(1), True)[0].isnan().all()


@pytest.mark.parametrize("normed", [True, False])
def test_one_infinite_gradient_makes_an_infinite_product(ops: Any, normed: bool) -> None:
    """Not a NaN: nobody multiplies it with the zeros behind a row's end, or again with a later row's."""
    rows, h = 33, 100
    a = draw(rows, h).abs() + 1
    g = torch.ones(rows, h)
    norm = (torch.zeros(rows, h), torch.ones(rows, h), torch.ones(rows), torch.ones(h))
    for at in (0, 1350, 1999, rows * h - 1):
        g.fill_(1.0).view(-1)[at] = float("inf")
        gradients = ops.merge_norm_backward(
            g, *(norm if normed else (None,) * 4), [a], torch.ones(1), True, True
        )
        assert gradients[3].item() == float("inf"), f"number {at}"
        assert gradients[2][0].isfinite().sum() == rows * h - 1
    _, products = ops.transposed_merge(None, a, [g], torch.ones(1), True)
    assert products.item() == float("inf")


def test_overflow_of_half_precision_is_infinite(ops: Any) -> None:
    x = torch.full((2, 40), 60000.0, dtype=torch.float16)
    merged, normed, _ = ops.merge_norm(x, [x], torch.ones(1), torch.ones(40), EPS)
    assert (merged == float("inf")).all()
    assert normed.isnan().all()
    merged, normed, rstd = ops.merge_norm(x, [x], torch.tensor([-0.5]), torch.ones(40), EPS)
    assert (merged == 30000).all()
    assert_close(rstd, torch.full((2,), 1 / 30000.0))
    assert (normed == 1).all()


@pytest.mark.parametrize("dtype", [bf16, torch.float16])
def test_rounding_is_to_nearest_even(ops: Any, dtype: torch.dtype) -> None:
    """Against torch's own conversion, for every exponent, ties and neighbours of ties."""
    bits = torch.arange(-(2**31), 2**31, 40503, dtype=torch.int64).to(torch.int32)
    half = torch.tensor([0x8000, 0x7FFF, 0x8001, 0x18000], dtype=torch.int32)
    bits = torch.cat((bits, *((bits & -65536) + h for h in half)))
    values = bits.view(fp32)
    values = values[values.isfinite()]
    values = values[: values.numel() // 8 * 8].view(-1, 8)
    one = torch.ones_like(values).to(dtype)
    # A single product of 1 and the coefficient: rounding is all that happens.
    for row in (values[::97], values[-64:]):
        for v in row.reshape(-1)[:400]:
            merged = ops.merge_norm(None, [one[:1]], v.view(1), None, EPS)[0]
            assert torch.equal(merged[0, 0], v.to(dtype)), v.item()


# ------------------------------------------------------------------------------------ large slabs, threads


@pytest.mark.parametrize(
    ("rows", "h", "dtype"),
    [
        (1100, 1024, fp32),
        (1030, 1040, fp32),
        (11000, 96, fp32),
        (2200, 1024, bf16),
        (4400, 544, torch.float16),
    ],
)
def test_large_slabs_equal_their_parts(ops: Any, rows: int, h: int, dtype: torch.dtype) -> None:
    """Slabs over 4 MiB are written past the cache; the numbers are those of a few rows alone."""
    assert rows * h * dtype.itemsize > 4 << 20
    x, a, b, g, n = slabs(5, rows, h, dtype=dtype)
    c, w = draw(2), draw(h, seed=1)
    merged, normed, rstd = ops.merge_norm(x, [a, b], c, w, EPS)
    base, _, for_increments, _ = ops.merge_norm_backward(g, n, merged, rstd, w, [a, b], c, True, True)
    transposed, _ = ops.transposed_merge(x, a, [g, n], c, True)
    for start in [*range(0, rows, rows // 7), rows - 40]:
        part = slice(start, min(start + 40 + start % 3, rows))
        found = ops.merge_norm(x[part], [a[part], b[part]], c, w, EPS)
        for ours, whole in zip(found, (merged, normed, rstd), strict=True):
            assert torch.equal(ours, whole[part])
        found = ops.merge_norm_backward(
            g[part], n[part], merged[part], rstd[part], w, [a[part], b[part]], c, True, False
        )
        for ours, whole in zip((found[0], *found[2]), (base, *for_increments), strict=True):
            assert torch.equal(ours, whole[part])
        found = ops.transposed_merge(x[part], a[part], [g[part], n[part]], c, False)
        assert torch.equal(found[0], transposed[part])


@pytest.mark.parametrize(
    ("rows", "h", "dtype"), [(301, 513, fp32), (300, 1024, bf16), (7, 16384, fp32), (1100, 1024, fp32)]
)
def test_bit_equal_for_any_number_of_threads(ops: Any, rows: int, h: int, dtype: torch.dtype) -> None:
    x, a, b, g, n = slabs(5, rows, h, dtype=dtype)
    c, pair, w = draw(2), draw(2, 2, seed=2), draw(h, seed=1)
    both = torch.stack((g, n))

    def everything() -> list[Tensor]:
        merged, normed, rstd = ops.merge_norm(x, [a, b], c, w, EPS)
        two, _, _ = ops.merge_norm(x, [a, b], pair, None, EPS)
        backward = ops.merge_norm_backward(g, n, merged, rstd, w, [a, b], c, True, True)
        plain = ops.merge_norm_backward(both, None, None, None, None, [a, b], pair, True, True)
        return [
            merged,
            normed,
            rstd,
            two,
            *flatten((*backward, *plain, *ops.transposed_merge(x, a, [g, n], c, True))),
        ]

    wanted = everything()
    try:
        for threads in (2, 1, 3, 2):
            torch.set_num_threads(threads)
            for found, single in zip(everything(), wanted, strict=True):
                assert torch.equal(found, single), f"{threads} threads"
    finally:
        torch.set_num_threads(1)


def test_many_increments(ops: Any) -> None:
    """More than any limit of the GPU kernels."""
    increments = slabs(300, 3, 33)
    c = draw(300)
    merged, _, _ = ops.merge_norm(None, increments, c, None, EPS)
    wanted = torch.tensordot(c.double(), torch.stack(increments).double(), 1)
    assert_close(merged, wanted, tolerance=1e-5)
    _, _, for_increments, for_row = ops.merge_norm_backward(
        merged, None, None, None, None, increments, c, True, True
    )
    for j in (0, 1, 127, 128, 255, 299):
        assert torch.equal(for_increments[j], c[j] * merged)
    assert_close(for_row, torch.einsum("kth,th->k", torch.stack(increments).double(), merged.double()))
    total, products = ops.transposed_merge(None, merged, increments, c, True)
    assert torch.equal(total, merged)
    assert_close(products, for_row)


def test_empty_slabs(ops: Any) -> None:
    """No rows: sums over them are zero, not what was in memory."""
    x, c, w = torch.empty(0, 40), draw(2), draw(40)
    for _ in range(3):
        junk = [torch.full((40,), 7.0) for _ in range(50)]
        del junk
        merged, normed, rstd = ops.merge_norm(x, [x, x], c, w, EPS)
        assert (merged.shape, normed.shape, rstd.shape) == (x.shape, x.shape, (0,))
        base, for_weight, for_increments, for_row = ops.merge_norm_backward(
            x, x, x, rstd, w, [x, x], c, True, True
        )
        assert base.shape == x.shape
        assert len(for_increments) == 2
        assert torch.equal(for_weight, torch.zeros(40))
        assert torch.equal(for_row, torch.zeros(2))
        assert torch.equal(ops.transposed_merge(x, x, [x, x], c, True)[1], torch.zeros(2))
