"""The compiled extension: its operators called directly, on every instruction set, and how it is found."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.ops import backends, chosen_backend, extension, merge_norm, resolve_backend
from tests.ops.inputs import EPS, STORAGE, assert_close, exact, needs_extension

torch.set_num_threads(1)
pytestmark = needs_extension

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ops() -> Any:
    status = extension.load_extension()
    assert status.loaded, status.reason
    return torch.ops.megatron_iiet


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_(grad)


def slabs(count: int, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [draw(*shape, dtype=dtype, seed=10 + i, grad=grad) for i in range(count)]


# ------------------------------------------------------------------------------------ what torch is told

bf16, fp32 = torch.bfloat16, torch.float32


def merge_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """merge_norm in all its forms."""
    x = draw(3, 2, 20, grad=True)
    xs = slabs(2, 3, 2, 20, grad=True)
    w, w2 = draw(20, seed=1, grad=True), draw(2, 20, seed=2, grad=True)
    c, c2 = draw(2, seed=3, grad=True), draw(2, 2, seed=4, grad=True)
    yield "entry", (x, xs, c, None, EPS)
    yield "no-residual", (None, xs, c, None, EPS)
    yield "corrector", (x, xs[:1], c[:1].detach().requires_grad_(), w, EPS)
    yield "ones", (x, xs, None, w, EPS)
    yield "rows", (x, xs, c2, None, EPS)
    yield "rows-normed", (None, xs, c2, w, EPS)
    yield "rows-norms", (x, xs, c2, w2, EPS)
    yield "norm", (x, [], None, w, EPS)
    yield "norm-of-no-coefficients", (x, [], torch.zeros(0), w, EPS)
    yield "frozen", (x.detach(), [xs[0], xs[1].detach()], c.detach(), w, EPS)
    half = [draw(3, 20, dtype=bf16, seed=s, grad=True) for s in range(3)]
    yield "bf16-weight-fp32", (half[0], half[1:], c, w, EPS)
    yield "bf16-weight-bf16", (half[0], half[1:], c, draw(20, dtype=bf16, grad=True), EPS)


def backward_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """merge_norm_backward as merge_norm's derivative calls it."""
    for name, (residual, increments, coefficients, weight, eps) in merge_calls():
        arguments = [t if t is None else t.detach() for t in (residual, coefficients, weight)]
        residual, coefficients, weight = arguments
        increments = [t.detach() for t in increments]
        merged, normed, rstd = torch.ops.megatron_iiet.merge_norm(
            residual, increments, coefficients, weight, eps
        )
        base = merged if increments else residual
        norm = (normed, base, rstd, weight) if weight is not None else (None,) * 4
        yield name, (base, *norm, increments, coefficients, True, True)
        if weight is not None:
            yield f"{name}-only-normed", (None, *norm, increments, coefficients, False, True)
            yield f"{name}-only-merged", (base, None, None, None, None, increments, coefficients, True, False)


def transposed_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dtype in (fp32, bf16):
        x, *gradients = slabs(4, 5, 20, dtype=dtype)
        for wanted in (True, False):
            yield f"{dtype}-{wanted}", (x, x, gradients, draw(3), wanted)
            yield f"{dtype}-{wanted}-no-direct", (None, x, gradients[:1], draw(1), wanted)


CALLS = [
    ("merge_norm", merge_calls),
    ("merge_norm_backward", backward_calls),
    ("transposed_merge", transposed_calls),
]


