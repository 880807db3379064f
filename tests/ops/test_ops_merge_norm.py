"""The contract of ``merge_norm``, checked on every backend against fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_iiet.ops import backends, merge_norm, resolve_backend
from megatron_iiet.ops.backends import FusedMergeNorm, unavailable
from megatron_iiet.ops.extension import ExtensionStatus
from tests.ops.inputs import (
    EPS,
    TOLERANCE,
    assert_close,
    exact,
    exact_norm,
    needs_extension,
    on_every_backend,
    placed,
    rms_error,
)

torch.set_num_threads(1)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Any admissible call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 33)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    k = draw(st.integers(0, 9))

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rows = draw(st.sampled_from([None, 1, 2, 3])) if k else None
    coefficients = None
    if k and draw(st.booleans()):
        coefficients = tensor(k) if rows is None else tensor(rows, k)
    weight = None
    if (coefficients is None or coefficients.dim() == 1) and draw(st.booleans()):
        weight = tensor(shape[-1], dtype=draw(st.sampled_from([dtype, torch.float32])))
    residual = tensor(*shape, dtype=dtype) if k == 0 or draw(st.booleans()) else None
    return {
        "residual": residual,
        "increments": [tensor(*shape, dtype=dtype) for _ in range(k)],
        "coefficients": coefficients,
        "norm_weight": weight,
    }


@on_every_backend
@settings(max_examples=80)
@given(call=arguments())
def test_values_against_fp64(call: dict[str, Any], backend: str) -> None:
    call = placed(call, backend)
    merged, normed = merge_norm(**call, eps=EPS, backend=backend)
    wanted, _ = exact(call["residual"], call["increments"], call["coefficients"], None)
    tolerance = TOLERANCE[merged.dtype]
    scale = (
        1 + sum(t.double().abs() for t in call["increments"]) * 3
    )  # a sum errs by its terms, not its value
    assert merged.shape == wanted.shape
    assert ((merged.double() - wanted).abs() <= tolerance * (scale + wanted.abs())).all()
    if call["norm_weight"] is None:
        assert normed is None
        return
    assert normed is not None
    assert normed.dtype == merged.dtype
    wanted_norm = exact_norm(merged, call["norm_weight"])  # of the rounded merge: that is the contract
    torch.testing.assert_close(normed.double(), wanted_norm, rtol=2 * tolerance, atol=1e-6)


@on_every_backend
@settings(max_examples=30)
@given(call=arguments())
def test_norm_is_of_the_rounded_merge_bit_for_bit(call: dict[str, Any], backend: str) -> None:
    call = placed(call, backend)
    merged, normed = merge_norm(**call, eps=EPS, backend=backend)
    if call["norm_weight"] is None:
        return
    again = merge_norm(merged, (), None, call["norm_weight"], eps=EPS, backend=backend)
    assert normed is not None
    assert again.normed is not None
    assert torch.equal(again.merged, merged)
    assert torch.equal(again.normed, normed)


def weighted_gradients(results: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the results times random numbers, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (r.double() * torch.randn(r.shape, generator=generator).to(r.device)).sum()
        for r in results
        if r is not None
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves))


@on_every_backend
@settings(max_examples=30)
@given(call=arguments())
def test_gradients_against_fp64(call: dict[str, Any], backend: str) -> None:
    """fp32 gradients of the fp64 formula. (gradcheck itself needs fp64 storage, which is not offered.)"""
    call = {
        name: [t.float().requires_grad_() for t in value]
        if name == "increments"
        else None
        if value is None
        else value.float().requires_grad_()
        for name, value in placed(call, backend).items()
    }
    leaves = [t for v in call.values() if v is not None for t in (v if isinstance(v, list) else [v])]
    results = merge_norm(**call, eps=EPS, backend=backend)
    wanted = exact(call["residual"], call["increments"], call["coefficients"], call["norm_weight"])
    for ours, theirs in zip(
        weighted_gradients([*results], leaves), weighted_gradients([*wanted], leaves), strict=True
    ):
        # A norm of a small vector amplifies; the gradient's own size sets the scale.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * (1 + theirs.abs().max().item()))


FORMS = ["entry", "corrector", "add-and-norm", "rows", "sum", "norm"]
"""The forms of a call that models make, and a merge without residual."""


def call_of(form: str, dtype: torch.dtype, *, width: int = 257, seed: int = 0) -> dict[str, Any]:
    """A call of rows long enough that no norm is of a small vector."""
    generator = torch.Generator().manual_seed(seed)
    k = {"entry": 6, "rows": 5, "sum": 7, "norm": 0}.get(form, 1)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    rows = {"entry": (k,), "corrector": (k,), "rows": (2, k), "sum": (k,)}.get(form)
    return {
        "residual": None if form == "sum" else draw(5, width, dtype=dtype),
        "increments": [draw(5, width, dtype=dtype) for _ in range(k)],
        "coefficients": None if rows is None else draw(*rows),
        "norm_weight": None if form in ("entry", "rows", "sum") else draw(width),
    }


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call by name, as leaves that need a gradient."""
    named = {name: t for name, t in call.items() if isinstance(t, Tensor)}
    named |= {f"increments[{j}]": t for j, t in enumerate(call["increments"])}
    return {name: t.detach_().requires_grad_() for name, t in named.items()}


