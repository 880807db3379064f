"""Reading the DeepSpeed JSON and making it agree with the run configuration. Nothing here imports deepspeed,
so a wrong file is reported before the slow start-up."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from megatron_iiet.config.combinations import gradient_accumulation_steps
from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.keys import did_you_mean, join_words
from megatron_iiet.config.loss_scaling import complete
from megatron_iiet.config.rules import AUTO, Setup
from megatron_iiet.config.schema import RunConfig

NEVER_PRINT = 1_000_000_000
"""steps_per_print that silences DeepSpeed's own progress lines; the run has its own logging."""
_NEAR_MISS = 0.8
_KNOWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "pipeline",
    "steps_per_print",
    "activation_checkpointing",
    "communication_data_type",
    "flops_profiler",
    "tensorboard",
    "wall_clock_breakdown",
)
_PIPELINE: dict[str, Any] = {
    # Stages hand on one packed tensor, which DeepSpeed would cut over the tensor-parallel ranks ...
    "pipe_partitioned": False,
    "grad_partitioned": False,
    # ... and recompute their layers themselves.
    "activation_checkpoint_interval": 0,
    "use_reentrant": False,
}
"""Not DeepSpeed's defaults, which do not fit this trainer's stages."""


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        ConfigError: the file cannot be read, is no JSON (line and column), repeats a key or holds no object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"cannot read the DeepSpeed file {path} ({place}): {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(f"cannot read the DeepSpeed file {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"cannot read the DeepSpeed file {path}: it is nested too deeply") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(f"cannot read the DeepSpeed file {path}: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the DeepSpeed file {path} must hold an object {{...}}")
    return data


def reconcile(
    ds_json: dict[str, Any], config: RunConfig, data_parallel_size: int, source: str = "the DeepSpeed file"
) -> dict[str, Any]:
    """The DeepSpeed configuration of this run: ``ds_json`` with every shared value filled in.

    An absent ``optimizer`` section stays absent (the trainer then brings its own); a present one is
    completed. Any other ``"auto"`` is dropped, which leaves DeepSpeed's default or, for a few settings, ours.
    ``ds_json`` is not changed; ``source`` is how messages name it, best the file's path. Whether the settings
    go together is :func:`~megatron_iiet.config.combinations.check_combination`'s business, before this.

    Raises:
        ConfigError: the two sides contradict each other, or the file asks for what this trainer cannot do.
    """
    ds = copy.deepcopy(ds_json)
    _check_keys(ds, source)
    _check_unsupported(ds, source)
    shared: list[tuple[str, str, Any]] = [
        ("train_batch_size", "training.global_batch_size", config.training.global_batch_size),
        ("train_micro_batch_size_per_gpu", "training.micro_batch_size", config.training.micro_batch_size),
        (
            "gradient_accumulation_steps",
            "training.global_batch_size / (training.micro_batch_size x data-parallel ranks)",
            gradient_accumulation_steps(config, data_parallel_size),
        ),
        ("gradient_clipping", "optimizer.gradient_clipping", config.optimizer.gradient_clipping),
        ("bf16.enabled", "training.precision == 'bf16'", config.training.precision == "bf16"),
    ]
    if fp16 := config.training.precision == "fp16":
        ds["fp16"] = complete(ds.get("fp16", {}), source)
    if "fp16" in ds:
        shared.append(("fp16.enabled", "training.precision == 'fp16'", fp16))
    if Setup(config, ds, 0, source).implementation == "deepspeed":
        ds.setdefault("optimizer", {})
    if "optimizer" in ds:
        of_optimizer = config.optimizer.in_deepspeed()
        if of_optimizer is None:
            raise ConfigError(
                f"{source} has an 'optimizer' section, but DeepSpeed has no optimizer of kind "
                f"{config.optimizer.kind}; remove the section"
            )
        shared += [(f"optimizer.{ds_key}", our_key, value) for ds_key, our_key, value in of_optimizer]
    for ds_key, our_key, our_value in shared:
        _fill(ds, ds_key, our_key, our_value, source)
    _drop_auto(ds)
    _fill_own_defaults(ds, config)
    return ds


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a reconciled configuration; DeepSpeed's default is 0."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(ds: dict[str, Any]) -> bool:
    """Whether a configuration has the optimizer in another memory than the model."""
    return bool(ds.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"the key '{key}' appears twice")
        found[key] = value
    return found


