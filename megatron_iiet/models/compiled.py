"""F compiled by torch.compile: one graph for all layers and all evaluations, whatever their number.

Weights are inputs of the graph, and its own input is normed before it, so that all calls are alike; there is
a second one without gradients, for validation, and each for other shapes. Collectives of tensor parallelism
lie between graphs.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from megatron_iiet.models.layer import DecoderLayer


@cache
def _compiled() -> Any:
    return torch.compile(DecoderLayer.of_normed, dynamic=False)


def compile_layers(model: nn.Module) -> None:
    """Have the decoder layers of a model run compiled, from their first call on."""
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            cast(Any, module).of_normed = MethodType(_compiled(), module)