@pytest.mark.parametrize(("name", "calls"), CALLS)
def test_opcheck(ops: Any, name: str, calls: Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]) -> None:
    """Schema, fake kernel and autograd registration; tracing is in the slow twin of this test."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for form, arguments in calls():
        result = torch.library.opcheck(
            getattr(ops, name).default, arguments, test_utils=checks, raise_exception=False
        )
        assert set(result.values()) == {"SUCCESS"}, f"{form}: {result}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), CALLS)
def test_opcheck_traced(
    ops: Any, name: str, calls: Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]
) -> None:
    for form, arguments in calls():
        result = torch.library.opcheck(
            getattr(ops, name).default,
            arguments,
            test_utils="test_aot_dispatch_dynamic",
            raise_exception=False,
        )
        assert set(result.values()) == {"SUCCESS"}, f"{form}: {result}"


def test_fake_kernels_give_shapes_types_and_devices(ops: Any) -> None:
    """Beyond what opcheck compares: on meta tensors, every result is like the real one."""
    for name, calls in CALLS:
        for form, arguments in calls():

            def on_meta(value: Any) -> Any:
                if isinstance(value, list):
                    return [on_meta(v) for v in value]
                return value.detach().to("meta") if isinstance(value, Tensor) else value

            def flat(results: Any) -> list[Tensor]:
                return [t for r in results for t in (r if isinstance(r, list) else [r])]

            real = flat(getattr(ops, name)(*arguments))
            fake = flat(getattr(ops, name)(*map(on_meta, arguments)))
            assert [(t.shape, t.dtype, t.stride()) for t in real] == [
                (t.shape, t.dtype, t.stride()) for t in fake
            ], f"{name} {form}"
            assert {t.device.type for t in fake} == {"meta"}


def expression(ops: Any) -> Callable[..., Tensor]:
    """Forward and backward have something before and after the operator."""

    def f(residual: Tensor, a: Tensor, b: Tensor, coefficients: Tensor, weight: Tensor) -> Tensor:
        merged, normed, _ = ops.merge_norm(residual * 2, [a, b], coefficients, weight, EPS)
        return (merged * normed).sin()

    return f


def leaves(rows: int) -> list[Tensor]:
    return [
        *(draw(rows, 16, seed=s, grad=True) for s in range(3)),
        draw(2, seed=4, grad=True),
        draw(16, seed=5, grad=True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_operator_equals_eager(ops: Any, compiler: str) -> None:
    """One graph for changing numbers of rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    eager = expression(ops)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    graphs = 0
    for rows in (3, 5, 9):
        inputs = leaves(rows)
        found, wanted = compiled(*inputs), eager(*inputs)
        graphs = graphs or counter.frame_count
        pairs = [(found, wanted)]
        pairs += zip(
            torch.autograd.grad(found, inputs, torch.ones_like(found)),
            torch.autograd.grad(wanted, inputs, torch.ones_like(wanted)),
            strict=True,
        )
        for ours, theirs in pairs:
            # Inductor's own sin and products err in the last place; nothing else may differ.
            assert_close(ours, theirs, tolerance=0 if compiler == "aot_eager" else 1e-6)
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_compiled_public_function_equals_eager() -> None:
    """As one graph, once the backend was looked up, which every run does at its start."""

    def f(residual: Tensor, a: Tensor, b: Tensor, coefficients: Tensor, weight: Tensor) -> Tensor:
        merged, normed = merge_norm(residual * 2, (a, b), coefficients, weight, backend="cpu")
        assert normed is not None
        return (merged * normed).sin()

    torch._dynamo.reset()
    assert resolve_backend("cpu")[0] == "cpu"
    compiled = torch.compile(f, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        inputs = leaves(rows)
        found, wanted = compiled(*inputs), f(*inputs)
        assert torch.equal(found, wanted)
        for ours, theirs in zip(
            torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_the_operator_is_differentiable_itself(ops: Any) -> None:
    for form, (residual, increments, coefficients, weight, eps) in merge_calls():
        if any(t is not None and t.dtype != fp32 for t in (residual, weight)):
            continue
        inputs = [
            t for t in (residual, *increments, coefficients, weight) if t is not None and t.requires_grad
        ]
        merged, normed, _ = ops.merge_norm(residual, increments, coefficients, weight, eps)
        wanted = exact(residual, increments, coefficients if increments else None, weight)

        def gradients(
            results: tuple[Tensor | None, ...], inputs: list[Tensor] = inputs
        ) -> tuple[Tensor, ...]:
            total = sum(
                (r.double() * (1 + torch.arange(r.numel()).view(r.shape) % 7)).sum()
                for r in results
                if r is not None
            )
            assert isinstance(total, Tensor)
            return torch.autograd.grad(total, inputs)

        results = (merged if increments else residual, None if weight is None else normed)
        for ours, theirs in zip(gradients(results), gradients(wanted), strict=True):
            assert_close(ours, theirs, form)


def test_the_operators_refuse_second_derivatives(ops: Any) -> None:
    """Nothing computes them; a silent zero would be a wrong number."""
    inputs = leaves(3)
    residual, a, b, coefficients, weight = inputs
    merged, normed, _ = ops.merge_norm(residual, [a, b], coefficients, weight, EPS)
    with pytest.raises(RuntimeError):  # noqa: PT012 - either call may be the one that refuses
        (first,) = torch.autograd.grad((merged * normed).sum(), coefficients, create_graph=True)
        torch.autograd.grad(first.sum(), coefficients)
    merged, normed = merge_norm(residual, (a, b), coefficients, weight, backend="cpu")
    assert normed is not None
    (first,) = torch.autograd.grad((merged * normed).sum(), coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ------------------------------------------------------------------------------------ instruction sets

ON_ONE_ISA = """
import torch

from tests.ops.test_ops_extension import check_against_reference

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
    c, w = draw(2, k, seed=1), draw(2, h, seed=2)
    # One rounding each: two results may be neighbours. And fp32 sums of h terms in another order.
    step = {fp32: 1e-6, bf16: 2**-8, torch.float16: 2**-11}[dtype]
    merged, normed, rstd = ops.merge_norm(x, increments, c, w, EPS)
    wanted, _ = backends.get_backend("reference").merge_norm(x, increments, c, None, EPS)
    assert_close(merged, wanted, f"{what}: merged", 2 * step)
    exact_rstd = (merged.double().square().mean(-1) + EPS).rsqrt()
    assert_close(rstd, exact_rstd, f"{what}: rstd", 2e-6)
    exact_normed = merged.double() * exact_rstd.unsqueeze(-1) * w.double().view(2, 1, h)
    assert_close(normed, exact_normed, f"{what}: normed", 2 * step)

    grad_merged, grad_normed = draw(2, rows, h, seed=3).to(dtype), draw(2, rows, h, seed=4).to(dtype)
    base, for_weight, for_increments, for_row = ops.merge_norm_backward(
        grad_merged, grad_normed, merged, rstd, w, increments, c, True, True
    )
    y, dy, s = merged.double(), grad_normed.double(), exact_rstd.unsqueeze(-1)
    pulled = w.double().view(2, 1, h) * dy
    gradient = grad_merged.double() + s * pulled - y * s**3 * (pulled * y).mean(-1, keepdim=True)
    # Rows of one number cancel: what is left is small beside its terms.
    scale = (s * pulled).abs().amax() if rows else 1
    assert (base.double() - gradient).abs().le(2 * step * (scale + gradient.abs())).all(), f"{what}: base"
    assert_close(for_weight, (dy * y * s).sum(1), f"{what}: weight", 1e-5)
    stack = torch.stack([t.double() for t in increments])
    rounded = base.double()
    for j, found in enumerate(for_increments):
        assert_close(found, torch.tensordot(c[:, j].double(), rounded, 1), f"{what}: increment {j}", 2 * step)
    scale = (stack.square().sum().sqrt() * rounded.square().sum().sqrt()).item()
    products = torch.einsum("rth,kth->rk", rounded, stack)
    assert (for_row - products).abs().le(1e-6 * scale).all(), f"{what}: coefficients"

    for direct in (x, None) if h < 2000 else (x,):
        found, products = ops.transposed_merge(direct, x, increments, c[1], True)
        total = torch.tensordot(c[1].double(), stack, 1) + (0 if direct is None else direct.double())
        assert_close(found, total, f"{what}: transposed", 2 * step)
        inner = torch.einsum("th,kth->k", x.double(), stack)
        assert (products - inner).abs().le(1e-6 * (1 + stack.square().sum().item())).all(), (
            f"{what}: products"
        )
        unwanted, none = ops.transposed_merge(direct, x, increments, c[1], False)
        assert torch.equal(unwanted, found), what
        assert none.numel() == 0


def test_this_instruction_set(ops: Any) -> None:
    check_against_reference((1, 7, 100, 128, 1000, 4099), (0, 1, 33))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", None])
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
    c, w = draw(2, 2), draw(2, h, seed=1)
    merged, normed, rstd = ops.merge_norm(x, [a, b], c, w, EPS)
    grads = [torch.stack((g, n)), torch.stack((n, g))]
    backward = ops.merge_norm_backward(*grads, merged, rstd, w, [a, b], c, True, True)
    transposed = ops.transposed_merge(x, a, [g, n], c[0], True)
    for (name, x2), (_, a2), (_, b2) in zip(views(x), views(a), views(b), strict=True):
        odd = {"transposed": 0, "misaligned": 1, "strided": 2, "negated": 3}[name]

        def laid_out(t: Tensor, odd: int = odd) -> Tensor:
            return [*views(t)][odd][1]

        found = ops.merge_norm(x2, [a2, b2], laid_out(c), laid_out(w), EPS)
        for ours, wanted in zip(found, (merged, normed, rstd), strict=True):
            assert torch.equal(ours, wanted), name
        found = ops.merge_norm_backward(
            *map(laid_out, (*grads, merged, rstd, w)), [a2, b2], laid_out(c), True, True
        )
        for ours, wanted in zip(flatten(found), flatten(backward), strict=True):
            assert torch.equal(ours, wanted), name
        found = ops.transposed_merge(x2, a2, [laid_out(g), laid_out(n)], laid_out(c[0]), True)
        for ours, wanted in zip(found, transposed, strict=True):
            assert torch.equal(ours, wanted), name


def flatten(results: Any) -> list[Tensor]:
    return [t for r in results for t in (r if isinstance(r, list) else [r])]


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
    c, w = draw(2, 2), draw(2, h, seed=1)
    grads = torch.stack((g, n)), torch.stack((n, g))

    def everything() -> list[Tensor]:
        merged, normed, rstd = ops.merge_norm(x, [a, b], c, w, EPS)
        backward = ops.merge_norm_backward(*grads, merged, rstd, w, [a, b], c, True, True)
        plain = ops.merge_norm_backward(grads[0], None, None, None, None, [a, b], c, True, True)
        return [
            merged,
            normed,
            rstd,
            *flatten((*backward, *plain, *ops.transposed_merge(x, a, [g, n], c[1], True))),
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


# ------------------------------------------------------------------------------------ what is refused

X, W, C = torch.zeros(3, 8), torch.zeros(8), torch.zeros(2)
XS, R3 = [X, X], torch.zeros(3)
X2, R23 = torch.zeros(2, 3, 8), torch.zeros(2, 3)
SCALAR = torch.zeros(())


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


BAD_MERGES: list[tuple[str, tuple[Any, ...]]] = [
    ("residual", (SCALAR, [], None, None)),
    ("residual", (X.double(), [], None, W)),
    ("residual", (X.int(), [X.int()], None, W)),
    ("residual", (X.to(torch.complex64), [], None, None)),
    (r"increments\[0\]", (None, [SCALAR], None, None)),
    (r"increments\[0\]", (X, [X.bfloat16()], None, None)),
    (r"increments\[0\]", (X, [X[:1]], None, None)),  # nothing is broadcast
    (r"increments\[1\]", (X, [X, X[:, :7]], C, W)),
    (r"increments\[1\]", (None, [X, SCALAR], C, None)),
    (r"increments\[1\]", (X, [X, meta(X)], C, None)),
    ("coefficients", (X, XS, R3, None)),
    ("coefficients", (X, XS, SCALAR, None)),
    ("coefficients", (X, XS, C.double(), None)),
    ("coefficients", (X, XS, C.bfloat16(), None)),
    ("coefficients", (X, XS, C.long(), None)),
    ("coefficients", (X, XS, C.view(1, 1, 2), None)),
    ("coefficients", (X, XS, C.view(2, 1), None)),
    ("coefficients", (X, XS, meta(C), None)),
    ("coefficients", (X, [], torch.zeros(2, 0), W)),
    ("coefficients", (X, [], torch.zeros(0, 0), W)),
    ("coefficients", (X, [], C, W)),
    ("norm_weight", (X, XS, C, SCALAR)),
    ("norm_weight", (X, XS, C, W[:7])),
    ("norm_weight", (X, XS, C, X)),
    ("norm_weight", (X, XS, torch.zeros(2, 2), X)),
    ("norm_weight", (X, XS, C, W.double())),
    ("norm_weight", (X, XS, C, W.bfloat16())),
    ("norm_weight", (X, XS, C, meta(W))),
]
NORM = (X, X, R3, W)  # grad_normed, merged, rstd, norm_weight
NO_NORM = (None, None, None, None)
BAD_BACKWARDS: list[tuple[str, tuple[Any, ...]]] = [
    ("grad_merged and grad_normed", (None, None, X, R3, W, XS, C)),
    ("grad", (SCALAR, *NO_NORM, [], None)),
    ("grad", (SCALAR, *NO_NORM, [SCALAR], torch.zeros(1))),
    ("grad", (SCALAR, *NO_NORM, [SCALAR], torch.zeros(1, 1))),
    ("grad", (None, SCALAR, SCALAR, SCALAR, SCALAR, [], None)),
    ("grad", (X.double(), *NO_NORM, [X.double()], torch.zeros(1))),
    ("grad", (X, *NORM, XS, torch.zeros(2, 2))),  # no rows in the gradient
    ("grad_normed", (X, X[:, :7], X, R3, W, XS, C)),
    ("grad_normed", (X, X.half(), X, R3, W, XS, C)),
    ("grad_normed", (X, meta(X), X, R3, W, XS, C)),
    ("merged", (X, X, None, R3, W, XS, C)),
    ("merged", (X, X, X[:2], R3, W, XS, C)),
    ("merged", (X, X, X.bfloat16(), R3, W, XS, C)),
    ("merged", (X, X, meta(X), R3, W, XS, C)),
    ("rstd", (X, X, X, None, W, XS, C)),
    ("rstd", (X, X, X, R3[:2], W, XS, C)),
    ("rstd", (X, X, X, R3.view(3, 1), W, XS, C)),
    ("rstd", (X, X, X, SCALAR, W, XS, C)),
    ("rstd", (X, X, X, R3.double(), W, XS, C)),
    ("rstd", (X, X, X, meta(R3), W, XS, C)),
    ("norm_weight", (X, X, X, R3, None, XS, C)),
    ("norm_weight", (X, X, X, R3, W[:7], XS, C)),
    ("norm_weight", (X, X, X, R3, SCALAR, XS, C)),
    ("norm_weight", (X2, X2, X2, R23, X, XS, torch.zeros(2, 2))),
    ("norm_weight", (X, X, X, R3, meta(W), XS, C)),
    (r"increments\[1\]", (X, *NORM, [X, X[:2]], C)),
    (r"increments\[1\]", (X, *NORM, [X, SCALAR], C)),
    (r"increments\[0\]", (X2, *NO_NORM, [X2, X2], torch.zeros(2, 2))),
    (r"increments\[1\]", (X, *NO_NORM, [X, meta(X)], C)),
    ("coefficients", (X, *NORM, XS, R3)),
    ("coefficients", (X, *NORM, XS, SCALAR)),
    ("coefficients", (X, *NORM, XS, C.double())),
    ("coefficients", (X, *NORM, XS, meta(C))),
    ("coefficients", (X, *NORM, [], C)),
]
BAD_TRANSPOSED: list[tuple[str, tuple[Any, ...]]] = [
    ("increment", (None, SCALAR, [SCALAR], torch.zeros(1))),
    ("increment", (None, X.double(), [X.double()], torch.zeros(1))),
    ("direct", (X[:2], X, XS, C)),
    ("direct", (X.half(), X, XS, C)),
    ("direct", (meta(X), X, XS, C)),
    (r"gradients\[1\]", (X, X, [X, X[:2]], C)),
    (r"gradients\[0\]", (X, X, [X.half(), X], C)),
    (r"gradients\[1\]", (X, X, [X, meta(X)], C)),
    ("gradients", (X, X, [], torch.zeros(0))),
    ("gradients", (None, X, [], torch.zeros(0))),
    ("coefficients", (X, X, XS, R3)),
    ("coefficients", (X, X, [X], SCALAR)),
    ("coefficients", (X, X, XS, C.view(1, 2))),
    ("coefficients", (X, X, XS, C.double())),
    ("coefficients", (X, X, XS, meta(C))),
]


@pytest.mark.parametrize(("argument", "arguments"), BAD_MERGES)
def test_merge_norm_names_what_it_refuses(ops: Any, argument: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^(\w+: )?{argument} "):
        ops.merge_norm(*arguments, EPS)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("argument", "arguments"), BAD_BACKWARDS)
def test_backward_names_what_it_refuses(
    ops: Any, argument: str, arguments: tuple[Any, ...], wanted: bool
) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}"):
        ops.merge_norm_backward(*arguments, wanted, wanted)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("argument", "arguments"), BAD_TRANSPOSED)
def test_transposed_merge_names_what_it_refuses(
    ops: Any, argument: str, arguments: tuple[Any, ...], wanted: bool
) -> None:
    with pytest.raises(ValueError, match=rf"^(\w+: )?{argument}"):
        ops.transposed_merge(*arguments, wanted)


def test_no_coefficient_rows(ops: Any) -> None:
    """R = 0 is no error; there is no merge and no gradient, and sums over no rows are zero."""
    merged, normed, rstd = ops.merge_norm(X, XS, torch.zeros(0, 2), W, EPS)
    assert (merged.shape, normed.shape, rstd.shape) == ((0, 3, 8), (0, 3, 8), (0, 3))
    base, for_weight, for_increments, for_row = ops.merge_norm_backward(
        merged, normed, merged, rstd, W, XS, torch.zeros(0, 2), True, True
    )
    assert base.shape == (0, 3, 8)
    assert torch.equal(for_weight, W)
    assert torch.equal(torch.stack(for_increments), torch.zeros(2, 3, 8))
    assert for_row.shape == (0, 2)


# ------------------------------------------------------------------------------------ finding it


def status_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> extension.ExtensionStatus:
    """What loading says of a package folder; past the cache, which holds the real one."""
    monkeypatch.setattr(extension, "_PACKAGE", folder)
    return extension.load_extension.__wrapped__()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package folder with a library that is none, so that nothing is ever loaded from it."""
    (tmp_path / "_extension.cpython.so").write_bytes(b"no library")
    (tmp_path / "_extension.json").write_text(json.dumps(extension.load_extension().build))
    return tmp_path


def test_an_extension_of_another_torch_is_not_loaded(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = package / "_extension.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "torch": "1.0.0"}))
    status = status_of(package, monkeypatch)
    assert not status.loaded
    assert status.reason.startswith(f"the extension was built for torch 1.0.0, this is {torch.__version__} (")
    assert "pip install --no-build-isolation" in status.reason
    monkeypatch.setattr(backends, "load_extension", lambda: status)
    assert resolve_backend("auto") == ("reference", f"plain torch; {status.reason}")
    assert chosen_backend("cpu", tell=False) == "reference"
    assert capsys.readouterr().err == ""
    assert chosen_backend("cpu", tell=True) == "reference"
    assert capsys.readouterr().err == f"merge_norm backend: reference (plain torch; {status.reason})\n"
    with pytest.raises(ValueError) as caught:
        resolve_backend("cpu")
    assert str(caught.value) == (
        f"ops.backend is 'cpu', but {status.reason}; available on this cpu device: reference"
    )


def test_a_missing_or_broken_extension_is_a_status(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = status_of(package, monkeypatch)
    assert not status.loaded
    assert status.reason.startswith("_extension.cpython.so does not load: ")
    (package / "_extension.json").unlink()
    assert "is not built" in status_of(package, monkeypatch).reason
    (package / "_extension.json").write_text("{}")
    (package / "_extension.cpython.so").unlink()
    assert "is not built" in status_of(package, monkeypatch).reason


@pytest.mark.parametrize("note", ["", "{", "{}"])
def test_an_unreadable_note_is_a_status(package: Path, monkeypatch: pytest.MonkeyPatch, note: str) -> None:
    (package / "_extension.json").write_text(note)
    status = status_of(package, monkeypatch)
    assert not status.loaded
    assert "pip install --no-build-isolation" in status.reason


def broken(part: str, value: Callable[[Tensor], Tensor]) -> backends.Backend:
    """The reference, except that one of its results is another."""
    good = backends.get_backend("reference")

    def merge(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        merged, normed = good.merge_norm(*arguments)
        assert normed is not None
        return (
            (value(merged), normed)
            if part == "merged"
            else (merged, value(normed) if part == "normed" else normed)
        )

    def transposed(*arguments: Any) -> tuple[Tensor, Tensor]:
        gradient, products = good.transposed_merge(*arguments)
        return (
            (value(gradient), products)
            if part == "gradient"
            else (gradient, value(products) if part == "products" else products)
        )

    return backends.Backend("cpu", merge, good.merge_gradients, transposed)


class Backwards(torch.autograd.Function):
    """Right forward, wrong backward."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * Backwards.factor


@pytest.mark.parametrize("part", ["merged", "normed", "gradient", "products"])
@pytest.mark.parametrize(
    "value",
    [
        lambda t: t * 1.001,
        lambda t: t * float("nan"),
        lambda t: torch.cat((t.flatten()[:-1], t.new_zeros(1))).view(t.shape),
        lambda t: t[..., 1:],
    ],
    ids=["scaled", "nan", "last-number", "shape"],
)
def test_self_check_catches_other_results(
    monkeypatch: pytest.MonkeyPatch, part: str, value: Callable[[Tensor], Tensor]
) -> None:
    backend, real = broken(part, value), backends.get_backend
    monkeypatch.setattr(backends, "get_backend", lambda name: backend if name == "cpu" else real(name))
    difference = backends.self_check.__wrapped__("cpu", "cpu")
    assert difference is not None
    assert "away from plain torch" in difference or "failed: " in difference


@pytest.mark.parametrize("factor", [0.0, 1.01, float("nan")])
@pytest.mark.parametrize("part", ["merged", "normed"])
def test_self_check_catches_other_gradients(
    monkeypatch: pytest.MonkeyPatch, part: str, factor: float
) -> None:
    backend, real = broken(part, Backwards.apply), backends.get_backend
    monkeypatch.setattr(backends, "get_backend", lambda name: backend if name == "cpu" else real(name))
    assert backends.self_check.__wrapped__("cpu", "cpu") is None  # the factor is 1: it is the reference
    monkeypatch.setattr(Backwards, "factor", factor)
    assert "away from plain torch" in (backends.self_check.__wrapped__("cpu", "cpu") or "")


def test_a_backend_that_fails_its_self_check_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    backend, real = backends.Backend("cpu", fail, fail, fail), backends.get_backend
    monkeypatch.setattr(backends, "get_backend", lambda name: backend if name == "cpu" else real(name))
    monkeypatch.setattr(backends, "self_check", functools.cache(backends.self_check.__wrapped__))
    said = "its self-check on this device failed: no kernel image"
    assert resolve_backend("auto") == ("reference", f"plain torch; {said}")
    with pytest.raises(ValueError, match=f"'cpu', but {said}; available on this cpu device: reference$"):
        resolve_backend("cpu")