def _check_keys(ds: dict[str, Any], source: str) -> None:
    """Catch typos of the keys used here; DeepSpeed's full list of keys is not known to this module."""
    for key in ds:
        if key in _KNOWN_KEYS:
            continue
        if key == "bfloat16":
            raise ConfigError(f"'bfloat16' in {source} is an old name; write 'bf16'")
        hint = did_you_mean(key, _KNOWN_KEYS, cutoff=_NEAR_MISS)
        if hint:
            raise ConfigError(f"unknown key '{key}' in {source}{hint}")
    for section in ("optimizer", "bf16", "fp16", "data_types", "zero_optimization", "pipeline"):
        _check_section(ds, section, source)
    for section in ("offload_optimizer", "offload_param"):
        _check_section(ds.get("zero_optimization", {}), section, source)
    for key in ds.get("pipeline", {}):  # DeepSpeed reads it without looking for keys it does not know
        if key not in (*_PIPELINE, "stages", "partition", "seed_layers"):
            hint = did_you_mean(key, _PIPELINE) or f"; it has {join_words(list(_PIPELINE))}"
            raise ConfigError(f"unknown key 'pipeline.{key}' in {source}{hint}")


def _check_section(parent: dict[str, Any], name: str, source: str) -> None:
    if name in parent and not isinstance(parent[name], dict):
        raise ConfigError(
            f"'{name}' is {json.dumps(parent[name])} in {source}, but must be an object {{...}}"
        )


def _check_unsupported(ds: dict[str, Any], source: str) -> None:
    if "scheduler" in ds:
        raise ConfigError(
            f"{source} has a 'scheduler' section, but the learning rate follows optimizer.schedule, "
            "optimizer.warmup_fraction and optimizer.min_lr_ratio of the run configuration; remove the "
            "section"
        )
    if ds.get("bf16", {}).get("check_grad_overflow", False) not in (False, AUTO):
        raise ConfigError(
            f"bf16.check_grad_overflow is true in {source}, but every step is judged here without waiting "
            "for the device (guards.nonfinite says what happens then); remove it"
        )
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage is {json.dumps(stage)} in {source}, but must be 0, 1, 2 or 3"
        )
    params = ds.get("optimizer", {}).get("params")
    if isinstance(params, dict) and params.get("adam_w_mode", True) is False:
        raise ConfigError(
            f"optimizer.params.adam_w_mode is false in {source}, but optimizer.weight_decay is decoupled "
            "(AdamW); remove it"
        )


def _fill(ds: dict[str, Any], ds_key: str, our_key: str, our_value: Any, source: str) -> None:
    *path, leaf = ds_key.split(".")
    section = ds
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"'{name}' in {source} must be an object {{...}}")
    if not _agree(section.get(leaf, AUTO), our_value):
        theirs, ours = json.dumps(section[leaf]), json.dumps(our_value)
        raise ConfigError(
            f"{ds_key} is {theirs} in {source}, but {our_key} is {ours} in "
            f'the run configuration; make them equal, or write "auto" in {source}'
        )
    section[leaf] = our_value


def _agree(theirs: Any, ours: Any) -> bool:
    if theirs == AUTO:
        return True
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_agree, theirs, ours))
    if isinstance(ours, bool) or isinstance(theirs, bool) or isinstance(ours, str):
        return theirs is ours if isinstance(ours, bool) else theirs == ours
    return isinstance(theirs, (int, float)) and math.isclose(theirs, ours, rel_tol=1e-9)


def _drop_auto(section: dict[str, Any]) -> None:
    for key in [key for key, value in section.items() if value == AUTO]:
        del section[key]
    for value in section.values():
        if isinstance(value, dict):
            _drop_auto(value)


def _fill_own_defaults(ds: dict[str, Any], config: RunConfig) -> None:
    """Where DeepSpeed's defaults lose precision or do not fit this trainer."""
    stage = zero_stage(ds)
    if config.training.precision != "fp32" and stage > 0:
        # DeepSpeed would sum 16-bit gradients over the micro-batches in 16 bits and lose small contributions.
        ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if stage == 1 and ds["data_types"]["grad_accum_dtype"] == "fp32":
            # ... and then round that sum to 16 bits to add it up over the ranks, once a step.
            ds.setdefault("communication_data_type", "fp32")
    if config.training.precision == "bf16":
        ds["bf16"]["check_grad_overflow"] = False  # DeepSpeed's own, which waits for the device in each step
    if config.parallel.pipeline > 1:
        ds["pipeline"] = _PIPELINE | ds.get("pipeline", {})
    if "optimizer" not in ds:  # ours, of whatever kind, which DeepSpeed's authors may not have tested
        ds.setdefault("zero_allow_untested_optimizer", True)
    if offloads_optimizer(ds) and "optimizer" not in ds:
        # torch's fused AdamW steps on CPUs too; DeepSpeed's would be compiled at first use.
        ds.setdefault("zero_force_ds_cpu_optimizer", False)
    ds.setdefault("steps_per_print", NEVER_PRINT)
