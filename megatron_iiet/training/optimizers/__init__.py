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
from megatron_iiet.parallel.tensor import shard_of


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


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: matrices decay; norms, biases and merge coefficients do not.

    Parameters that stay fp32 in bf16 training have a group of their own, because DeepSpeed flattens each
    group into one tensor.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    fp32: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "keep_fp32", False):
            fp32.append(parameter)
        else:  # every matrix is marked, as a split bias is; its shape may be ZeRO-3's by now
            matrix = shard_of(parameter) is not None and not name.endswith(".bias")
            (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": fp32, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
