"""Cross-field checks: one golden message each, and what must stay allowed."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from megatron_iiet.config import (
    ConfigError,
    RunConfig,
    gradient_accumulation_steps,
    iterations_per_layer,
    validate,
)
from megatron_iiet.config.solvers import SOLVERS, Merging


def config_with(**changes: Any) -> RunConfig:
    """The default configuration with ``section__key`` set to a value; the solver's names choose one."""
    config = RunConfig()
    kind, variant = changes.pop("solver__kind", "iiet"), changes.pop("solver__variant", None)
    config.solver = SOLVERS.find(kind, variant)()  # type: ignore[misc]
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config


def message_of(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config_with(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


RANGE_ERRORS = [
    ("model__hidden_size", 0, "model.hidden_size is 0, but must be greater than 0"),
    ("model__ffn_hidden_size", -1, "model.ffn_hidden_size is -1, but must be greater than 0"),
    ("model__num_layers", 0, "model.num_layers is 0, but must be greater than 0"),
    ("model__num_attention_heads", 0, "model.num_attention_heads is 0, but must be greater than 0"),
    ("model__num_key_value_heads", 0, "model.num_key_value_heads is 0, but must be greater than 0"),
    ("model__vocab_size", 0, "model.vocab_size is 0, but must be greater than 0"),
    ("solver__damping", 0.0, "solver.damping is 0.0, but must be greater than 0"),
    ("solver__damping", 1.5, "solver.damping is 1.5, but must lie between 0 and 1"),
    ("model__embedding_scale", 0.0, "model.embedding_scale is 0.0, but must be greater than 0"),
    ("model__init_std", 0.0, "model.init_std is 0.0, but must be greater than 0"),
    ("model__rms_norm_eps", 0.0, "model.rms_norm_eps is 0.0, but must be greater than 0"),
    ("model__rotary_base", 0.0, "model.rotary_base is 0.0, but must be greater than 0"),
    ("data__sequence_length", 0, "data.sequence_length is 0, but must be greater than 0"),
    ("data__num_workers", -1, "data.num_workers is -1, but must be 0 or greater"),
    ("data__timeout", 0.0, "data.timeout is 0.0, but must be greater than 0"),
    ("optimizer__lr", 0.0, "optimizer.lr is 0.0, but must be greater than 0"),
    ("optimizer__lr", float("nan"), "optimizer.lr is nan, but must be a finite number"),
    ("optimizer__eps", float("inf"), "optimizer.eps is inf, but must be a finite number"),
    ("optimizer__min_lr_ratio", 1.5, "optimizer.min_lr_ratio is 1.5, but must lie between 0 and 1"),
    (
        "optimizer__warmup_fraction",
        1.0,
        "optimizer.warmup_fraction is 1.0, but must be at least 0 and less than 1",
    ),
    ("optimizer__beta1", 1.0, "optimizer.beta1 is 1.0, but must be at least 0 and less than 1"),
    ("optimizer__beta2", -0.1, "optimizer.beta2 is -0.1, but must be at least 0 and less than 1"),
    ("optimizer__weight_decay", -0.1, "optimizer.weight_decay is -0.1, but must be 0 or greater"),
    ("optimizer__gradient_clipping", -1.0, "optimizer.gradient_clipping is -1.0, but must be 0 or greater"),
    ("training__steps", 0, "training.steps is 0, but must be greater than 0"),
    ("training__global_batch_size", 0, "training.global_batch_size is 0, but must be greater than 0"),
    ("training__micro_batch_size", 0, "training.micro_batch_size is 0, but must be greater than 0"),
    ("training__stop_after", 0, "training.stop_after is 0, but must be greater than 0"),
    ("training__seed", -1, "training.seed is -1, but must be 0 or greater"),
    *(
        (
            "training__max_wall_time",
            text,
            f"training.max_wall_time is '{text}', but must be seconds or H:MM:SS, more than 0",
        )
        for text in ("", "0:00:00", "1:60:00", "90:00", "-1:00:00", "1h", "3600")
    ),
    *(
        ("parallel__timeouts", value, message)
        for value, message in (
            ({"stop": 5}, "parallel.timeouts has the key 'stop', but its keys are start, step, save"),
            ({"step": 0}, "parallel.timeouts.step is 0, but must be seconds, more than 0"),
            ({"save": -1.5}, "parallel.timeouts.save is -1.5, but must be seconds, more than 0"),
            ({"start": float("inf")}, "parallel.timeouts.start is inf, but must be seconds, more than 0"),
            ({"step": True}, "parallel.timeouts.step is True, but must be seconds, more than 0"),
        )
    ),
    ("evaluation__interval", -1, "evaluation.interval is -1, but must be 0 or greater"),
    ("evaluation__samples", 0, "evaluation.samples is 0, but must be greater than 0"),
    ("checkpoint__interval", -1, "checkpoint.interval is -1, but must be 0 or greater"),
    ("checkpoint__keep", -1, "checkpoint.keep is -1, but must be 0 or greater"),
    ("logging__interval", 0, "logging.interval is 0, but must be greater than 0"),
    ("logging__solver_interval", -1, "logging.solver_interval is -1, but must be 0 or greater"),
    ("logging__peak_tflops", 0.0, "logging.peak_tflops is 0.0, but must be greater than 0"),
    ("output_dir", "", "output_dir is empty; name the folder for checkpoints and logs"),
]


@pytest.mark.parametrize(("name", "value", "message"), RANGE_ERRORS)
def test_ranges(name: str, value: Any, message: str) -> None:
    assert message_of(**{name: value}) == message


POSITIVE_KEYS = """
    model: hidden_size ffn_hidden_size num_layers num_attention_heads num_key_value_heads head_dim vocab_size
        vocab_multiple max_position_embeddings embedding_scale rms_norm_eps rotary_base init_std
    solver: damping
    parallel: tensor pipeline
    data: sequence_length timeout
    optimizer: lr eps
    training: steps global_batch_size micro_batch_size stop_after max_wall_time
    evaluation: samples tasks_limit
    logging: interval peak_tflops
    guards: deviations max_skips
    guidance: samples
    distillation: temperature
"""
NOT_NEGATIVE_KEYS = """
    data: num_workers
    optimizer: weight_decay gradient_clipping
    training: seed
    evaluation: interval tasks_interval
    checkpoint: interval keep keep_every
    logging: solver_interval
    guards: replicas
    guidance: interval inertia
    distillation: alpha beta
"""
BELOW_ONE_KEYS = """
    optimizer: warmup_fraction decay_fraction beta1 beta2
    guidance: budget start decay
"""
EDGES = [
    (POSITIVE_KEYS, "be greater than 0", [-1, 0], [1]),
    (NOT_NEGATIVE_KEYS, "be 0 or greater", [-1], [0, 1]),
    (BELOW_ONE_KEYS, "be at least 0 and less than 1", [-1e-9, 1.0, 2.0], [0.0, 0.999]),
    ("guards: window", "be at least 2", [-1, 1], [2]),
    ("optimizer: min_lr_ratio", "lie between 0 and 1", [-1e-9, 1.001], [0.0, 1.0]),
    ("solver: damping", "lie between 0 and 1", [1.001], [1.0]),
]


def complaint_of(**changes: Any) -> str:
    try:
        validate(config_with(**changes))
    except ConfigError as error:
        return str(error)
    return ""


def names_in(listed: str) -> list[str]:
    found, section = [], ""
    for word in listed.split():
        section = word[:-1] if word.endswith(":") else section
        found += [] if word.endswith(":") else [f"{section}.{word}"]
    return found


@pytest.mark.parametrize(("listed", "must", "outside", "inside"), EDGES, ids=[edge[1] for edge in EDGES])
def test_edges_of_ranges(listed: str, must: str, outside: list[float], inside: list[float]) -> None:
    """An allowed number may not fit other keys, which is another message."""
    for name in names_in(listed):
        key = name.replace(".", "__")
        for value in outside:
            assert message_of(**{key: value}) == f"{name} is {value}, but must {must}"
        for value in inside:
            assert f"{name} is {value}, but must {must}" != complaint_of(**{key: value})


def test_every_number_has_edges() -> None:
    listed = {name for edge in EDGES for name in names_in(edge[0])}
    config = RunConfig()
    numbers = set()
    for section in fields(config):
        values = getattr(config, section.name)
        for leaf in fields(values) if is_dataclass(values) else ():
            if {"int", "float"} & set(str(leaf.type).split(" | ")):
                numbers.add(f"{section.name}.{leaf.name}")
    assert listed == numbers - {"solver.iterations"}  # it may be a list, and is checked with the layers


YARN: dict[str, Any] = {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
LLAMA3: dict[str, Any] = {
    "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
COMBINATION_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"model__num_attention_heads": 3},
        "model.hidden_size is 512, but must be a multiple of model.num_attention_heads = 3; change one of them",
    ),
    (
        {"model__hidden_size": 12},
        "model.hidden_size / model.num_attention_heads is 12 / 4 = 3, but rotary embeddings need an even head "
        "width; change one of them, or set model.head_dim",
    ),
    (
        {"model__head_dim": 5},
        "model.head_dim is 5, but rotary embeddings need an even head width; change it",
    ),
    (
        {"model__rope_scaling": {"kind": "dynamic", "factor": 2.0}},
        "model.rope_scaling.kind is 'dynamic'; supported are 'linear', 'llama3', 'yarn'",
    ),
    (
        {"model__rope_scaling": {"factor": 2.0}},
        "model.rope_scaling.kind is missing; supported are 'linear', 'llama3', 'yarn'",
    ),
    (
        {"model__rope_scaling": {"kind": "linear"}},
        "model.rope_scaling has no 'factor', which kind linear needs; give it",
    ),
    (
        {"model__rope_scaling": {"kind": "linear", "factor": 2.0, "beta_fast": 32.0}},
        "model.rope_scaling has the key 'beta_fast', which kind linear does not have; its keys are factor",
    ),
    (
        {"model__rope_scaling": {"kind": "none", "factor": 2.0}},
        "model.rope_scaling.kind is 'none'; supported are 'linear', 'llama3', 'yarn'",
    ),
    (
        {"model__rope_scaling": {"kind": "linear", "factor": 0.0}},
        "model.rope_scaling.factor is 0.0, but must be a number greater than 0",
    ),
    (
        {"model__rope_scaling": {"kind": "linear", "factor": True}},
        "model.rope_scaling.factor is True, but must be a number greater than 0",
    ),
    (
        {"model__rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}},
        "model.rope_scaling.original_max_position_embeddings is 0.5, but must be a whole number greater than 0",
    ),
    (
        {"model__rope_scaling": {**YARN, "truncate": 1.0}},
        "model.rope_scaling.truncate is 1.0, but must be true or false",
    ),
    (
        {"model__rope_scaling": {**YARN, "beta_slow": 32.0}},
        "model.rope_scaling.beta_slow is 32, but must be less than beta_fast = 32",
    ),
    (
        {"model__rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        "model.rope_scaling.low_freq_factor is 4, but must be less than high_freq_factor = 4",
    ),
    (
        {"model__num_key_value_heads": 3},
        "model.num_key_value_heads is 3, but must divide model.num_attention_heads = 4; change one of them, or "
        "write null for as many as query heads",
    ),
    (
        {"data__sequence_length": 4096},
        "data.sequence_length is 4096, but must not exceed model.max_position_embeddings = 2048; lower the first "
        "or raise the second",
    ),
    (
        {"data__split": [0.9, 0.1]},
        "data.split is [0.9, 0.1], but must have three shares (train, validation, test), e.g. [0.98, 0.02, 0.0]",
    ),
    (
        {"data__split": [1.1, -0.1, 0.0]},
        "data.split is [1.1, -0.1, 0.0], but its shares must lie between 0 and 1, the first (train) above 0",
    ),
    (
        {"data__split": [0.0, 0.5, 0.5]},
        "data.split is [0.0, 0.5, 0.5], but its shares must lie between 0 and 1, the first (train) above 0",
    ),
    (
        {"data__split": [0.9, 0.05, 0.01]},
        "data.split is [0.9, 0.05, 0.01], which sums to 0.96; the shares must sum to 1",
    ),
    (
        {"data__skip_steps": [3, [5, 6, 7]]},
        "data.skip_steps has [5, 6, 7], but must have steps or pairs [first, last] of the steps 1 to training.steps = 1000",
    ),
    (
        {"data__skip_steps": [[5, 4]]},
        "data.skip_steps has [5, 4], but must have steps or pairs [first, last] of the steps 1 to training.steps = 1000",
    ),
    (
        {"data__skip_steps": [[1, 1000], 0]},
        "data.skip_steps has 0, but must have steps or pairs [first, last] of the steps 1 to training.steps = 1000",
    ),
    (
        {"data__skip_steps": [1001]},
        "data.skip_steps has 1001, but must have steps or pairs [first, last] of the steps 1 to training.steps = 1000",
    ),
    *(
        (
            {"logging__profile": pair},
            f"logging.profile is {pair}, but must be [first, last] of the steps 1 to training.steps = 1000",
        )
        for pair in ([3], [0, 4], [5, 4], [1000, 1001])
    ),
    (
        {"data__blend": {"a": 0.5, "b": 1.0}, "data__prefix": "c"},
        "data.prefix is c, but data.blend names corpora too; keep one of them (--data.prefix= unsets the first)",
    ),
    (
        {"data__blend": {"a": 0.5, "": 1.0}},
        "data.blend gives '' a weight, which is no path; write the prefix of a corpus, in quotes if it is a number",
    ),
    (
        {"data__blend": {"a": 0.5, 7: 1.0}},
        "data.blend gives 7 a weight, which is no path; write the prefix of a corpus, in quotes if it is a number",
    ),
    (
        {"data__blend": {"a": 0.5, "b": 0.0}},
        "data.blend gives b the weight 0.0, but weights must be finite and greater than 0; leave out what should "
        "not be read",
    ),
    (
        {"data__blend": {"a": float("nan")}},
        "data.blend gives a the weight nan, but weights must be finite and greater than 0; leave out what should "
        "not be read",
    ),
    (
        {"data__blend": {"a": float("inf")}},
        "data.blend gives a the weight inf, but weights must be finite and greater than 0; leave out what should "
        "not be read",
    ),
    (
        {"data__blend": {"data/a": 0.5, "./data//a": 1.0}},
        "data.blend names one corpus twice, as data/a and as ./data//a; add up their weights",
    ),
    (
        {"data__prefix": "data/a", "data__validation_prefix": "./data/a"},
        "data.validation_prefix is ./data/a, which is trained on; name another corpus, or give validation a share "
        "in data.split",
    ),
    (
        {"data__blend": {"a": 1.0, "b": 1.0}, "data__validation_prefix": "b"},
        "data.validation_prefix is b, which is trained on; name another corpus, or give validation a share in "
        "data.split",
    ),
    (
        {
            "optimizer__schedule": "wsd",
            "optimizer__warmup_fraction": 0.3,
            "optimizer__decay_fraction": 0.8,
        },
        "optimizer.decay_fraction is 0.8, which with optimizer.warmup_fraction 0.3 is more than all steps; lower "
        "one of them",
    ),
    (
        {"solver__iterations": [1, 2]},
        "solver.iterations lists 2 numbers, but model.num_layers is 12; give one number per layer, or a single "
        "number for all",
    ),
    (
        {"solver__iterations": -1},
        "solver.iterations is -1, but iteration counts must be 0 or greater",
    ),
    (
        {"solver__iterations": [0, -1], "model__num_layers": 2},
        "solver.iterations is [0, -1], but iteration counts must be 0 or greater",
    ),
    (
        {"solver__iterations": [], "model__num_layers": 2},
        "solver.iterations lists 0 numbers, but model.num_layers is 2; give one number per layer, or a single "
        "number for all",
    ),
    (
        {"solver__schedule": []},
        "solver.schedule is an empty list; write null for training in one stage",
    ),
    (
        {"solver__schedule": [(0.0, 0), (1.0, 3)]},
        "solver.schedule is [[0.0, 0], [1.0, 3]], but each stage must be [fraction above 0, iterations 0 or "
        "greater]",
    ),
    (
        {"solver__schedule": [(0.5, -1), (0.5, 3)]},
        "solver.schedule is [[0.5, -1], [0.5, 3]], but each stage must be [fraction above 0, iterations 0 or "
        "greater]",
    ),
    (
        {"solver__schedule": [(0.5, 0), (0.4, 3)]},
        "solver.schedule is [[0.5, 0], [0.4, 3]], whose fractions sum to 0.9; they must sum to 1",
    ),
    (
        {"solver__schedule": [(0.5, 0), (0.3, [1, 2]), (0.2, 3)]},
        "solver.schedule lists 2 iteration counts in stage 2, but model.num_layers is 12; give one number per "
        "layer, or a single number for all",
    ),
    (
        {"solver__schedule": [(0.5, [0, -1]), (0.5, 3)], "model__num_layers": 2},
        "solver.schedule is [[0.5, [0, -1]], [0.5, 3]], but each stage must be [fraction above 0, iterations 0 or "
        "greater]",
    ),
    (
        {"solver__schedule": [(0.5, 0), (0.5, [3, 2])], "model__num_layers": 2},
        "solver.schedule ends with [3, 2] iterations, but solver.iterations is 3; make them equal",
    ),
    (
        {
            "solver__schedule": [(0.5, 0), (0.5, 3)],
            "solver__iterations": [3, 2],
            "model__num_layers": 2,
        },
        "solver.schedule ends with 3 iterations, but solver.iterations is [3, 2]; make them equal",
    ),
    (
        {"solver__schedule": [(0.5, 0), (0.5, 2)]},
        "solver.schedule ends with 2 iterations, but solver.iterations is 3; make them equal",
    ),
    (
        {"training__global_batch_size": 12},
        "training.global_batch_size is 12, but must be a multiple of training.micro_batch_size = 8; set it to 8 "
        "or 16",
    ),
    (
        {"training__global_batch_size": 4},
        "training.global_batch_size is 4, but must be a multiple of training.micro_batch_size = 8; set it to 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), COMBINATION_ERRORS, ids=lambda value: str(value)[:40])
def test_combinations(changes: dict[str, Any], message: str) -> None:
    assert message_of(**changes) == message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solver__kind": "dlcl", "solver__coefficient_init": "identity"},
        {"solver__variant": "released", "solver__coefficient_init": "identity"},
        {"solver__schedule": [(0.75, 0), (0.25, 3)]},
        {"solver__schedule": [(1 / 3, 0), (1 / 3, 1), (1 / 3, 3)]},
        {"solver__schedule": [(0.5, [0] * 11 + [1]), (0.5, [3] * 12)]},
        {"solver__schedule": [(0.5, 0), (0.5, [2] * 12)], "solver__iterations": [2] * 12},
        {"solver__iterations": [0] * 11 + [4]},
        {"solver__iterations": 0},
        {"data__split": [1.0, 0.0, 0.0]},
        {"data__blend": {"data/a": 2.5, "data/b": 1e-3}, "data__validation_prefix": "data/c"},
        {"data__documents": "pack", "data__num_workers": 0},
        {"model__num_key_value_heads": 2},
        {"optimizer__gradient_clipping": 0.0},
        {
            "optimizer__schedule": "wsd",
            "optimizer__warmup_fraction": 0.25,
            "optimizer__decay_fraction": 0.75,
        },
        {"training__stop_after": 5000},
    ],
    ids=str,
)
def test_allowed(changes: dict[str, Any]) -> None:
    validate(config_with(**changes))


@pytest.mark.parametrize(
    ("ranks", "batch", "message"),
    [
        (3, 128, "8 x 3 = 24; set it to 120 or 144, or start 2 or 4 ranks"),
        (32, 128, "8 x 32 = 256; set it to 256, or start 16 ranks"),
        (2, 8, "8 x 2 = 16; set it to 16, or start 1 rank"),
    ],
)
def test_world_size(ranks: int, batch: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gradient_accumulation_steps(config_with(training__global_batch_size=batch), ranks)
    assert str(caught.value) == (
        f"training.global_batch_size is {batch}, but must be a multiple of training.micro_batch_size times the "
        f"data-parallel ranks, {message}"
    )


def test_gradient_accumulation_steps() -> None:
    assert gradient_accumulation_steps(RunConfig(), 1) == 16
    assert gradient_accumulation_steps(RunConfig(), 4) == 4


def test_resolved_values() -> None:
    config = config_with(model__num_layers=3)
    assert config.model.resolved_embedding_scale == pytest.approx(50.0)
    assert config_with(model__embedding_scale=1.0).model.resolved_embedding_scale == 1.0
    assert config.model.head_width == 128
    assert config_with(model__head_dim=32).model.head_width == 32
    assert config.model.num_kv_heads == 4
    assert config_with(model__num_key_value_heads=2).model.num_kv_heads == 2
    assert iterations_per_layer(config) == [3, 3, 3]
    assert iterations_per_layer(config_with(model__num_layers=2, solver__iterations=[0, 2])) == [0, 2]
    assert iterations_per_layer(config_with(model__num_layers=2, solver__kind="dlcl")) == [0, 0]


@pytest.mark.parametrize(
    ("kind", "variant", "init", "resolved"),
    [
        ("iiet", "paper", None, "identity"),
        ("iiet", "released", None, "average"),
        ("iiet", "released", "identity", "identity"),
        ("dlcl", None, None, "identity"),
        ("dlcl", None, "average", "average"),
        ("pcformer", None, None, "identity"),
    ],
)
def test_resolved_coefficient_init(kind: str, variant: str | None, init: str | None, resolved: str) -> None:
    changes = {"solver__kind": kind, "solver__variant": variant, "solver__coefficient_init": init}
    solver = config_with(**changes).solver
    assert isinstance(solver, Merging)
    assert solver.resolved_coefficient_init == resolved
