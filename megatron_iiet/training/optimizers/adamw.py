"""AdamW (Loshchilov and Hutter 2019), torch's fused one or that of NVIDIA's apex."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_iiet.config.optimizers import AdamW, WithAdamW
from megatron_iiet.training.optimizers import Prepared, decay_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradient and of its square, by these names also in DeepSpeed's AdamW and apex's."""


def check(config: AdamW, device: torch.device) -> None:
    """Whether the implementation that is asked for can run on a device.

    Raises:
        ValueError: it cannot.
    """
    if config.implementation != "apex":
        return
    found = find_spec("apex")  # which imports nothing: the namesake may be of another age of Python
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    if found is None:
        reason = "there is no apex"
    elif not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        reason = "the apex installed is another project of that name, as PyPI has one"
    elif find_spec("amp_C") is None:
        reason = "it was built without its CUDA extensions"
    elif device.type != "cuda":
        reason = f"it steps on NVIDIA GPUs only, and this run is on {device.type}"
    else:
        return
    raise ValueError(
        f"optimizer.implementation is 'apex', NVIDIA's, but {reason}; set it to 'auto', or build apex with "
        "its CUDA extensions from https://github.com/NVIDIA/apex"
    )


def prepare(model: nn.Module, config: AdamW) -> Prepared:
    """AdamW for a model's parameters."""
    groups = decay_groups(model, config.weight_decay)
    fused = _of_apex if config.implementation == "apex" else partial(torch.optim.AdamW, fused=True)
    build = partial(fused, **settings(config))
    return Prepared(groups, build, {p: MOMENTS for group in groups for p in group["params"]})


def settings(config: WithAdamW) -> dict[str, Any]:
    """What torch's AdamW and apex's are given beside groups of parameters."""
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def _of_apex(groups: Sequence[Mapping[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """It counts steps in the group, where a resumed run sets them."""
    from apex.optimizers import FusedAdam

    built: torch.optim.Optimizer = FusedAdam([{**group, "step": 0} for group in groups], **settings)
    return built
