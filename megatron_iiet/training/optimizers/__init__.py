"""The optimizers, a module for each kind that :mod:`megatron_iiet.config.optimizers` declares, of its name.

A module has one function, ``prepare(model, declared)``, which returns a :class:`Prepared`. It names what the
optimizer keeps of every parameter, its moments: checkpoints store them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from megatron_iiet.config.optimizers import OptimizerConfig


@dataclass(frozen=True)
class Prepared:
    """An optimizer for the parameters of a model, not yet built: DeepSpeed may bring its own."""

    groups: Sequence[Mapping[str, Any]]
    """Parameters with what is theirs, as torch's optimizers take them."""
    build: Callable[[Sequence[Mapping[str, Any]]], torch.optim.Optimizer]
    """Makes the optimizer of the groups."""
    moments: Mapping[nn.Parameter, tuple[str, ...]]
    """What it keeps of each parameter: names of tensors of the parameter's size in its state, zero at first.
    The same for all parameters of a group, of which DeepSpeed makes one tensor."""


def prepare_optimizer(model: nn.Module, config: OptimizerConfig) -> Prepared:
    """The optimizer of the kind that a configuration names."""
    prepared: Prepared = import_module(f"{__name__}.{config.kind}").prepare(model, config)
    return prepared
