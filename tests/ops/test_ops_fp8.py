"""fp8 products against exact ones and torch's scaled product, and of numbers that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.models import Transformer
from megatron_iiet.ops.fp8 import Products, rounded

SCALINGS = ["tensorwise", "rowwise"]
BOUNDS = {"tensorwise": (0.04, 0.08), "rowwise": (0.04, 0.04)}
"""Of a linear map and its gradients, rms error relative to the rms: e4m3 has 3 bits behind the point, e5m2
two."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_linear_map_and_its_gradients(scaling: str) -> None:
    x, weight, gradient = drawn(2, 24, 64), drawn(48, 64, seed=1), drawn(2, 24, 48, seed=2) * 1e-6
    leaves = [each.clone().requires_grad_() for each in (x, weight)]
    out = Products(scaling)(*leaves)
    out.backward(gradient)
    exact = [each.double().requires_grad_() for each in (x, weight)]
    expected = exact[0] @ exact[1].t()
    expected.backward(gradient.double())
    assert out.dtype == leaves[0].grad.dtype == leaves[1].grad.dtype == torch.bfloat16
    forward, backward = BOUNDS[scaling]
    assert 1e-3 < rms(out - expected) < forward * rms(expected)
    for mine, theirs in zip(leaves, exact, strict=True):
        assert rms(mine.grad - theirs.grad) < backward * rms(theirs.grad)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_numbers_are_those_of_torchs_scaled_product(scaling: str) -> None:
    """Which multiplies on GPUs, and here by another way."""
    x, weight = drawn(32, 64), drawn(48, 64, seed=1)
    by_rows = scaling == "rowwise"
    a, of_rows = rounded(x, torch.float8_e4m3fn, 1 if by_rows else None)
    b, of_columns = rounded(weight.t(), torch.float8_e4m3fn, 0 if by_rows else None)
    theirs = torch._scaled_mm(a, b, scale_a=of_rows, scale_b=of_columns, out_dtype=torch.bfloat16)
    torch.testing.assert_close(Products(scaling).linear(x, weight), theirs, rtol=2**-8, atol=1e-3)


def test_rows_of_very_different_size_keep_their_precision_by_rows_only() -> None:
    x, weight = drawn(32, 64), drawn(48, 64, seed=1)
    x[0] *= 1e5
    expected = x.double() @ weight.double().t()
    small = [rms((Products(each).linear(x, weight) - expected)[1:]) / rms(expected[1:]) for each in SCALINGS]
    assert small[0] > 0.2
    assert small[1] < 0.04


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(scaling: str, bad: float) -> None:
    x, weight = drawn(16, 64), drawn(48, 64, seed=1)
    x[3, 5] = bad
    assert not Products(scaling).linear(x, weight)[3].isfinite().any()
    x[3, 5] = 0.0
    assert not Products(scaling).linear(x * 0, weight).any()


def test_gradients_have_a_wide_range_with_one_scale() -> None:
    """Of rows ten million times smaller than others something is left."""
    gradient, weight = drawn(32, 64), drawn(64, 48, seed=1)
    gradient[1:] *= 1e-7
    expected = (gradient.double() @ weight.double())[1:]
    for scaling in SCALINGS:
        found = Products(scaling).for_input(gradient, weight)[1:]
        assert rms(found - expected) < 0.1 * rms(expected)


def test_it_is_refused_on_devices_that_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    device = torch.device("cuda", 0)
    for scaling in ("off", "tensorwise"):
        Products(scaling).check(device)
    Products("rowwise").check(torch.device("cpu"))
    for name, capability, said in (
        ("rowwise", (8, 9), "9.0, but NVIDIA L40S has 8.9; set it to tensorwise or off"),
        ("rowwise", (8, 0), "9.0, but NVIDIA L40S has 8.0; set it to off"),
        ("tensorwise", (8, 0), "8.9, but NVIDIA L40S has 8.0; set it to off"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ValueError, match="training") as caught:
            Products(name).check(device)
        assert str(caught.value) == f"training.fp8 is {name}, which takes a GPU of compute capability {said}"


def test_of_a_model_the_maps_of_layers_multiply_so() -> None:
    """And nothing else: of the rest only an untied head has a map, which stays as it is."""
    config = RunConfig()
    config.training.fp8 = "rowwise"
    config.model.tie_embeddings = False
    found = {
        n: m.products.scaling
        for n, m in Transformer.on_meta(config).named_modules()
        if hasattr(m, "products")
    }
    assert found.pop("head") == "off"
    assert len(found) == 4 * config.model.num_layers
    assert set(found.values()) == {"rowwise"}


def test_off_is_the_product_of_other_precisions() -> None:
    x, weight, gradient = drawn(2, 24, 64), drawn(48, 64, seed=1), drawn(2, 24, 48, seed=2)
    off = Products()
    leaves = [each.clone().requires_grad_() for each in (x, weight)]
    out = off(*leaves)
    out.backward(gradient)
    assert torch.equal(off.linear(x, weight), out)
    assert torch.equal(off.for_input(gradient, weight), leaves[0].grad)
    torch.testing.assert_close(off.for_weight(gradient, x), leaves[1].grad)