@on_every_backend
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_as_close_as_fp32_gets(form: str, backend: str) -> None:
    call = placed(call_of(form, torch.float32), backend)
    leaves = leaves_of(call)
    results = merge_norm(**call, eps=EPS, backend=backend)
    wanted = exact(**{("weight" if name == "norm_weight" else name): value for name, value in call.items()})
    found = weighted_gradients([*results], [*leaves.values()])
    for name, ours, theirs in zip(
        leaves, found, weighted_gradients([*wanted], [*leaves.values()]), strict=True
    ):
        assert_close(ours, theirs, name)


def plain(
    residual: Tensor | None, increments: list[Tensor], coefficients: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What one writes without this library: torch rounds after every operation."""
    if coefficients is not None and coefficients.dim() == 2:
        return torch.stack([plain(residual, increments, row, None)[0] for row in coefficients]), None
    merged = residual
    for j, increment in enumerate(increments):
        term = increment if coefficients is None else coefficients[j] * increment
        merged = term if merged is None else merged + term
    assert merged is not None
    if weight is None:
        return merged, None
    x = merged.float()
    return merged, weight.to(merged.dtype) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).to(
        merged.dtype
    )


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_gradients_beat_plain_autograd(form: str, dtype: torch.dtype, backend: str) -> None:
    """Against fp64, none is worse than what eager torch gives for the same expression.

    Over several draws: a single coefficient's gradient is one number, which luck can make exact.
    """
    errors: dict[str, list[list[float]]] = {}
    for seed in range(8):
        call = placed(call_of(form, dtype, seed=seed), backend)
        leaves = leaves_of(call)
        inputs = {("weight" if name == "norm_weight" else name): value for name, value in call.items()}
        found, eager, wanted = (
            weighted_gradients([*results], [*leaves.values()])
            for results in (merge_norm(**call, eps=EPS, backend=backend), plain(**inputs), exact(**inputs))
        )
        for name, ours, theirs, best in zip(leaves, found, eager, wanted, strict=True):
            errors.setdefault(name, []).append([rms_error(ours, best), rms_error(theirs, best)])
    for name, pairs in errors.items():
        ours_rms, eager_rms = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        assert ours_rms <= eager_rms, name


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coefficients_zero_and_one_are_exact(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    residual, a, b = placed(tuple(torch.randn(3, 4, 64).to(dtype) for _ in range(3)), backend)

    def merge(base: Tensor | None, increments: tuple[Tensor, ...], row: list[float] | None) -> Tensor:
        coefficients = None if row is None else placed(torch.tensor(row), backend)
        return merge_norm(base, increments, coefficients, backend=backend).merged

    assert torch.equal(merge(residual, (a, b), [0.0, 0.0]), residual)
    assert torch.equal(merge(residual, (a, b), [0.0, 1.0]), residual + b)
    assert torch.equal(merge(None, (a,), [1.0]), a)
    plain_sum = merge(residual, (a, b), None)
    assert torch.equal(plain_sum, merge(residual, (a, b), [1.0, 1.0]))
    assert torch.equal(plain_sum, (residual.float() + a.float() + b.float()).to(dtype))


@on_every_backend
def test_sums_are_rounded_once(backend: str) -> None:
    """In bf16, 1 + 256 * 2^-9 would stay 1 if every addition were rounded."""
    count = 128 if backend == "cuda" else 256  # CUDA takes no more
    ones = placed(torch.ones(8, dtype=torch.bfloat16), backend)
    merged = merge_norm(ones, [ones * 2.0**-9] * count, backend=backend).merged
    assert torch.equal(merged, ones * (1 + count * 2.0**-9))


@on_every_backend
def test_rows_equal_single_merges(backend: str) -> None:
    torch.manual_seed(0)
    residual, increments = torch.randn(2, 5, 16), [torch.randn(2, 5, 16) for _ in range(3)]
    residual, increments, rows = placed((residual, increments, torch.randn(2, 3)), backend)
    merged, normed = merge_norm(residual, increments, rows, backend=backend)
    assert normed is None
    for r in range(2):
        assert torch.equal(merged[r], merge_norm(residual, increments, rows[r], backend=backend).merged)


@on_every_backend
def test_without_increments_the_residual_is_returned(backend: str) -> None:
    residual, one, two = placed((torch.randn(3, 8), torch.zeros(0), torch.zeros(2, 0)), backend)
    assert torch.equal(merge_norm(residual, (), backend=backend).merged, residual)
    assert torch.equal(merge_norm(residual, (), one, backend=backend).merged, residual)
    assert torch.equal(merge_norm(residual, (), two, backend=backend).merged, residual.expand(2, 3, 8))


X = torch.zeros(2, 4)
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"residual": None, "increments": ()},
        "merge_norm: residual is None and increments is empty; give at least one of them",
    ),
    (
        {"residual": X.double(), "increments": ()},
        "merge_norm: storage type torch.float64 is not fp32, bf16 or fp16",
    ),
    (
        {"residual": X, "increments": (X, torch.zeros(2, 5))},
        "merge_norm: increments[1] is (2, 5) torch.float32 on cpu, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": X, "increments": (X.bfloat16(),)},
        "merge_norm: increments[0] is (2, 4) torch.bfloat16 on cpu, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": None, "increments": (X, X.to("meta"))},
        "merge_norm: increments[1] is (2, 4) torch.float32 on meta, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(2)},
        "merge_norm: coefficients is (2,) torch.float32 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1).bfloat16()},
        "merge_norm: coefficients is (1,) torch.bfloat16 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1, 1, 1)},
        "merge_norm: coefficients is (1, 1, 1) torch.float32 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1).to("meta")},
        "merge_norm: coefficients is (1,) torch.float32 on meta, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(3)},
        "merge_norm: norm_weight is (3,) on cpu, expected [4] on cpu",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(2, 4)},
        "merge_norm: norm_weight is (2, 4) on cpu, expected [4] on cpu",
    ),
    (
        {
            "residual": X,
            "increments": (X,),
            "coefficients": torch.ones(3, 1),
            "norm_weight": torch.ones(2, 4),
        },
        "merge_norm: norm_weight is (2, 4) on cpu, expected [4] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(3, 1), "norm_weight": torch.ones(4)},
        "merge_norm: coefficients is (3, 1), but a norm is of one merge: give [1], or norm each row's merge "
        "in a call of its own",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(4).to("meta")},
        "merge_norm: norm_weight is (4,) on meta, expected [4] on cpu",
    ),
    (
        {"residual": X, "increments": (), "backend": "tpu"},
        "merge_norm: backend is 'tpu', expected one of reference, cpu, cuda, triton",
    ),
]


# Checked before any backend is asked, so tensors may be anywhere.
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize(("call", "message"), BAD)
def test_messages(call: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError) as caught:
        merge_norm(**{"backend": backend, **call})
    assert str(caught.value) == message


@on_every_backend
def test_a_norm_weight_of_another_type(backend: str) -> None:
    """fp32 slabs with a bf16 weight: a backend computes it, or says what it expects."""
    residual, weight = placed((torch.randn(3, 8), torch.randn(8).bfloat16()), backend)
    try:
        normed = merge_norm(residual, (), None, weight, eps=EPS, backend=backend).normed
    except ValueError as error:
        assert str(error).startswith("merge_norm: norm_weight is (8,) torch.bfloat16")  # noqa: PT017
    else:
        assert normed is not None
        assert_close(normed, exact_norm(residual, weight))


def test_an_unavailable_backend_says_why() -> None:
    for name in ("cpu", "cuda", "triton"):
        reason = unavailable(name)
        if reason is None:
            continue
        with pytest.raises(ValueError) as caught:
            merge_norm(X, (), backend=name)
        assert str(caught.value) == f"merge_norm: backend '{name}' is not available here: {reason}"


def test_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines that this one is not."""
    status = ExtensionStatus(True, "", {"cuda": "13.0"})
    monkeypatch.setattr(backends, "load_extension", lambda: status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert unavailable("triton") == "triton is not installed (pip install triton)"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    assert unavailable("triton") == unavailable("cuda") == "there is no GPU"
    assert unavailable("cpu") is unavailable("reference") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable("triton") is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unavailable("triton") is unavailable("cuda") is None
    status = ExtensionStatus(True, "", {"cuda": None, "no_cuda_because": "no nvcc"})
    assert unavailable("cuda") == "the extension was built without CUDA kernels: no nvcc"
    assert unavailable("cpu") is None
    status = ExtensionStatus(False, "it is of another torch")
    assert unavailable("cuda") == unavailable("cpu") == "it is of another torch"
    assert unavailable("reference") is None


@needs_extension
def test_backends() -> None:
    assert resolve_backend("reference") == ("reference", "asked for")
    assert resolve_backend("cpu") == ("cpu", "asked for")
    name, reason = resolve_backend("auto")
    assert name == "cpu"
    assert reason == f"compiled extension, {torch.backends.cpu.get_cpu_capability()} kernels"
    assert resolve_backend("auto", "meta") == ("reference", "plain torch")
    with pytest.raises(
        ValueError, match=r"ops\.backend is 'cuda', but .+; available on this cpu device: reference, cpu$"
    ):
        resolve_backend("cuda")
    with pytest.raises(ValueError, match=r"'cpu', but its kernels cannot read tensors on meta; available on"):
        resolve_backend("cpu", "meta")
    with pytest.raises(ValueError, match="'tpu', but there are only reference, cpu, cuda, triton; available"):
        resolve_backend("tpu")


@on_every_backend
def test_a_merge_keeps_no_copies_of_the_history(backend: str) -> None:
    """N layers merge N²/2 increments; an fp32 copy of each would outweigh everything else in memory."""
    increments = [placed(torch.randn(4, 64).bfloat16(), backend).requires_grad_() for _ in range(5)]
    coefficients = placed(torch.randn(5), backend).requires_grad_()
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        merge_norm(increments[0], increments, coefficients, backend=backend)
    assert set(saved) <= {t.untyped_storage().data_ptr() for t in (*increments, coefficients)}


@needs_extension
def test_kernels_are_given_no_zeros_for_gradients_that_nobody_has() -> None:
    """Each would be one more slab to fill and to read."""
    true, asked = torch.ops.megatron_iiet, []

    def backward(grad_merged: Tensor | None, grad_normed: Tensor | None, *others: Any) -> Any:
        asked.append((grad_merged is not None, grad_normed is not None))
        return true.merge_norm_backward(grad_merged, grad_normed, *others)

    kernels = SimpleNamespace(merge_norm=true.merge_norm, merge_norm_backward=backward)
    x = torch.ones(3, 8, requires_grad=True)
    for used in ([0], [1], [0, 1]):
        results = FusedMergeNorm.apply(kernels, x, torch.ones(1), torch.ones(8), EPS, x)
        sum(results[i].sum() for i in used).backward()
    assert asked == [(True, False), (False, True), (True, True)]
