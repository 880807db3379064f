"""What ranks do in the tests: a whole pretraining run through the public entry point's parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_iiet.config import LoadedConfig, RunConfig, config_from_dict, config_to_dict
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.training.loop import train
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config


def ds_json(folder: Path, stage: int, **extra: Any) -> Path:
    """An ordinary DeepSpeed JSON of a ZeRO stage."""
    path = folder / f"zero{stage}.json"
    # DeepSpeed would look through its whole trace for what is used again within a billion elements
    zero = {"stage": stage, **({"stage3_max_reuse_distance": 0} if stage == 3 else {})}
    zero |= extra.pop("zero_optimization", {})
    path.write_text(json.dumps({"zero_optimization": zero} | extra))
    return path


def pretrain_rank(
    config: dict[str, Any], ds_path: Path | None, accept: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Train as ``pretrain_iiet.py`` does; returns this rank's working weights, name → tensor."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, callbacks = prepare(loaded.config, ds_config, context, accept)
        train(run, callbacks)
        run.close()
        return dict(run.engine.gathered_parameters())


def as_data(config: RunConfig) -> dict[str, Any]:
    """A configuration as plain data, to cross a process boundary."""
    return config_to_dict(config)
