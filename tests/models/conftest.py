"""Small models for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer

torch.set_num_threads(1)

SHAPE = {
    "hidden_size": 24,
    "ffn_hidden_size": 37,
    "num_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 61,
    "max_position_embeddings": 32,
}

Build = Callable[..., Transformer]


@pytest.fixture
def build() -> Build:
    """Builds an initialised model: keywords are solver keys, ``model`` and ``training`` whole sections."""

    def make(
        *, model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **solver: Any
    ) -> Transformer:
        sections = {
            "model": {**SHAPE, **(model or {})},
            "solver": {"kind": "euler", **solver},
            "training": training or {},
            "data": {"sequence_length": 16},
        }
        result = Transformer(config_from_dict(sections))
        result.initialise(0)
        return result

    return make


def randomise_solvers(model: Transformer, seed: int = 0) -> None:
    """Random merge coefficients (own near 1, older near 0) and random solver norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".solver." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(1))
