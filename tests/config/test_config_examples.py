"""Every example configuration loads and agrees with every DeepSpeed example it can run under; every preset is
the model that its name says, has the paper's hyperparameters, and fits the GPUs that it claims."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_iiet.config import (
    ConfigError,
    RunConfig,
    check_combination,
    config_from_dict,
    config_from_file,
    config_to_dict,
)
from megatron_iiet.config.deepspeed import load_ds_config, reconcile
from megatron_iiet.models import Transformer
from megatron_iiet.ops import products

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("configs/*.yaml"))
PRESETS = [path for path in CONFIGS if not path.stem.startswith("demo")]
EXACT = [*sorted(EXAMPLES.glob("configs/paper/*.yaml")), *sorted(EXAMPLES.glob("configs/released/*.yaml"))]
"""The paper's systems to the letter, and the authors' code's, each on top of a preset."""
DS_CONFIGS = sorted(EXAMPLES.glob("ds_configs/*.json"))


class Size(NamedTuple):
    """A column of the paper's table of models, or of LLaMA's."""

    width: int
    ffn: int
    layers: int
    heads: int
    tied: bool
    parameters: int
    batch: int
    lr: float
    steps: int
    warmup: float


class System(NamedTuple):
    """What a preset's name says of its solver."""

    solver: dict[str, int | str]
    evaluations: int
    """Of F, a layer."""
    weighs: bool
    """Whether increments have learned weights, whose gradient needs them."""


SIZES = {
    "55m": Size(512, 1408, 12, 4, True, 54_931_968, 128, 4e-4, 5_000, 0.05),
    "340m": Size(1024, 2816, 24, 8, True, 341_099_520, 256, 3e-4, 30_000, 0.05),
    "740m": Size(1536, 4224, 24, 8, True, 742_860_288, 512, 3e-4, 30_000, 0.01),
    "1.3b": Size(2048, 5432, 24, 16, False, 1_334_806_528, 256, 3e-4, 30_000, 0.05),
    "3b": Size(3072, 8192, 28, 24, False, 3_367_676_928, 512, 3e-4, 30_000, 0.01),
    "7b": Size(4096, 11008, 32, 32, False, 6_738_415_616, 1024, 3e-4, 30_000, 0.01),
    "13b": Size(5120, 13824, 40, 40, False, 13_015_864_320, 1024, 3e-4, 30_000, 0.01),
}
SYSTEMS = {
    "transformer-pp": System({"kind": "euler"}, 1, False),
    "dlcl": System({"kind": "dlcl"}, 1, True),
    "weight-sharing": System({"kind": "weight-sharing", "repeats": 4}, 4, False),
    "rk2": System({"kind": "rk2", "stage_coefficients": "learned"}, 2, True),
    "rk4": System({"kind": "rk4", "stage_coefficients": "learned"}, 4, True),
    "pcformer": System({"kind": "pcformer", "predictor_order": 2}, 3, True),
    "iiet": System({"kind": "iiet", "variant": "paper", "iterations": 3}, 4, True),
}
TABLE_3 = {
    "transformer-pp-340m": "0.38", "pcformer-340m": "1.06", "iiet-340m": "1.40",
    "transformer-pp-740m": "0.80", "pcformer-740m": "2.30", "iiet-740m": "3.05",
}  # fmt: skip
"""TFLOPs of a forward pass of 512 tokens that the paper prints."""


def stem(path: Path) -> str:
    return path.stem


def parts(preset: Path) -> tuple[System, Size]:
    system, _, size = preset.stem.rpartition("-")
    return SYSTEMS[system], SIZES[size]


@cache
def config_of(preset: Path) -> RunConfig:
    return config_from_file(preset)


def layouts(preset: Path) -> dict[int, tuple[RunConfig, Path]]:
    """Configuration and DeepSpeed file for each number of GPUs that a preset's comments name."""
    found = {}
    for gpus, flags, ds in re.findall(r"^# (\d+) GPUs: (.*) \((.*)\)$", preset.read_text(), re.MULTILINE):
        words = [] if flags == "as it is" else flags.split()
        found[int(gpus)] = (config_from_file(preset, words), EXAMPLES / ds)
    return found


def activation_bytes(system: System, width: int, ffn: int) -> int:
    """What the presets' estimate says that a layer keeps of a token for the backward pass, in bf16."""
    history = 2 * width if system.solver["kind"] in ("dlcl", "iiet") else 0  # the normalised increment
    return system.evaluations * ((30 if system.weighs else 28) * width + 6 * ffn) + history


def memory(system: System, size: Size, config: RunConfig, world_size: int) -> list[float]:
    """The presets' estimate of a GPU's memory in bytes (state, buffer, activations), under ZeRO-1 in bf16
    without recomputation."""
    parallel = config.parallel
    parameters = size.parameters / (parallel.tensor * parallel.pipeline)
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    token = size.layers * activation_bytes(system, size.width, size.ffn) + 4 * 32000
    tokens = config.training.micro_batch_size * 2048 / parallel.tensor
    return [parameters * (2 + 2 + 4 + 12 / replicas), 4 * min(parameters, 5e8), tokens * token]


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_example_is_valid(path: Path) -> None:
    config = config_of(path)
    assert config.output_dir == f"runs/{path.stem}"
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


