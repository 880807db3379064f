"""The optimizers, a module for each kind that :mod:`megatron_iiet.config.optimizers` declares, of its name.

A module has one function, ``prepare(model, config)``, see :class:`Prepare`. What an optimizer keeps of a
parameter, its moments, is named by ``prepare`` for every parameter: checkpoints store them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

from megatron_iiet.config.schema import OptimizerConfig


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


class Prepare(Protocol):
    """What a module of this package defines."""

    def __call__(self, model: nn.Module, config: OptimizerConfig) -> Prepared: ...


def prepare_optimizer(model: nn.Module, config: OptimizerConfig) -> Prepared:
    """The optimizer of the kind that a configuration names."""
    prepare: Prepare = import_module(f"{__name__}.{config.kind}").prepare
    return prepare(model, config)
