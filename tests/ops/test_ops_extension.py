"""The compiled extension: what torch is told of its operators, and how it is found."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megatron_iiet.ops import backends, chosen_backend, extension, merge_norm, resolve_backend
from tests.marks import long_but
from tests.ops.inputs import EPS, assert_close, draw, needs_extension, slabs

torch.set_num_threads(1)
pytestmark = needs_extension

# ------------------------------------------------------------------------------------ what torch is told

bf16, fp32 = torch.bfloat16, torch.float32


def merge_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """merge_norm in all its forms."""
    x = draw(3, 2, 20, grad=True)
    xs = slabs(2, 3, 2, 20, grad=True)
    w = draw(20, seed=1, grad=True)
    c, c2 = draw(2, seed=3, grad=True), draw(2, 2, seed=4, grad=True)
    yield "entry", (x, xs, c, None, EPS)
    yield "no-residual", (None, xs, c, None, EPS)
    yield "corrector", (x, xs[:1], c[:1].detach().requires_grad_(), w, EPS)
    yield "ones", (x, xs, None, w, EPS)
    yield "rows", (x, xs, c2, None, EPS)
    yield "rows-no-residual", (None, xs, c2, None, EPS)
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
            tree_map_only(Tensor, Tensor.detach, arguments),  # they have no derivatives
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


def leaves(rows: int) -> list[Tensor]:
    return [
        *(draw(rows, 16, seed=s, grad=True) for s in range(3)),
        draw(2, seed=4, grad=True),
        draw(16, seed=5, grad=True),
    ]


Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]
"""Of residual, two increments, coefficients, weight and backend."""


def merged_and_normed(x: Tensor, increments: Sequence[Tensor], c: Tensor | None, w: Tensor, b: str) -> Tensor:
    merged, normed = merge_norm(x, increments, c, w, backend=b)
    assert normed is not None
    return merged * normed


def normed_of(x: Tensor, increments: Sequence[Tensor], w: Tensor, b: str) -> Tensor:
    normed = merge_norm(x, increments, None, w, backend=b).normed
    assert normed is not None
    return normed


FORMS: dict[str, Form] = {
    "corrector": lambda x, f, g, c, w, b: merged_and_normed(x, (f, g), c, w, b),
    "add and norm": lambda x, f, g, c, w, b: merged_and_normed(x, (f,), None, w, b) + g,
    "add and norm, normed alone": lambda x, f, g, c, w, b: normed_of(x, (f,), w, b) + g,
    "norm": lambda x, f, g, c, w, b: normed_of(x, (), w, b) * f,
    "norm of what is used on": lambda x, f, g, c, w, b: normed_of(x, (), w, b) * f + x,
    "merge": lambda x, f, g, c, w, b: merge_norm(x, (f, g), c, backend=b).merged,
    "merge of increments alone": lambda x, f, g, c, w, b: merge_norm(None, (f, g), c, backend=b).merged,
    "plain sum": lambda x, f, g, c, w, b: merge_norm(x, (f, g), backend=b).merged,
    "two rows": lambda x, f, g, c, w, b: merge_norm(x, (f, g), torch.stack((c, 2 * c)), backend=b).merged[0],
}
"""Every one that the models use."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "compiler"),
    long_but(
        [("cpu", "aot_eager"), ("reference", "aot_eager"), ("cpu", "inductor"), ("reference", "inductor")],
        ("cpu", "aot_eager"),
    ),
)
def test_compiled_equals_eager(backend: str, compiler: str) -> None:
    """As one graph, whatever the number of rows, once the backend was looked up, which every run does at its
    start; with something before and after the merge."""
    from torch._dynamo.testing import CompileCounterWithBackend

    assert resolve_backend(backend)[0] == backend
    for name, form in FORMS.items():

        def f(residual: Tensor, *others: Tensor, form: Form = form) -> Tensor:
            return form(residual * 2, *others, backend).sin()  # type: ignore[call-arg, arg-type]

        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(f, dynamic=True, fullgraph=True, backend=counter)
        graphs = 0
        for rows in (3, 5, 9):
            inputs = leaves(rows)
            found, wanted = compiled(*inputs), f(*inputs)
            graphs = graphs or counter.frame_count
            gradients = (
                torch.autograd.grad(out.sum(), inputs, allow_unused=True, materialize_grads=True)
                for out in (found, wanted)
            )
            for ours, theirs in [(found, wanted), *zip(*gradients, strict=True)]:
                # Inductor's own sin and products err in the last place, and it sums in another order.
                tolerance = 0 if compiler == "aot_eager" else {"cpu": 1e-6, "reference": 1e-5}[backend]
                assert_close(ours, theirs, name, tolerance=tolerance)
        assert counter.frame_count == graphs, name


def test_the_operators_refuse_derivatives(ops: Any) -> None:
    """Nothing computes them but the public function, once; a silent zero would be a wrong number."""
    residual, a, b, coefficients, weight = leaves(3)
    merged, normed, _ = ops.merge_norm(residual, [a, b], coefficients, weight, EPS)
    with pytest.raises(RuntimeError, match=r"megatron_iiet\.ops\.merge_norm has"):
        (merged * normed).sum().backward()
    merged, normed = merge_norm(residual, (a, b), coefficients, weight, backend="cpu")
    assert normed is not None
    (first,) = torch.autograd.grad((merged * normed).sum(), coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


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

    return backends.Backend(merge, good.merge_gradients, transposed)


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

    backend, real = backends.Backend(fail, fail, fail), backends.get_backend
    monkeypatch.setattr(backends, "get_backend", lambda name: backend if name == "cpu" else real(name))
    monkeypatch.setattr(backends, "self_check", functools.cache(backends.self_check.__wrapped__))
    said = "its self-check on this device failed: no kernel image"
    assert resolve_backend("auto") == ("reference", f"plain torch; {said}")
    with pytest.raises(ValueError, match=f"'cpu', but {said}; available on this cpu device: reference$"):
        resolve_backend("cpu")


def test_an_extension_of_older_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks an operator that this package calls: told as one that is not there, before anything runs."""
    monkeypatch.setattr(extension, "OPERATORS", (*extension.OPERATORS, "of_tomorrow"))
    status = extension.load_extension.__wrapped__()
    assert not status.loaded
    assert re.search(
        r"_extension.*\.so is of older sources: no of_tomorrow \(pip install .* anew\)", status.reason
    )


def test_operators_are_those_of_the_schema() -> None:
    sources = Path(__file__).parents[2] / "csrc" / "schema.cpp"
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', sources.read_text(encoding="utf-8"))
    assert tuple(defined) == extension.OPERATORS