def test_presets_are_the_systems_at_the_sizes() -> None:
    compared = {f"{system}-{size}" for system in SYSTEMS for size in ("55m", "340m", "740m")}
    larger = {
        f"{system}-{size}" for system in ("transformer-pp", "iiet") for size in ("1.3b", "3b", "7b", "13b")
    }
    assert {preset.stem for preset in PRESETS} == compared | larger
    bases = {path.stem for path in EXAMPLES.glob("configs/sizes/*.yaml")}
    assert bases == {*SIZES, "common"}


@pytest.mark.parametrize("preset", PRESETS, ids=stem)
def test_layouts_of_a_preset(preset: Path) -> None:
    text, found = preset.read_text(), layouts(preset)
    assert sorted(found) == [8, 64]
    said = re.search(r"about (\d+) of 80 GB on each of 8 GPUs, (\d+) on each of 64", text)
    assert said is not None
    for (gpus, (config, ds_path)), gigabytes in zip(sorted(found.items()), said.groups(), strict=True):
        ds_json = load_ds_config(ds_path)
        data_parallel_size = check_combination(config, ds_json, gpus, ds_path.name)
        assert reconcile(ds_json, config, data_parallel_size)["zero_optimization"]["stage"] == 1
        assert config.parallel.tensor <= 8  # within one host
        assert int(gigabytes) == round(sum(memory(*parts(preset), config, gpus)) / 1e9) < 70
    terms = re.findall(r"^#   (?:state|buffer|activations) .*? = ([\d.]+)", text, re.MULTILINE)
    if terms:
        assert terms == [f"{term / 1e9:.1f}" for term in memory(*parts(preset), found[8][0], 8)]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=list(SYSTEMS))
