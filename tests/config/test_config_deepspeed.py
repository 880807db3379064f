"""Reconciliation with the DeepSpeed JSON."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.config.deepspeed import load_ds_config, reconcile, zero_stage
from megatron_iiet.config.loss_scaling import loss_scaling

EXAMPLES = Path(__file__).parents[2] / "examples" / "ds_configs"


def fp32() -> RunConfig:
    config = RunConfig()
    config.training.precision = "fp32"
    return config


def test_everything_shared_is_filled_in() -> None:
    ds = {"zero_optimization": {"stage": 1}}
    assert reconcile(ds, RunConfig(), 4) == {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    assert ds == {"zero_optimization": {"stage": 1}}  # the caller's dictionary is left alone


def test_fp32_without_zero() -> None:
    ds = reconcile({"fp16": {"enabled": "auto"}}, fp32(), 1)
    assert ds["bf16"] == {"enabled": False}
    assert ds["fp16"] == {"enabled": False}
    assert "data_types" not in ds
    assert zero_stage(ds) == 0


def test_optimizer_section_is_completed() -> None:
    params = {"lr": "auto", "betas": [0.9, "auto"], "torch_adam": True}
    ds = reconcile(
        {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": params}}, RunConfig(), 1
    )
    assert ds["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True},
    }
    assert zero_stage(ds) == 2
    bare = reconcile({"zero_optimization": {"stage": 2}, "optimizer": {}}, RunConfig(), 1)
    assert bare["optimizer"]["type"] == "AdamW"


def test_pipeline_section_is_completed() -> None:
    config = RunConfig()
    assert "pipeline" not in reconcile(Z1, config, 2)
    config.parallel.pipeline = 2
    assert reconcile(Z1, config, 2)["pipeline"] == {
        "pipe_partitioned": False,
        "grad_partitioned": False,
        "activation_checkpoint_interval": 0,
        "use_reentrant": False,
    }
    given = {**Z1, "pipeline": {"grad_partitioned": True, "use_reentrant": "auto"}}
    assert reconcile(given, config, 2)["pipeline"]["grad_partitioned"] is True
    assert reconcile(given, config, 2)["pipeline"]["use_reentrant"] is False


def test_gradients_are_summed_in_fp32() -> None:
    config = RunConfig()
    ds = reconcile({"zero_optimization": {"stage": 2}}, config, 2)
    assert ds["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "communication_data_type" not in ds  # reduced after every micro-batch: twice the traffic
    assert (
        reconcile({**Z1, "communication_data_type": "bf16"}, config, 2)["communication_data_type"] == "bf16"
    )
    config.parallel.pipeline = 2
    assert "data_types" not in reconcile({}, config, 2)  # DeepSpeed cannot without ZeRO


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_is_torchs(stage: int) -> None:
    offload = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    assert reconcile(offload, RunConfig(), 1)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in reconcile(offload | {"optimizer": {}}, RunConfig(), 1)
    none = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}}}
    assert "zero_force_ds_cpu_optimizer" not in reconcile(none, RunConfig(), 1)


def test_equal_values_and_own_choices_are_kept() -> None:
    given = {
        "train_batch_size": 128,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False},
        "comms_logger": {"enabled": False},
    }
    ds = reconcile(given, RunConfig(), 1)
    for key in ("data_types", "steps_per_print", "wall_clock_breakdown", "comms_logger"):
        assert ds[key] == given[key]
    assert ds["zero_optimization"] == {"stage": 3, "overlap_comm": False}  # auto: DeepSpeed's default


Z1 = {"zero_optimization": {"stage": 1}}
EQUAL = 'in the run configuration; make them equal, or write "auto" in ds.json'
RECONCILE_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {**Z1, "train_batch_size": 64},
        f"train_batch_size is 64 in ds.json, but training.global_batch_size is 128 {EQUAL}",
    ),
    (
        {**Z1, "train_micro_batch_size_per_gpu": 4},
        f"train_micro_batch_size_per_gpu is 4 in ds.json, but training.micro_batch_size is 8 {EQUAL}",
    ),
    (
        {**Z1, "gradient_accumulation_steps": 2},
        "gradient_accumulation_steps is 2 in ds.json, but training.global_batch_size / "
        f"(training.micro_batch_size x data-parallel ranks) is 8 {EQUAL}",
    ),
    (
        {**Z1, "gradient_clipping": 0.5},
        f"gradient_clipping is 0.5 in ds.json, but optimizer.gradient_clipping is 1.0 {EQUAL}",
    ),
    (
        {**Z1, "gradient_clipping": 1.001},
        f"gradient_clipping is 1.001 in ds.json, but optimizer.gradient_clipping is 1.0 {EQUAL}",
    ),
    (
        {**Z1, "gradient_clipping": "1.0"},
        f'gradient_clipping is "1.0" in ds.json, but optimizer.gradient_clipping is 1.0 {EQUAL}',
    ),
    (
        {**Z1, "bf16": {"enabled": False}},
        f"bf16.enabled is false in ds.json, but training.precision == 'bf16' is true {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"type": "Lion"}},
        f'optimizer.type is "Lion" in ds.json, but the run\'s optimizer is "AdamW" {EQUAL}',
    ),
    (
        {**Z1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
        f"optimizer.params.lr is 0.1 in ds.json, but optimizer.lr is 0.0003 {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"params": {"betas": [0.9, 0.999]}}},
        "optimizer.params.betas is [0.9, 0.999] in ds.json, but [optimizer.beta1, optimizer.beta2] is "
        f"[0.9, 0.95] {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"params": {"betas": [0.9]}}},
        "optimizer.params.betas is [0.9] in ds.json, but [optimizer.beta1, optimizer.beta2] is "
        f"[0.9, 0.95] {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"params": {"eps": 1e-6}}},
        f"optimizer.params.eps is 1e-06 in ds.json, but optimizer.eps is 1e-08 {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"params": {"weight_decay": 0}}},
        f"optimizer.params.weight_decay is 0 in ds.json, but optimizer.weight_decay is 0.01 {EQUAL}",
    ),
    (
        {**Z1, "optimizer": {"params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode is false in ds.json, but optimizer.weight_decay is decoupled (AdamW); "
        "remove it",
    ),
    ({**Z1, "optimizer": {"params": 3}}, "'params' in ds.json must be an object {...}"),
    ({**Z1, "optimizer": "AdamW"}, "'optimizer' is \"AdamW\" in ds.json, but must be an object {...}"),
    (
        {**Z1, "scheduler": {"type": "WarmupLR"}},
        "ds.json has a 'scheduler' section, but the learning rate follows optimizer.schedule, "
        "optimizer.warmup_fraction and optimizer.min_lr_ratio of the run configuration; remove the section",
    ),
    (
        {**Z1, "fp16": {"enabled": True}},
        f"fp16.enabled is true in ds.json, but training.precision == 'fp16' is false {EQUAL}",
    ),
    (
        {**Z1, "bf16": {"check_grad_overflow": True}},
        "bf16.check_grad_overflow is true in ds.json, but every step is judged here without waiting for the "
        "device (guards.nonfinite says what happens then); remove it",
    ),
    (
        {"zero_optimization": {"stage": 4}},
        "zero_optimization.stage is 4 in ds.json, but must be 0, 1, 2 or 3",
    ),
    (
        {"zero_optimization": {"stage": True}},
        "zero_optimization.stage is true in ds.json, but must be 0, 1, 2 or 3",
    ),
    (
        {"zero_optimization": {"stage": "auto"}},
        'zero_optimization.stage is "auto" in ds.json, but must be 0, 1, 2 or 3',
    ),
    (
        {"zero_optimisation": {"stage": 1}},
        "unknown key 'zero_optimisation' in ds.json; did you mean 'zero_optimization'?",
    ),
    (
        {**Z1, "train_micro_batch_size": 8},
        "unknown key 'train_micro_batch_size' in ds.json; did you mean 'train_micro_batch_size_per_gpu' or 'train_batch_size'?",
    ),
    ({**Z1, "bfloat16": {"enabled": True}}, "'bfloat16' in ds.json is an old name; write 'bf16'"),
    (
        {**Z1, "pipline": {"grad_partitioned": False}},
        "unknown key 'pipline' in ds.json; did you mean 'pipeline'?",
    ),
    (
        {**Z1, "pipeline": {"grad_partitoned": False}},
        "unknown key 'pipeline.grad_partitoned' in ds.json; did you mean 'grad_partitioned'?",
    ),
    (
        {**Z1, "pipeline": {"chunks": 2}},
        "unknown key 'pipeline.chunks' in ds.json; it has pipe_partitioned, grad_partitioned, "
        "activation_checkpoint_interval or use_reentrant",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": True}},
        "'offload_param' is true in ds.json, but must be an object {...}",
    ),
]


@pytest.mark.parametrize(("ds", "message"), RECONCILE_ERRORS, ids=lambda value: str(value)[:50])
def test_reconcile_errors(ds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reconcile(ds, RunConfig(), 2, source="ds.json")
    assert str(caught.value) == message


def fp16() -> RunConfig:
    config = RunConfig()
    config.training.precision = "fp16"
    return config


def test_fp16_has_deepspeeds_settings() -> None:
    """And what of its loss scale is not DeepSpeed's to know."""
    ds = reconcile({**Z1, "fp16": {"enabled": "auto", "hysteresis": 3, "loss_scale": "auto"}}, fp16(), 1)
    assert ds["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 3,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
        "auto_cast": False,
        "fp16_master_weights_and_grads": False,
    }
    assert ds["bf16"] == {"enabled": False}
    assert (ds["data_types"], ds["communication_data_type"]) == ({"grad_accum_dtype": "fp32"}, "fp32")
    scaling = loss_scaling(ds)
    assert (scaling.initial, scaling.dynamic, scaling.hysteresis, scaling.least) == (65536.0, True, 3, 1.0)
    given = loss_scaling(reconcile({**Z1, "fp16": {"loss_scale": 0.5}}, fp16(), 1))
    assert (given.initial, given.dynamic, given.least) == (0.5, False, 0.5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"enabled": False}, f"fp16.enabled is false in ds.json, but training.precision == 'fp16' is true {EQUAL}"),
        ({"loss_scale_windw": 5}, "unknown key 'fp16.loss_scale_windw' in ds.json; did you mean 'loss_scale_window'?"),
        ({"window": 5}, "unknown key 'fp16.window' in ds.json; it has enabled, loss_scale, initial_scale_power, loss_scale_window, hysteresis, consecutive_hysteresis, min_loss_scale, auto_cast or fp16_master_weights_and_grads"),
        ({"initial_scale_power": 33}, "fp16.initial_scale_power is 33 in ds.json, but must be an integer from 0 to 32"),
        ({"initial_scale_power": 16.0}, "fp16.initial_scale_power is 16.0 in ds.json, but must be an integer from 0 to 32"),
        ({"loss_scale_window": 0}, "fp16.loss_scale_window is 0 in ds.json, but must be an integer from 1 on"),
        ({"hysteresis": True}, "fp16.hysteresis is true in ds.json, but must be an integer from 1 on"),
        ({"min_loss_scale": 0}, "fp16.min_loss_scale is 0 in ds.json, but must be a number above 0, up to 2^32"),
        ({"loss_scale": -1}, "fp16.loss_scale is -1 in ds.json, but must be 0, for a scale that adapts, or a number up to 2^32"),
        ({"loss_scale": float("nan")}, "fp16.loss_scale is NaN in ds.json, but must be 0, for a scale that adapts, or a number up to 2^32"),
        ({"consecutive_hysteresis": 1}, "fp16.consecutive_hysteresis is 1 in ds.json, but must be true or false"),
        ({"initial_scale_power": 2, "min_loss_scale": 8}, "fp16.initial_scale_power is 2 in ds.json, so that the first scale is 4, but fp16.min_loss_scale is 8; raise the one or lower the other"),
    ],
    ids=str,
)  # fmt: skip
def test_fp16_settings_that_do_not_fit(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reconcile({**Z1, "fp16": section}, fp16(), 2, source="ds.json")
    assert str(caught.value) == message


def test_world_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="8 x 3 = 24"):
        reconcile(Z1, RunConfig(), 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_examples(stage: int) -> None:
    config = fp32() if stage == 0 else RunConfig()
    ds = reconcile(load_ds_config(EXAMPLES / f"zero{stage}.json"), config, 2)
    assert zero_stage(ds) == stage
    assert '"auto"' not in json.dumps(ds)
    assert ds["train_batch_size"] == 128


FILE_ERRORS = [
    ('{"a": 1,}', "cannot read the DeepSpeed file ds.json (line 1, column 8): Illegal trailing comma before end of object"),
    ('{"a": 1, "a": 2}', "cannot read the DeepSpeed file ds.json: the key 'a' appears twice"),
    ('{"a": {"b": 1, "b": 2}}', "cannot read the DeepSpeed file ds.json: the key 'b' appears twice"),
    ("[1]", "the DeepSpeed file ds.json must hold an object {...}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS, ids=lambda value: value[:20])
def test_file_errors(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ds_config("ds.json")
    if "comma" in message:  # the decoder's own words differ between Python versions
        assert str(caught.value).startswith("cannot read the DeepSpeed file ds.json (line 1, column ")
    else:
        assert str(caught.value) == message


def test_missing_file() -> None:
    with pytest.raises(ConfigError) as caught:
        load_ds_config("no.json")
    assert str(caught.value) == "cannot read the DeepSpeed file no.json: No such file or directory"
