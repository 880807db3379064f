"""AdamW (Loshchilov and Hutter 2019), torch's fused one."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megatron_iiet.config.optimizers import AdamW
from megatron_iiet.training.optimizers import Prepared, decay_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradient and of its square; DeepSpeed's AdamW has them by the same names."""


def prepare(model: nn.Module, config: AdamW) -> Prepared:
    """AdamW for a model's parameters."""
    groups = decay_groups(model, config.weight_decay)
    build = partial(
        torch.optim.AdamW, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    return Prepared(groups, build, {p: MOMENTS for group in groups for p in group["params"]})