def test_the_estimate_of_activations_is_what_autograd_keeps(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on a small model, as the difference of two depths. On CPU norms keep a little more."""
    monkeypatch.setattr(products, "_SLOW_IN_BF16", False)  # no CPU's detour through fp32
    kept = {layers: saved_bytes(layers, system.solver) for layers in (5, 8)}
    per_layer = (kept[8] - kept[5]) / 3
    assert 0.9 < per_layer / activation_bytes(system, 64, 176) < 1.12


def saved_bytes(layers: int, solver: dict[str, int | str]) -> float:
    """Bytes a token that a forward pass in bf16 leaves for the backward pass."""
    shape = {"hidden_size": 64, "ffn_hidden_size": 176, "num_attention_heads": 2, "vocab_size": 256}
    config = config_from_dict({"model": {**shape, "num_layers": layers}, "solver": solver})
    model = Transformer(config)
    model.initialise(0)
    for parameter in model.parameters():
        if not getattr(parameter, "keep_fp32", False):
            parameter.data = parameter.data.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}  # holds the tensors, so that no storage comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(256, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    assert loss.isfinite()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens.numel()


@pytest.mark.parametrize("preset", PRESETS, ids=stem)
def test_model_of_a_preset(preset: Path) -> None:
    (system, size), config = parts(preset), config_of(preset)
    solver = config_to_dict(config)["solver"]
    assert solver.get("history_norm", "rms") == "rms"
    assert {key: solver[key] for key in system.solver} == system.solver
    layer = 4 * size.width**2 + 3 * size.width * size.ffn  # weights
    tables = 32000 * size.width * (1 if size.tied else 2)
    norms = (2 * size.layers + 1) * size.width
    assert size.layers * layer + tables + norms == size.parameters
    model = Transformer.on_meta(config)
    assert model.num_parameters() - model.num_solver_parameters() == size.parameters
    triangle = size.layers * (size.layers + 1) // 2
    coefficients = {"transformer-pp": 0, "weight-sharing": 0, "dlcl": triangle, "iiet": triangle}
    few = range(1, 6 * size.layers)
    name = preset.stem.rpartition("-")[0]
    assert model.num_solver_parameters() in (few if name not in coefficients else [coefficients[name]])
    for length in (512, 2048):
        flops = system.evaluations * size.layers * (2 * layer + 4 * size.width * length) * length
        flops += 2 * size.width * 32000 * length
        assert model.forward_flops(length) == flops
    printed = TABLE_3.get(preset.stem)
    assert printed in (None, f"{model.forward_flops(512) / 1e12:.2f}")


def test_the_large_baseline_has_the_flops_of_the_small_iiet() -> None:
    iiet, baseline = (
        Transformer.on_meta(config_of(EXAMPLES / f"configs/{name}.yaml")).forward_flops(512)
        for name in ("iiet-340m", "transformer-pp-1.3b")
    )
    assert baseline == pytest.approx(iiet, rel=0.04)


@pytest.mark.parametrize("preset", PRESETS, ids=stem)
def test_hyperparameters_of_a_preset(preset: Path) -> None:
    (_, size), config = parts(preset), config_of(preset)
    model, optimizer, training = config.model, config.optimizer, config.training
    assert (model.hidden_size, model.ffn_hidden_size, model.num_layers) == (size.width, size.ffn, size.layers)
    assert (model.num_attention_heads, model.num_kv_heads) == (size.heads, size.heads)
    assert (model.tie_embeddings, model.vocab_size, model.embedding_scale) == (size.tied, 32000, "unit")
    assert (model.rms_norm_eps, model.init_std, model.rotary_base) == (1e-6, 0.02, 10000)
    assert (optimizer.lr, optimizer.warmup_fraction, optimizer.schedule) == (size.lr, size.warmup, "cosine")
    assert (optimizer.weight_decay, optimizer.gradient_clipping) == (0.01, 1.0)
    assert (training.steps, training.global_batch_size, training.precision) == (
        size.steps,
        size.batch,
        "bf16",
    )
    assert config.data.sequence_length == 2048


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("configs/distillation/*.yaml")), ids=lambda path: path.stem
)
def test_distillation_is_a_third_of_pretraining(path: Path) -> None:
    """The model that its name says, a third of its steps, and the paper's learning rate."""
    kind, size = path.stem.rsplit("-", 1)
    of = {"distil-pcformer": "transformer-pp"}.get(kind, "iiet")
    config, full = config_from_file(path), config_from_file(EXAMPLES / f"configs/{of}-{size}.yaml")
    changed = {"iterations": 0} if kind == "lower-bound" else {}
    assert (config.model, config.solver) == (full.model, replace(full.solver, **changed))
    assert config.training.steps == round(full.training.steps / 3)
    assert (config.optimizer.lr, config.optimizer.warmup_fraction) == (2e-4, full.optimizer.warmup_fraction)
    assert config.output_dir == f"runs/{path.stem}"


def test_every_system_has_a_folder_of_its_own() -> None:
    """A run goes on from the checkpoints of its folder, whoever made them."""
    paths = [*CONFIGS, *sorted(EXAMPLES.glob("configs/distillation/*.yaml"))]
    folders = [config_from_file(path).output_dir for path in [*paths, *EXACT]]
    assert len(paths) > 30
    assert folders == [
        *(f"runs/{path.stem}" for path in paths),
        *(f"runs/{path.parent.name}/{path.stem}" for path in EXACT),
    ]


def test_exact_presets_are_the_papers_systems_and_the_released_code() -> None:
    sizes = ("55m", "340m", "740m")
    printed = {f"{system}-{size}" for system in SYSTEMS if system != "rk4" for size in sizes}
    found = {f"{path.parent.name}/{path.stem}" for path in EXACT}
    paper = {f"paper/{name}" for name in printed | {"transformer-pp-1.3b"}}
    assert found == paper | {f"released/iiet-{size}" for size in sizes}


@pytest.mark.parametrize("path", EXACT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_exact_preset_is_ours_but_for_what_the_paper_says(path: Path) -> None:
    """LLaMA's embedding and raw increments, or the released variant, and nothing else."""
    (system, size), exact, ours = parts(path), config_from_file(path), config_of(path.parents[1] / path.name)
    assert (exact.model.embedding_scale, ours.model.embedding_scale) == (1, "unit")
    assert replace(exact.model, embedding_scale="unit") == ours.model
    assert (exact.optimizer, exact.data) == (ours.optimizer, ours.data)
    assert exact.training == ours.training
    solver, released = config_to_dict(exact)["solver"], path.parent.name == "released"
    expected = {"variant": "released", "coefficient_init": "average"} if released else {}
    if not released and system.solver["kind"] in ("dlcl", "iiet"):
        expected = {"history_norm": "none", "coefficient_init": "identity"}
    assert {key: solver[key] for key in {**system.solver, **expected}} == {**system.solver, **expected}
    assert released or "history_norm" not in solver or solver["history_norm"] == "none"
    model = Transformer.on_meta(exact)
    assert model.num_parameters() - model.num_solver_parameters() == size.parameters
    if released:
        extra = 2 * (size.layers + 1) ** 2 + 4 * size.layers * size.width
        assert model.num_solver_parameters() == extra


@pytest.mark.parametrize("path", PRESETS, ids=stem)
def test_our_presets_say_where_they_are_not_the_papers(path: Path) -> None:
    text, (system, _) = path.read_text(), parts(path)
    assert ("# Not the paper's: history_norm" in text) == (system.solver["kind"] in ("dlcl", "iiet"))
    exact = path.parent / "paper" / path.name
    assert (f"To the letter: paper/{path.name}" in text) == exact.exists()


def test_lines_that_the_paper_does_not_print_are_marked() -> None:
    common, shape = ((EXAMPLES / f"configs/sizes/{name}.yaml").read_text() for name in ("common", "1.3b"))
    for key in ("min_lr_ratio", "beta1", "beta2", "eps", "split"):
        assert re.search(rf"^  {key}: .*# a choice$", common, re.MULTILINE), key
    for key in ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads"):
        assert re.search(rf"^  {key}: .*# a choice$", shape, re.MULTILINE), key
    for key in ("weight_decay", "gradient_clipping", "vocab_size", "sequence_length"):  # Table of settings
        assert re.search(rf"^  {key}: \S+$", common, re.MULTILINE), key
