"""The presets of ``examples/configs/paper`` against Algorithm 1 in plain torch, layers included.

Nothing of ours is called on the reference's side: it reads numbers out of a state dict and multiplies them in
fp64. The model itself is the preset's, made smaller in shape alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_iiet.config import config_from_file
from megatron_iiet.models import Transformer

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
HEADS, WIDTH = 4, 64
SMALLER = (
    f"--model.hidden_size {WIDTH} --model.ffn_hidden_size 176 --model.num_layers 5 --model.vocab_size 97 "
    f"--model.num_attention_heads {HEADS} --training.precision fp32"
).split()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, base 10000: [B, H, T, K] whose halves are the two coordinates of each pair."""
    length, width = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def increment(y: Tensor, w: dict[str, Tensor]) -> Tensor:
    """F(y): a LLaMA layer without its outer residual."""
    batch, length, width = y.shape
    x = rms_norm(y, w["input_norm.weight"])
    q, k, v = (
        (x @ matrix.T).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        for matrix in w["attention.qkv.weight"].chunk(3)
    )
    scores = rotated(q) @ rotated(k).transpose(-1, -2) / (width // HEADS) ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    a = mixed.transpose(1, 2).reshape(batch, length, width) @ w["attention.output.weight"].T
    gate, up = (rms_norm(y + a, w["post_attention_norm.weight"]) @ w["mlp.gate_up.weight"].T).chunk(2, -1)
    return a + (gate * gate.sigmoid() * up) @ w["mlp.down.weight"].T


def algorithm_1(tokens: Tensor, weights: dict[str, Tensor], layers: int, iterations: int) -> Tensor:
    """Logits [B, T, V]: LLaMA's embedding, no factor on it; predictor and corrector on raw increments."""
    table = weights["embedding.weight"]
    y, kept = table[tokens], []
    for n in range(layers):
        name = f"layers.{n}.increment."
        w = {key[len(name) :]: value for key, value in weights.items() if key.startswith(name)}
        alpha = weights.get(f"layers.{n}.solver.coefficients", torch.tensor([0.0] * n + [1.0]).double())
        base = y + sum(alpha[j] * kept[j] for j in range(n))
        f = increment(y, w)
        y = base + alpha[n] * f
        for _ in range(iterations):
            f = increment(y, w)
            y = base + alpha[n] * f
        kept.append(f)
    return rms_norm(y, weights["norm.weight"]) @ table.T


def furthest(flags: list[str], system: str, iterations: int) -> float:
    """Largest difference of a preset's logits from the reference, over the reference's largest."""
    config = config_from_file(CONFIGS / f"paper/{system}.yaml", [*SMALLER, *flags])
    model = Transformer(config).eval()
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # as if trained: a merge that matters
        if name.endswith("solver.coefficients"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(97, (2, 33), generator=generator)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    wanted = algorithm_1(tokens, weights, config.model.num_layers, iterations)[..., :97]
    with torch.no_grad():
        found = model(tokens)[..., :97].double()
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", ["55m", "340m", "740m"])
@pytest.mark.parametrize(("system", "iterations"), [("iiet", 3), ("dlcl", 0), ("transformer-pp", 0)])
def test_a_paper_preset_computes_algorithm_1(system: str, iterations: int, size: str) -> None:
    assert furthest([], f"{system}-{size}", iterations) < 1e-4


@pytest.mark.parametrize(
    "flags",
    [["--solver.history_norm", "rms"], ["--model.embedding_scale", "unit"], ["--solver.iterations", "2"]],
    ids=lambda flags: flags[0],
)
def test_what_the_paper_does_not_have_is_seen(flags: list[str]) -> None:
    assert furthest(flags, "iiet-55m", 3) > 1e-2
