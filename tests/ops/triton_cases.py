"""The Triton kernels against the contract in fp64: in Triton's interpreter, or on the GPU if there is one.

``test_ops_triton.py`` runs this file in a process of its own: Triton is interpreted from its import on.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
kernels: Any = importlib.import_module("megatron_iiet.ops.triton_kernels")

torch.set_num_threads(1)

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the storage type; the interpreter cuts bf16 off instead of rounding to nearest.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8,
    torch.float16: 2**-11,
}
ROWS = 3
SHAPE = (2, 3)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of the 6 rows in one program, and not as many in each."""
    monkeypatch.setattr(kernels, "_programs", lambda T, h: 4)


def draw(seed: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(DEVICE, dtype)


def drawn_coefficients(form: str, n: int) -> Tensor | None:
    return {"none": None, "one": draw(90, n), "rows": draw(91, ROWS, n)}[form]


def drawn_weight(form: str, h: int, dtype: torch.dtype) -> Tensor | None:
    return {"none": None, "one": draw(92, h, dtype=dtype)}[form]


def close(actual: Tensor, wanted: Tensor, magnitude: Tensor, tolerance: float) -> None:
    """``magnitude`` is the sum of the absolute values of what was added up to ``wanted``."""
    assert actual.shape == wanted.shape
    bound = tolerance * wanted.abs() + 4e-6 * magnitude + 1e-7
    error = (actual.double() - wanted).abs()
    assert bool((error <= bound).all()), (error / bound).max()


def close_in_dtype(actual: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    close(actual, wanted, magnitude, TOLERANCE[actual.dtype])


def exact_merge(residual: Tensor | None, increments: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    stack = torch.stack([t.double() for t in increments])
    total = torch.tensordot(coefficients.double(), stack, 1)
    return total if residual is None else residual.double() + total


FORMS = [
    (residual, coefficients, weight)
    for residual in (True, False)
    for coefficients in ("none", "one", "rows")
    for weight in ("none", "one")
    if weight == "none" or coefficients != "rows"
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "n"), [(7, 5), (64, 1)])
@pytest.mark.parametrize(("with_residual", "coefficient_form", "weight_form"), FORMS)
def test_forward(
    dtype: torch.dtype, h: int, n: int, with_residual: bool, coefficient_form: str, weight_form: str
) -> None:
    residual = draw(0, *SHAPE, h, dtype=dtype) if with_residual else None
    increments = [draw(j + 1, *SHAPE, h, dtype=dtype) for j in range(n)]
    coefficients = drawn_coefficients(coefficient_form, n)
    weight = drawn_weight(weight_form, h, dtype)
    merged, normed, rstd = kernels.merge_norm(residual, increments, coefficients, weight, EPS)

    ones = torch.ones(n, device=DEVICE) if coefficients is None else coefficients
    magnitude = exact_merge(
        None if residual is None else residual.abs(), [t.abs() for t in increments], ones.abs()
    )
    close_in_dtype(merged, exact_merge(residual, increments, ones), magnitude)
    assert merged.dtype == dtype
    check_norm(merged, weight, normed, rstd)


def check_norm(merged: Tensor, weight: Tensor | None, normed: Tensor, rstd: Tensor) -> None:
    if weight is None:
        assert normed.shape == rstd.shape == (0,)
        return
    # Of the rounded merge, the one that was returned.
    scale = 1 / (merged.double().square().mean(-1) + EPS).sqrt()
    close(rstd, scale, scale, 1e-6)
    wanted = merged.double() * scale.unsqueeze(-1) * weight.double()
    close_in_dtype(normed, wanted, wanted.abs())
    assert (normed.dtype, rstd.dtype) == (merged.dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_norm_alone(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    residual, weight = draw(0, 5, 33, dtype=dtype), draw(1, 33, dtype=weight_dtype)
    merged, normed, rstd = kernels.merge_norm(residual, [], None, weight, EPS)
    assert merged.shape == (0,)
    check_norm(residual, weight, normed, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [48, 1000])
def test_norm_of_a_stored_merge_is_bit_equal(dtype: torch.dtype, h: int) -> None:
    increments = [draw(j, 4, h, dtype=dtype) for j in range(3)]
    weight = draw(8, h, dtype=dtype)
    merged, normed, rstd = kernels.merge_norm(increments[0], increments, draw(9, 3), weight, EPS)
    _, again, rstd_again = kernels.merge_norm(merged, [], None, weight, EPS)
    assert torch.equal(again, normed)
    assert torch.equal(rstd_again, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_0_and_1_are_exact(dtype: torch.dtype) -> None:
    residual, a, b = (draw(j, 3, 10, dtype=dtype) for j in range(3))
    zero_one = torch.tensor([0.0, 1.0], device=DEVICE)
    merged, _, _ = kernels.merge_norm(residual, [a, b], zero_one, None, EPS)
    plain, _, _ = kernels.merge_norm(residual, [b], None, None, EPS)
    assert torch.equal(merged, plain)
    assert torch.equal(kernels.merge_norm(residual, [a], zero_one[:1], None, EPS)[0], residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("with_merged", "coefficient_form", "weight_form"),
    [form for form in FORMS if form[0] or form[2] != "none"],  # else there is no gradient at all
)
def test_backward(
    dtype: torch.dtype,
    with_merged: bool,
    coefficient_form: str,
    weight_form: str,
    few_programs: None,
) -> None:
    h, n = 21, 3
    increments = [draw(j + 1, *SHAPE, h, dtype=dtype) for j in range(n)]
    coefficients = drawn_coefficients(coefficient_form, n)
    weight = drawn_weight(weight_form, h, dtype)
    merged, _, rstd = kernels.merge_norm(None, increments, coefficients, weight, EPS)
    dy = draw(50, *merged.shape, dtype=dtype) if with_merged else None
    dx = None if weight is None else draw(51, *merged.shape, dtype=dtype)
    saved = (None, None, None) if weight is None else (merged, rstd, weight)
    G, dw, d_increments, d_coefficients = kernels.merge_norm_backward(
        dy, dx, *saved, increments, coefficients, True, True
    )
    if weight is None:
        assert G.shape == dw.shape == (0,)
        assert dy is not None
        G = dy
    else:
        assert dx is not None
        check_norm_backward(dy, dx, merged, weight, G, dw)
    if coefficients is None:
        assert d_increments == []
        assert d_coefficients.shape == (0,)
    else:
        check_increments(increments, coefficients, G, d_increments, d_coefficients)


def check_norm_backward(
    dy: Tensor | None, dx: Tensor, merged: Tensor, weight: Tensor, G: Tensor, dw: Tensor
) -> None:
    """Against autograd in fp64."""
    y, w = merged.double().requires_grad_(), weight.double().requires_grad_()
    rstd = torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    wanted_y, wanted_w = torch.autograd.grad(y * rstd * w, [y, w], dx.double())
    wanted_y = wanted_y if dy is None else wanted_y + dy.double()
    close_in_dtype(G, wanted_y, (wanted_y.abs().amax(-1, keepdim=True) + 1) * 10)
    close(dw, wanted_w, torch.full_like(wanted_w, 30.0), 1e-6)
    assert dw.dtype == torch.float32


def check_increments(
    increments: list[Tensor],
    coefficients: Tensor,
    G: Tensor,
    d_increments: list[Tensor],
    d_coefficients: Tensor,
) -> None:
    """From the rounded G."""
    c = coefficients.double().view(-1, len(increments))
    rows = G.double().view(c.shape[0], *increments[0].shape)
    for j, increment in enumerate(increments):
        magnitude = torch.tensordot(c[:, j].abs(), rows.abs(), 1)
        close_in_dtype(d_increments[j], torch.tensordot(c[:, j], rows, 1), magnitude)
        products = rows * increment.double()
        actual = d_coefficients.view(c.shape)[:, j]
        close(actual, products.flatten(1).sum(1), products.abs().flatten(1).sum(1), 1e-6)
    assert d_coefficients.shape == coefficients.shape
    assert d_coefficients.dtype == torch.float32


@pytest.mark.parametrize("form", ["one", "rows"])
def test_backward_computes_what_is_wanted(form: str) -> None:
    increments = [draw(j, 4, 9) for j in range(2)]
    coefficients = drawn_coefficients(form, 2)
    dy = draw(5, *(() if form == "one" else (ROWS,)), 4, 9)

    def call(*wants: bool) -> tuple[list[Tensor], Tensor]:
        result = kernels.merge_norm_backward(dy, None, None, None, None, increments, coefficients, *wants)
        return result[2:]

    both, only_increments, only_coefficients = call(True, True), call(True, False), call(False, True)
    for a, b in zip(both[0], only_increments[0], strict=True):
        assert torch.equal(a, b)
    assert only_increments[1].shape == (0,)
    assert only_coefficients[0] == []
    assert torch.equal(both[1], only_coefficients[1])
    assert call(False, False)[0] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_direct", [True, False])
@pytest.mark.parametrize("m", [1, 4])
def test_transposed(dtype: torch.dtype, with_direct: bool, m: int, few_programs: None) -> None:
    direct = draw(0, *SHAPE, 21, dtype=dtype) if with_direct else None
    increment = draw(1, *SHAPE, 21, dtype=dtype)
    gradients = [draw(2 + i, *SHAPE, 21, dtype=dtype) for i in range(m)]
    coefficients = draw(20, m)
    actual, dots = kernels.transposed_merge(direct, increment, gradients, coefficients, True)
    absolute = [t.abs() for t in gradients]
    magnitude = exact_merge(None if direct is None else direct.abs(), absolute, coefficients.abs())
    close_in_dtype(actual, exact_merge(direct, gradients, coefficients), magnitude)
    products = torch.stack([(g.double() * increment.double()).flatten() for g in gradients])
    close(dots, products.sum(1), products.abs().sum(1), 1e-6)

    again, none = kernels.transposed_merge(direct, increment, gradients, coefficients, False)
    assert torch.equal(again, actual)
    assert none.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row_and_reaches_every_sum(bad: float) -> None:
    increments = [draw(j, 4, 10) for j in range(2)]
    increments[1][2, 3] = bad
    coefficients, weight = draw(5, 2), draw(6, 10)
    merged, normed, rstd = kernels.merge_norm(None, increments, coefficients, weight, EPS)
    others = [0, 1, 3]
    assert not merged[2, 3].isfinite()
    assert normed[2, 3].isnan()
    assert bool(normed[others].isfinite().all())
    G, dw, d_increments, d_coefficients = kernels.merge_norm_backward(
        None, draw(7, 4, 10), merged, rstd, weight, increments, coefficients, True, True
    )
    assert bool(G[others].isfinite().all())
    assert bool(G[2].isnan().any())
    assert dw[3].isnan()
    assert bool(d_increments[0][2].isnan().any())
    assert bool(d_coefficients.isnan().all())
    _, dots = kernels.transposed_merge(None, increments[0], [increments[1]], coefficients[:1], True)
    assert not dots.isfinite().any()


def test_an_infinite_coefficient_is_no_different_at_an_odd_width() -> None:
    coefficients = torch.tensor([float("inf")], device=DEVICE)
    for h in (8, 9):
        ones = torch.ones(1, h, device=DEVICE)
        merged, _, rstd = kernels.merge_norm(None, [ones], coefficients, ones[0], EPS)
        assert bool(merged.isposinf().all())
        assert rstd.item() == 0


def test_no_rows() -> None:
    empty, weight, coefficients = draw(0, 0, 8), draw(1, 8), draw(2, ROWS, 1)
    assert kernels.merge_norm(empty, [empty], coefficients, None, EPS)[0].shape == (ROWS, 0, 8)
    merged, normed, rstd = kernels.merge_norm(empty, [empty], coefficients[0], weight, EPS)
    assert merged.shape == normed.shape == (0, 8)
    assert rstd.shape == (0,)
    for c, shape in ((coefficients, (ROWS, 0, 8)), (coefficients[0], (0, 8))):
        d, normed = draw(3, *shape), c.dim() == 1
        norm = (d, d, d[..., 0], weight) if normed else (None,) * 4
        G, dw, d_increments, d_coefficients = kernels.merge_norm_backward(d, *norm, [empty], c, True, True)
        assert G.shape == ((0, 8) if normed else (0,))
        assert torch.equal(dw, torch.zeros_like(weight) if normed else dw.new_empty(0))
        assert d_increments[0].shape == (0, 8)
        assert torch.equal(d_coefficients, torch.zeros_like(c))
    d_increment, dots = kernels.transposed_merge(None, empty, [empty], coefficients[0], True)
    assert d_increment.shape == (0, 8)
    assert torch.equal(dots, torch.zeros_like(dots))


def test_strided_and_unaligned_tensors() -> None:
    buffer = draw(0, 3 * 40 + 1)
    unaligned = buffer[1:].view(3, 40)
    strided = draw(1, 40, 3).t()
    copies = strided.contiguous(), [unaligned.clone(), strided.contiguous()]
    for coefficients, weight in ((draw(2, 2, ROWS).t(), None), (draw(2, 2, ROWS)[:, 1], unaligned[0])):
        actual = kernels.merge_norm(strided, [unaligned, strided], coefficients, weight, EPS)
        copy = None if weight is None else weight.clone()
        for a, b in zip(
            actual, kernels.merge_norm(*copies, coefficients.contiguous(), copy, EPS), strict=True
        ):
            assert torch.equal(a, b)
    dots = kernels.transposed_merge(unaligned, strided, [strided, unaligned], draw(3, 2), True)[1]
    products = torch.stack([strided * strided, strided * unaligned]).double().flatten(1)
    close(dots, products.sum(1), products.abs().sum(1), 1e-6)


def test_limits() -> None:
    x = draw(0, 1, 2)
    with pytest.raises(ValueError, match="increments has 129 entries"):
        kernels.merge_norm(None, [x] * 129, None, None, EPS)
    with pytest.raises(ValueError, match="gradients has 129"):
        kernels.transposed_merge(None, x, [x] * 129, draw(1, 129), True)
    with pytest.raises(ValueError, match="last dimension is 16385"):
        kernels.merge_norm(draw(0, 1, 16385), [], None, None, EPS)
    with pytest.raises(ValueError, match="both None"):
        kernels.merge_norm_backward(None, None, None, None, None, [x], draw(1, 1), True, True)
    with pytest.raises(ValueError, match="gradients is empty"):
        kernels.transposed_merge(None, x, [], draw(1, 0), True)
    rows, weight = draw(1, 2, 1), draw(2, 2)
    with pytest.raises(ValueError, match="coefficients has 2 rows, but a norm is of one merge"):
        kernels.merge_norm(x, [x], rows, weight, EPS)
    with pytest.raises(ValueError, match="coefficients has 2 rows, but a norm is of one merge"):
        kernels.merge_norm_backward(None, x.expand(2, 1, 2), x, x[0], weight, [x], rows, True, True)
    assert kernels.merge_norm(None, [x] * 128, None, None, EPS)[0].shape == (1, 2)


def test_the_number_of_partial_sums() -> None:
    assert kernels._programs(0, 64) == 0
    assert kernels._programs(100, 64) == 100
    assert [kernels._programs(10**6, h) for h in (64, 2048, 16384)] == [2048, 1024, 512]


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler takes them as operators: it could not follow the addresses in the kernels' tables."""
    from tests.ops import test_ops_extension  # after Triton, which is interpreted from its import on

    monkeypatch.setattr(test_ops_extension, "leaves", on_device(test_ops_extension.leaves))
    test_ops_extension.test_compiled_equals_eager("triton", "aot_eager")


def on_device(draw_leaves: Callable[[int], list[Tensor]]) -> Callable[[int], list[Tensor]]:
    return lambda rows: [leaf.detach().to(DEVICE).requires_grad_() for leaf in draw_leaves(rows)]
