"""The CUDA kernels, run on the CPU by csrc/emulation, against the reference backend and fp64."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_iiet.ops.reference import merge_norm_reference
from tests.ops import emulator

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(shutil.which(emulator.COMPILER) is None, reason="no C++ compiler")

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the storage type.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# 1000 and 1001: 16-byte and element-wise access; 2560 and 5000: two and four packs a thread.
WIDTHS = [7, 64, 1000, 1001, 2560, 5000]


def draw(seed: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, wanted: Tensor, magnitude: Tensor | float, tolerance: float) -> None:
    """``magnitude``: of what was added up to ``wanted`` in fp32. The smallest fp16 numbers are 6e-8 apart."""
    assert actual.shape == wanted.shape
    error = (actual.double() - wanted.double()).abs()
    bound = tolerance * wanted.double().abs() + 2e-6 * magnitude + 3e-8
    assert bool((error <= bound).all()), (error / bound).max()


FORMS = [
    (residual, rows, weight)
    for residual in (True, False)
    for rows in (None, 0, 2, 3)  # no coefficients, one row without a dimension of its own, two rows, more
    for weight in (False, True)
    if not (weight and rows)
]


def operands(
    dtype: torch.dtype, h: int, n: int, residual: bool, rows: int | None, weight: bool
) -> tuple[Tensor | None, list[Tensor], Tensor | None, Tensor | None]:
    return (
        draw(1, 2, 3, h, dtype=dtype) if residual else None,
        [draw(10 + j, 2, 3, h, dtype=dtype) for j in range(n)],
        None if rows is None else draw(2, *((rows,) if rows else ()), n),
        draw(3, h, dtype=dtype) if weight else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", WIDTHS)
def test_forward_is_the_reference(dtype: torch.dtype, h: int) -> None:
    for i, form in enumerate(FORMS):
        residual, increments, coefficients, weight = operands(dtype, h, 1 + i % 6, *form)
        merged, normed, rstd = emulator.merge_norm(residual, increments, coefficients, weight, EPS)
        wanted, wanted_normed = merge_norm_reference(residual, increments, coefficients, weight, EPS)
        assert merged.dtype == dtype
        if coefficients is None:
            assert torch.equal(merged, wanted)  # plain additions, in the same order
        else:
            close(merged, wanted, 1, 2 * TOLERANCE[dtype])
        if weight is None:
            assert wanted_normed is None
            assert normed.shape == rstd.shape == (0,)
            continue
        # The norm is of the merge that was returned.
        assert rstd.dtype == torch.float32
        close(rstd, (merged.double().square().mean(-1) + EPS).rsqrt(), 0, 1e-6)
        again = merge_norm_reference(merged, [], None, weight, EPS)[1]
        assert again is not None
        close(normed, again, 0, 2 * TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", WIDTHS)
def test_backward_is_the_derivative(dtype: torch.dtype, h: int) -> None:
    for i, (with_merged, rows, form) in enumerate(FORMS):
        if not with_merged and not form:
            continue  # no gradient at all
        n = 1 + i % 6
        _, increments, coefficients, weight = operands(dtype, h, n, False, rows, form)
        merged, _, rstd = emulator.merge_norm(None, increments, coefficients, weight, EPS)
        dy = draw(4, *merged.shape, dtype=dtype) if with_merged else None
        dx = None if weight is None else draw(5, *merged.shape, dtype=dtype)
        m, s, w = (None, None, None) if weight is None else (merged, rstd, weight)
        G, dw, d_increments, row = emulator.merge_norm_backward(
            dy, dx, m, s, w, increments, coefficients, True, True
        )
        if weight is None:
            assert dy is not None
            assert G.shape == dw.shape == (0,)
            G = dy
        else:
            assert dx is not None
            check_norm_backward(dy, dx, merged, weight, G, dw)
        if coefficients is None:
            assert d_increments == []
            assert row.shape == (0,)
        else:
            check_increments(increments, coefficients, G, d_increments, row)


def check_norm_backward(
    dy: Tensor | None, dx: Tensor, merged: Tensor, weight: Tensor, G: Tensor, dw: Tensor
) -> None:
    """Against autograd in fp64."""
    y, w = merged.double().requires_grad_(), weight.double().requires_grad_()
    normed = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * w
    wanted_y, wanted_w = torch.autograd.grad(normed, [y, w], dx.double())
    wanted_y = wanted_y if dy is None else wanted_y + dy.double()
    close(G, wanted_y, wanted_y.abs().amax(-1, keepdim=True) + 1, TOLERANCE[G.dtype])
    close(dw, wanted_w, 10, 1e-6)
    assert (G.dtype, dw.dtype) == (merged.dtype, torch.float32)


def check_increments(
    increments: Sequence[Tensor], coefficients: Tensor, G: Tensor, d_increments: Sequence[Tensor], row: Tensor
) -> None:
    """From the rounded G."""
    c = coefficients.double().view(-1, len(increments))
    rows = G.double().view(c.shape[0], *increments[0].shape)
    assert row.shape == coefficients.shape
    assert row.dtype == torch.float32
    for j, increment in enumerate(increments):
        wanted = torch.tensordot(c[:, j], rows, 1)
        close(d_increments[j], wanted, rows.abs().sum(0), TOLERANCE[G.dtype])
        products = (rows * increment.double()).flatten(1)
        close(row.view(c.shape)[:, j], products.sum(1), products.abs().sum(1), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [7, 1000, 1001, 2560])
def test_transposed_merge(dtype: torch.dtype, h: int) -> None:
    for m in (1, 4, 7):
        increment = draw(1, 2, 3, h, dtype=dtype)
        direct = draw(2, 2, 3, h, dtype=dtype) if m != 4 else None
        gradients = [draw(10 + i, 2, 3, h, dtype=dtype) for i in range(m)]
        coefficients = draw(3, m)
        actual, dots = emulator.transposed_merge(direct, increment, gradients, coefficients, True)
        wanted = torch.tensordot(coefficients.double(), torch.stack(gradients).double(), 1)
        wanted = wanted if direct is None else wanted + direct.double()
        close(actual, wanted, m + 1, TOLERANCE[dtype])
        products = (torch.stack(gradients).double() * increment.double()).flatten(1)
        close(dots, products.sum(1), products.abs().sum(1), 1e-6)
        again, none = emulator.transposed_merge(direct, increment, gradients, coefficients, False)
        assert torch.equal(again, actual)
        assert none.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_stored_merge_is_bit_equal(dtype: torch.dtype) -> None:
    for h in (48, 1000, 5000):
        increments, weight = [draw(j, 4, h, dtype=dtype) for j in range(3)], draw(8, h)
        merged, normed, rstd = emulator.merge_norm(increments[0], increments, draw(9, 3), weight, EPS)
        empty, again, rstd_again = emulator.merge_norm(merged, [], None, weight, EPS)
        assert empty.shape == (0,)
        assert torch.equal(again, normed)
        assert torch.equal(rstd_again, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_0_and_1_are_exact(dtype: torch.dtype) -> None:
    residual, a, b = (draw(j, 3, 10, dtype=dtype) for j in range(3))
    residual[0, 0] = -0.0
    merged, _, _ = emulator.merge_norm(residual, [a, b], torch.tensor([0.0, 1.0]), None, EPS)
    assert torch.equal(merged, emulator.merge_norm(residual, [b], None, None, EPS)[0])
    alone, _, _ = emulator.merge_norm(None, [residual], torch.ones(1), None, EPS)
    assert torch.equal(alone.signbit(), residual.signbit())


def test_the_order_of_threads_does_not_matter() -> None:
    residual, increments, row, weight = operands(torch.bfloat16, 1000, 5, True, 0, True)
    rows = draw(4, 2, 5)

    def everything() -> list[Tensor]:
        merged, normed, rstd = emulator.merge_norm(residual, increments, row, weight, EPS)
        base, dw, d_increments, d_row = emulator.merge_norm_backward(
            merged, normed, merged, rstd, weight, increments, row, True, True
        )
        two, _, _ = emulator.merge_norm(residual, increments, rows, None, EPS)
        _, _, d_of_two, d_rows = emulator.merge_norm_backward(
            two, None, None, None, None, increments, rows, True, True
        )
        return [merged, normed, rstd, base, dw, *d_increments, d_row, two, *d_of_two, d_rows]

    expected = everything()
    for order in emulator.SCHEDULES:
        with emulator.schedule(order, seed=11):
            assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def test_strided_and_unaligned_tensors() -> None:
    unaligned, strided = draw(0, 3 * 40 + 1)[1:].view(3, 40), draw(1, 40, 3).t()
    copies = strided.contiguous(), [unaligned.clone(), strided.contiguous()]
    for coefficients, weight in ((draw(2, 2, 3).t(), None), (draw(2, 2, 3)[:, 1], unaligned[0])):
        actual = emulator.merge_norm(strided, [unaligned, strided], coefficients, weight, EPS)
        copy = None if weight is None else weight.clone()
        wanted = emulator.merge_norm(*copies, coefficients.contiguous(), copy, EPS)
        for a, b in zip(actual, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("h", [8, 9])
def test_values_that_are_not_finite(h: int) -> None:
    increments, weight, coefficients = [draw(0, 4, h), draw(1, 4, h)], draw(3, h), draw(4, 2)
    increments[1][2, 3] = torch.inf
    merged, normed, rstd = emulator.merge_norm(None, increments, coefficients, weight, EPS)
    assert not merged[2, 3].isfinite()
    assert normed[2, 3].isnan()
    assert bool(normed[[0, 1, 3]].isfinite().all())
    G, dw, _, row = emulator.merge_norm_backward(
        None, draw(5, 4, h), merged, rstd, weight, increments, coefficients, True, True
    )
    assert bool(G[[0, 1, 3]].isfinite().all())
    assert bool(dw[3].isnan() & row.isnan().all())
    # An element that only the width's rounding up makes exist must not turn inf * 0 into NaN.
    everywhere, _, rstd = emulator.merge_norm(
        None, [torch.ones(1, h)], torch.tensor([torch.inf]), weight, EPS
    )
    assert bool(everywhere.isposinf().all())
    assert rstd.item() == 0


def test_no_rows() -> None:
    empty, weight, coefficients = draw(0, 0, 8), draw(1, 8), draw(2, 3, 1)
    merged, normed, rstd = emulator.merge_norm(empty, [empty], coefficients[0], weight, EPS)
    assert merged.shape == normed.shape == (0, 8)
    assert rstd.shape == (0,)
    G, dw, d_increments, row = emulator.merge_norm_backward(
        merged, merged, merged, rstd, weight, [empty], coefficients[0], True, True
    )
    assert G.shape == d_increments[0].shape == (0, 8)
    assert not bool(dw.any() or row.any())
    rows, _, _ = emulator.merge_norm(empty, [empty], coefficients, None, EPS)
    assert rows.shape == (3, 0, 8)
    _, _, d_increments, d_rows = emulator.merge_norm_backward(
        rows, None, None, None, None, [empty], coefficients, True, True
    )
    assert d_increments[0].shape == (0, 8)
    assert not bool(d_rows.any())
    assert not bool(emulator.transposed_merge(None, empty, [empty], coefficients[0], True)[1].any())


def test_limits() -> None:
    with pytest.raises(emulator.EmulatorError, match="above 16384"):
        emulator.merge_norm(draw(0, 1, 16385), [], None, draw(1, 16385), EPS)
    with pytest.raises(emulator.EmulatorError, match="more than 128"):
        emulator.merge_norm(None, [draw(0, 1, 8)] * 129, None, None, EPS)
    x, rows = draw(0, 1, 8), draw(1, 2, 1)
    with pytest.raises(emulator.EmulatorError, match="a norm is of one merge"):
        emulator.merge_norm(x, [x], rows, x[0], EPS)
    with pytest.raises(emulator.EmulatorError, match="a norm is of one merge"):
        emulator.merge_norm_backward(
            x.expand(2, 1, 8), x.expand(2, 1, 8), x, x[0], x[0], [x], rows, True, True
        )


SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def selftest(program: Path, mode: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run([program, mode], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_selftest_notices_injected_bugs() -> None:
    result = selftest(emulator.build("selftest.cpp", "selftest", "-O1"), "bugs")
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_selftest() -> None:
    result = selftest(emulator.build("selftest.cpp", "selftest", "-O1"), "all")
    assert result.returncode == 0, result.stdout


@pytest.mark.long
def test_selftest_under_sanitizers() -> None:
    program = emulator.build("selftest.cpp", "selftest_sanitized", *SANITIZERS)
    result = selftest(program, "quick")
    assert result.returncode == 0, result.stdout + result.stderr
    for mode, complaint in (("misaligned", "misaligned address"), ("out-of-bounds", "heap-buffer-overflow")):
        result = selftest(program, mode)
        assert result.returncode != 0
        assert complaint in result.stderr
