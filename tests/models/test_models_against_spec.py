"""Our models against a second, independent reading of the mathematics on transformers' own LLaMA layers.

The reference keeps nothing of ours but the numbers: layers, mask and rotary positions are transformers',
merges are sums written out. Both sides run in fp32 with the same weights. An iteration
feeds rounding errors back through F, whose Jacobian grows like 1/rms(y), so the tolerance is 1e-4
where plain LLaMA is held to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_iiet import models
from megatron_iiet.hf import import_llama
from megatron_iiet.models import Transformer
from tests.models.conftest import randomise_solvers

Increment = Callable[[Tensor], Tensor]
LAYERS = 4
RELEASED: dict[str, Any] = {"kind": "iiet", "variant": "released"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=67,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=71,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # a stream of unit scale
    folder = tmp_path_factory.mktemp("llama") / "hf"
    model.save_pretrained(folder)
    return model, folder


class HuggingFaceLayers:
    """Embedding, increments F_n(y) = layer_n(y) − y, and head, all computed by transformers."""

    def __init__(self, llama: LlamaForCausalLM, tokens: Tensor) -> None:
        inner = self.inner = llama.model
        self.llama = llama
        self.embedded = inner.embed_tokens(tokens)
        length = tokens.shape[1]
        positions = torch.arange(length)[None]
        tables = inner.rotary_emb(self.embedded, position_ids=positions)
        mask = torch.full((length, length), float("-inf"), dtype=self.embedded.dtype).triu(1)[None, None]
        arguments = {"attention_mask": mask, "position_ids": positions, "position_embeddings": tables}

        def increment(n: int) -> Increment:
            def of(y: Tensor) -> Tensor:
                out = inner.layers[n](y, **arguments)
                return (out[0] if isinstance(out, tuple) else out) - y

            return of

        self.increments = [increment(n) for n in range(LAYERS)]

    def logits(self, y: Tensor) -> Tensor:
        return self.llama.lm_head(self.inner.norm(y))


def section_3(
    hf: HuggingFaceLayers, alpha: list[list[float]], iterations: list[int], predictor: str
) -> Tensor:
    """Algorithm 1, with rows of plain numbers as coefficients."""
    y, kept = hf.embedded, []
    for n, increment in enumerate(hf.increments):
        f = increment(y)
        if predictor == "euler" and iterations[n] == 0:
            out = y + f
        else:
            base = y + sum(alpha[n][j] * kept[j] for j in range(n))
            out = y + f if predictor == "euler" else base + alpha[n][n] * f
            for _ in range(iterations[n]):
                f = increment(out)
                out = base + alpha[n][n] * f
        kept.append(f)
        y = out
    return hf.logits(y)


def released(hf: HuggingFaceLayers, w: Tensor, wc: Tensor, norms: list[Any], iterations: list[int]) -> Tensor:
    """The authors' code: history of LayerNorm-ed outputs, layers counted from 1."""
    history, h = [hf.embedded], hf.embedded
    for n in range(1, LAYERS + 1):
        (weight_a, bias_a), (weight_b, bias_b) = norms[n - 1]
        width = weight_a.shape
        history.append(F.layer_norm(h + hf.increments[n - 1](h), width, weight_a, bias_a, 1e-5))
        for _ in range(iterations[n - 1]):
            mixed = sum(w[n, j] * history[j] for j in range(n + 1))
            assert isinstance(mixed, Tensor)
            history[n] = F.layer_norm(mixed + hf.increments[n - 1](mixed), width, weight_b, bias_b, 1e-5)
        h = sum(wc[n, j] * history[j] for j in range(n + 1))
    return hf.logits(h)


def converted(folder: Path, target: Path, solver: dict[str, Any], random: bool = True) -> Transformer:
    config, state = import_llama(folder, solver)
    models.save(config, state, target)
    model = models.load(target)
    if random:
        randomise_solvers(model)
    return model


def rows_of(model: Transformer) -> list[list[float]]:
    return [model.get_parameter(f"layers.{n}.solver.coefficients").tolist() for n in range(LAYERS)]


TOKENS = torch.randint(71, (2, 33), generator=torch.Generator().manual_seed(2))
PAPER: list[tuple[dict[str, Any], list[int], str]] = [
    *(
        ({"kind": "iiet", "iterations": r, "predictor": p}, r if isinstance(r, list) else [r] * LAYERS, p)
        for r in (0, 1, 3, [0, 3, 1, 2])
        for p in ("merged", "euler")
    ),
    ({"kind": "dlcl"}, [0] * LAYERS, "merged"),
    ({"kind": "dlcl", "coefficient_init": "average"}, [0] * LAYERS, "merged"),
]


@pytest.mark.parametrize(("solver", "iterations", "predictor"), PAPER)
@torch.no_grad()
def test_section_3(
    llama: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    solver: dict[str, Any],
    iterations: list[int],
    predictor: str,
) -> None:
    model = converted(llama[1], tmp_path / "x", solver)
    wanted = section_3(HuggingFaceLayers(llama[0], TOKENS), rows_of(model), iterations, predictor)
    plain = llama[0](TOKENS).logits
    assert (model(TOKENS) - wanted).abs().max() < 1e-4
    if solver["kind"] == "dlcl" or predictor == "merged" or iterations != [0] * LAYERS:
        assert (wanted - plain).abs().max() > 0.05  # the random coefficients do something
    else:
        assert (wanted - plain).abs().max() < 1e-5


@pytest.mark.parametrize("iterations", [0, 1, 3, [0, 3, 1, 2]])
@torch.no_grad()
def test_released(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, iterations: int | list[int]) -> None:
    model = converted(llama[1], tmp_path / "x", {**RELEASED, "iterations": iterations})
    parameter = model.get_parameter
    w, wc = torch.zeros(2, LAYERS + 1, LAYERS + 1)
    norms = []
    for n in range(LAYERS):
        w[n + 1] = parameter(f"layers.{n}.solver.coefficients")
        wc[n + 1] = parameter(f"layers.{n}.solver.readout_coefficients")
        norms.append(
            [
                (parameter(f"layers.{n}.solver.{name}.weight"), parameter(f"layers.{n}.solver.{name}.bias"))
                for name in ("predictor_norm", "corrector_norm")
            ]
        )
    counts = iterations if isinstance(iterations, list) else [iterations] * LAYERS
    wanted = released(HuggingFaceLayers(llama[0], TOKENS), w, wc, norms, counts)
    assert (model(TOKENS) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_released_starts_from_row_averages(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    model = converted(llama[1], tmp_path / "x", {**RELEASED, "iterations": 2}, random=False)
    average = torch.tril(torch.ones(LAYERS + 1, LAYERS + 1)) / torch.arange(1, LAYERS + 2)[:, None]
    ones, zeros = torch.ones(48), torch.zeros(48)
    norms = [[(ones, zeros), (ones, zeros)]] * LAYERS
    wanted = released(HuggingFaceLayers(llama[0], TOKENS), average, average, norms, [2] * LAYERS)
    assert (model(TOKENS) - wanted).abs().max() < 1e-4
