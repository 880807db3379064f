"""Which parameters an optimizer decays, and which must not share a tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_iiet.parallel.tensor import shard_of


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: matrices decay; norms, biases and merge coefficients do not.

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
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": fp32, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
