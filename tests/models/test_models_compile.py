"""F under ``torch.compile``: one graph for every layer, evaluation and length, equal to eager."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_iiet.models import Transformer
from megatron_iiet.models.attention_layout import AttentionLayout
from megatron_iiet.ops import resolve_backend
from tests.marks import long_but
from tests.models.conftest import Build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "compiler"),
    long_but(product(("cpu", "reference"), ("aot_eager", "inductor")), ("cpu", "inductor")),
)
def test_a_decoder_layer(backend: str, compiler: str, build: Build) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    assert resolve_backend(backend)[0] == backend
    model = Transformer(build().config, backend=backend)
    model.initialise(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    layer = model.get_submodule("layers.0.increment")
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=counter)
    graphs = 0
    for length in (5, 8, 12):
        y_BTD = torch.randn(2, length, model.config.model.hidden_size, requires_grad=True)
        layout = AttentionLayout(*model.rotary(length, torch.float32))
        leaves = [y_BTD, *layer.parameters()]

        def results(
            function: torch.nn.Module, y: Tensor = y_BTD, at: AttentionLayout = layout
        ) -> list[Tensor]:
            out = function(y, None, at)[0]
            return [out, *torch.autograd.grad(out.square().sum(), leaves)]  # noqa: B023

        for found, wanted in zip(results(compiled), results(layer), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs  # those of the first length
