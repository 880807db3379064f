"""Every example configuration loads, validates, and agrees with every DeepSpeed example it can run under."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_iiet.config import ConfigError, RunConfig, check_combination, config_from_file
from megatron_iiet.config.deepspeed import load_ds_config, reconcile
from megatron_iiet.config.schema import iterations_per_layer
from megatron_iiet.models import Transformer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("configs/*.yaml"))
PRESETS = [path for path in CONFIGS if path.stem != "demo"]
DS_CONFIGS = sorted(EXAMPLES.glob("ds_configs/*.json"))
PARAMETERS = {
    "iiet-55m": 54_931_968,
    "iiet-340m": 341_099_520,
    "iiet-740m": 742_860_288,
    "iiet-1.3b": 1_334_806_528,
    "transformer-pp-1.3b": 1_334_806_528,
    "iiet-3b": 3_367_676_928,
    "iiet-7b": 6_738_415_616,
}


def stem(path: Path) -> str:
    return path.stem


def layouts(preset: Path) -> dict[int, tuple[RunConfig, Path]]:
    """Configuration and DeepSpeed file for each number of GPUs that a preset's comments name."""
    found = {}
    for gpus, flags, ds in re.findall(r"^# (\d+) GPUs: (.*)\((.*)\)$", preset.read_text(), re.MULTILINE):
        found[int(gpus)] = (config_from_file(preset, flags.split()), EXAMPLES / ds)
    return found


def memory(config: RunConfig, world_size: int) -> float:
    """The presets' estimate of a GPU's memory in bytes, under ZeRO-1 in bf16 without recomputation."""
    model, training, parallel = config.model, config.training, config.parallel
    n = PARAMETERS[config.output_dir.removeprefix("runs/")] / (parallel.tensor * parallel.pipeline)
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    token = 4 * model.vocab_size
    for count in iterations_per_layer(config):
        token += (count + 1) * (34 * model.hidden_size + 8 * model.ffn_hidden_size)
        token += 4 * model.hidden_size if config.solver.kind == "iiet" else 0
    tokens = training.micro_batch_size * config.data.sequence_length
    return n * (8 + 12 / replicas) + 4 * min(n, 5e8) + tokens / parallel.tensor * token


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_example_is_valid(path: Path) -> None:
    config = config_from_file(path)
    world_size = 2 * config.parallel.tensor * config.parallel.pipeline
    refused = set()
    for ds_path in DS_CONFIGS:
        ds_json = load_ds_config(ds_path)
        try:
            data_parallel_size = check_combination(config, ds_json, world_size, ds_path.name)
        except ConfigError:
            refused.add(ds_path.stem)
            continue
        reconciled = reconcile(ds_json, config, data_parallel_size)
        assert reconciled["train_batch_size"] == config.training.global_batch_size
        assert "auto" not in str(reconciled)
    assert refused == {"zero0"}  # bf16 without ZeRO


@pytest.mark.parametrize("ds_path", DS_CONFIGS, ids=stem)
def test_ds_example_runs_in_fp32(ds_path: Path) -> None:
    config = RunConfig()
    config.training.precision = "fp32"
    assert reconcile(
        load_ds_config(ds_path), config, check_combination(config, load_ds_config(ds_path), 2, "")
    )


@pytest.mark.parametrize("preset", PRESETS, ids=stem)
def test_layouts_of_a_preset(preset: Path) -> None:
    found = layouts(preset)
    assert sorted(found) == [8, 64]
    said = re.search(r"about (\d+) of 80 GB on each of 8 GPUs, (\d+) on each of 64", preset.read_text())
    assert said is not None
    for (gpus, (config, ds_path)), gigabytes in zip(sorted(found.items()), said.groups(), strict=True):
        ds_json = load_ds_config(ds_path)
        data_parallel_size = check_combination(config, ds_json, gpus, ds_path.name)
        assert reconcile(ds_json, config, data_parallel_size)["zero_optimization"]["stage"] == 1
        assert config.parallel.tensor <= 8  # within one host
        assert int(gigabytes) == round(memory(config, gpus) / 1e9) < 70


@pytest.mark.parametrize("preset", PRESETS, ids=stem)
def test_parameters_of_a_preset(preset: Path) -> None:
    config = config_from_file(preset)
    shape = config.model
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    assert shape.num_layers * layer + shape.hidden_size + tables == PARAMETERS[preset.stem]
    with torch.device("meta"):
        model = Transformer(config)
    assert model.num_parameters() - model.num_solver_parameters() == PARAMETERS[preset.stem]
    assert config.output_dir == f"runs/{preset.stem}"
