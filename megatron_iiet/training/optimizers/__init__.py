"""The optimizers, a module for each kind that :mod:`megatron_iiet.config.optimizers` declares, of its name.

A module has ``prepare(model, declared)``, which returns a :class:`Prepared`. It names what the optimizer
keeps of every parameter, its moments: checkpoints store them by these names. It may have
``check(declared, device)``, which raises a ValueError before anything is built. An optimizer whose
``defaults["fused"]`` is true leaves a step out, on the device, if its ``found_inf`` is 1, as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from megatron_iiet.config.optimizers import OptimizerConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.tensor import shard_of


@dataclass(frozen=True)
class MasterPart:
    """What this rank holds of one parameter: an interval of its flattened fp32 master."""

    parameter: Any
    shape: tuple[int, ...]
    """Of the whole tensor-parallel shard."""
    start: int
    """First element of the flattened shard that is this rank's."""
    index: int
    """Which of the tensors that the optimizer steps has it; the same on every data-parallel rank."""
    flat: Tensor
    """That tensor, which has the moments in its state."""
    offset: int
    """Where the interval starts in ``flat``."""
    numel: int

    def own(self, flat: Tensor) -> Tensor:
        """The interval of the master, or of a tensor beside it, as a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def _needs_no_place(
    optimizer: Any, flats: Sequence[Tensor], parts: Iterable[MasterPart], context: ParallelContext
) -> None:
    """Elementwise optimizers work wherever DeepSpeed puts the elements."""


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
    connect: Callable[[Any, Sequence[Tensor], Iterable[MasterPart], ParallelContext], None] = _needs_no_place
    """Tells the optimizer, once DeepSpeed has it, which tensors it steps and what they hold of the
    parameters. Every rank calls it."""


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Whether an optimizer can run on a device.

    Raises:
        ValueError: it cannot.
    """
    check = getattr(import_module(f"{__name__}.{config.kind}"), "check", None)
    if check is not None:
        check(config, device)


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
