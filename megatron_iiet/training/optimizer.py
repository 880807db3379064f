"""AdamW and what it decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_iiet.config.schema import OptimizerConfig
from megatron_iiet.parallel.tensor import shard_of


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay; norms, biases and merge coefficients do not.

    Parameters that stay fp32 in bf16 training have a group of their own, because DeepSpeed flattens each
    group into one tensor.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    fp32: list[nn.Parameter] = []
    for parameter in model.parameters():
        if getattr(parameter, "keep_fp32", False):
            fp32.append(parameter)
        elif shard_of(parameter) is not None:  # every matrix is marked; its shape may be ZeRO-3's by now
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": fp32, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW over :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
