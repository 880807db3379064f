"""Loading: precedence, every error message, help, and the round trip through YAML."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.config import (
    ArgumentParser,
    ConfigError,
    RunConfig,
    config_from_dict,
    config_from_file,
    config_to_dict,
    config_to_yaml,
    load_config,
    load_config_or_exit,
    optimizers,
    schema,
    solvers,
)
from megatron_iiet.config.errors import ConfigWarning
from megatron_iiet.config.help import format_help
from megatron_iiet.config.keys import describe_type, did_you_mean, key_types
from megatron_iiet.config.kinds import own_keys

YAML = """\
solver:
  kind: iiet
  iterations: [0, 1, 2]
model:
  num_layers: 3
optimizer:
  lr: 3e-4
training:
  recompute: off
"""


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small run.yaml in the working directory, so that messages name it briefly."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(YAML)
    return "run.yaml"


def message_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_without_arguments() -> None:
    loaded = load_config([])
    assert loaded.config == RunConfig()
    assert loaded.ds_config_path is None


DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": None, "head_dim": None, "attention_bias": "none", "qk_norm": False,
        "vocab_size": 32000, "vocab_multiple": 128,
        "max_position_embeddings": 2048, "tie_embeddings": True, "embedding_scale": "unit",
        "rms_norm_eps": 1e-6, "rotary_base": 10000.0, "rope_scaling": None, "init_std": 0.02,
    },
    "solver": {
        "kind": "iiet", "variant": "paper", "iterations": 3, "schedule": None, "merge": True,
        "predictor": "merged", "damping": 1.0, "key_values": "every", "coefficient_init": None,
        "history_norm": "rms",
    },
    "parallel": {"tensor": 1, "pipeline": 1, "sequence": False, "timeouts": {}},
    "data": {
        "prefix": "", "blend": {}, "validation_prefix": "", "tokenizer": "", "text_follows": "eod",
        "sequence_length": 2048,
        "documents": "ignore", "split": [0.98, 0.02, 0.0], "skip_steps": [],
        "num_workers": 1, "timeout": 300.0,
    },
    "optimizer": {
        "kind": "adamw", "implementation": "auto", "lr": 3e-4, "min_lr_ratio": 0.1, "warmup_fraction": 0.05, "schedule": "cosine",
        "decay_fraction": 0.1, "weight_decay": 0.01, "gradient_clipping": 1.0, "beta1": 0.9, "beta2": 0.95,
        "eps": 1e-8,
    },
    "training": {
        "steps": 1000, "global_batch_size": 128, "micro_batch_size": 8, "precision": "bf16", "fp8": "off",
        "recompute": "off", "compile": "off", "seed": 1234, "initial_weights": "", "stop_after": None,
        "stop_signals": ["USR1", "TERM"], "max_wall_time": None,
    },
    "evaluation": {
        "interval": 200, "samples": 256, "tasks": [], "tasks_interval": 1000, "tasks_limit": 100,
        "tasks_data_dir": "", "tasks_include_path": "",
    },
    "checkpoint": {"interval": 500, "keep": 2, "keep_every": 0, "mirror": "", "mode": "auto", "resume": True},
    "logging": {"interval": 10, "tensorboard": True, "solver_interval": 200, "peak_tflops": None, "profile": None},
    "guards": {
        "nonfinite": "stop",
        "spike": "off",
        "window": 100,
        "deviations": 6.0,
        "max_skips": 10,
        "replicas": 0,
    },
    "ops": {"backend": "auto", "history_gradient": "transposed"},
    "guidance": {"interval": 0, "budget": 0.5, "start": 0.1, "samples": 32, "decay": 0.5, "inertia": 0.5},
    "distillation": {"teacher": "", "alpha": 0.01, "beta": 1.0, "temperature": 1.0},
    "debug": {"inject": []},
}  # fmt: skip
OF_OTHER_SOLVERS: dict[str, dict[str, Any]] = {
    "kind euler": {"output_norm": "none"},
    "kind dlcl": {"coefficient_init": None, "history_norm": "rms"},
    "kind weight-sharing": {"key_values": "every", "repeats": 4},
    "kind rk2": {"key_values": "every", "stage_coefficients": "learned"},
    "kind rk4": {"key_values": "every", "stage_coefficients": "learned"},
    "kind pcformer": {"key_values": "every", "coefficient_init": None, "predictor_order": 2},
    "kind iiet, variant released": {
        "key_values": "every", "coefficient_init": None, "iterations": 3, "schedule": None,
        "readout": "separate",
    },
}  # fmt: skip


def test_defaults_are_those_that_runs_rely_on() -> None:
    """Whoever leaves a key out means its default, today and after an update."""
    assert asdict(RunConfig()) == {"output_dir": "runs/default", **DEFAULTS}
    found = {s().system: {name: getattr(s(), name) for name in own_keys(s)} for s in solvers.SOLVERS}
    del found["kind iiet, variant paper"]
    assert found == OF_OTHER_SOLVERS


def test_yaml_values_have_their_types(run_yaml: str) -> None:
    config = config_from_file(run_yaml)
    assert config.optimizer.lr == 3e-4
    assert config.solver.iterations == [0, 1, 2]
    assert config.training.recompute == "off"  # YAML 1.1 would read false
    assert config.model.hidden_size == RunConfig().model.hidden_size


@pytest.mark.parametrize("flags_first", [True, False])
def test_command_line_wins_in_any_order(run_yaml: str, flags_first: bool) -> None:
    flags, file = ["--optimizer.lr", "1e-3"], ["--config", run_yaml]
    loaded = load_config(flags + file if flags_first else file + flags)
    assert loaded.config.optimizer.lr == 1e-3
    assert loaded.config.model.num_layers == 3


def test_later_flag_wins() -> None:
    assert load_config(["--training.steps=5", "--training.steps", "6"]).config.training.steps == 6


def test_override_forms() -> None:
    words = [
        "--solver.schedule",
        "[[0.75,0],[0.25,3]]",
        "--model.tie_embeddings=false",
        "--data.prefix",
        "123",
    ]
    config = load_config([*words, "--training.stop_after", "10", "--model.embedding_scale", "1"]).config
    assert config.solver.schedule == [(0.75, 0), (0.25, 3)]
    assert config.model.tie_embeddings is False
    assert config.data.prefix == "123"
    assert config.training.stop_after == 10
    assert config.model.embedding_scale == 1.0
    assert load_config(["--solver.iterations", "4"]).config.solver.iterations == 4
    assert load_config(["--training.stop_after", "null"]).config.training.stop_after is None
    blend = load_config(["--data.blend", "{data/c4.v2: 2, data/wiki: 0.5}"]).config.data
    assert (blend.blend, blend.weights) == ({"data/c4.v2": 2.0, "data/wiki": 0.5},) * 2
    assert load_config(["--data.prefix", "x", "--data.tokenizer=--x"]).config.data.tokenizer == "--x"


def test_overrides_of_config_from_file(run_yaml: str) -> None:
    assert config_from_file(run_yaml, ["--training.steps", "20"]).training.steps == 20
    with pytest.raises(ConfigError, match="may only set keys"):
        config_from_file(run_yaml, ["--config", "other.yaml"])


@pytest.mark.parametrize("flag", ["--ds-config", "--ds_config", "--deepspeed_config"])
def test_launcher_arguments_are_accepted(flag: str) -> None:
    loaded = load_config(["--local_rank=1", "--local-rank", "1", "--deepspeed", flag, "ds.json"])
    assert loaded.ds_config_path == Path("ds.json")
    assert loaded.config == RunConfig()


def test_a_file_given_twice_under_one_name_is_one() -> None:
    loaded = load_config(
        ["--ds-config", "ds.json", "--deepspeed_config", "ds.json"]
    )  # as a launcher repeats it
    assert loaded.ds_config_path == Path("ds.json")


def test_empty_file_and_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert config_from_file(path) == RunConfig()
    path.write_text("model:\n  # hidden_size: 4\n")
    assert config_from_file(path) == RunConfig()


COMMAND_LINE_ERRORS = [
    (["--lr", "1"], "unknown key '--lr' on the command line; did you mean '--optimizer.lr'?"),
    (
        ["--model.hidden_sise=4"],
        "unknown key '--model.hidden_sise' on the command line; did you mean '--model.hidden_size'?",
    ),
    (
        ["--model.sequence_length", "4"],
        "unknown key '--model.sequence_length' on the command line; did you mean '--data.sequence_length'?",
    ),
    (
        ["--interval", "4"],
        "unknown key '--interval' on the command line; did you mean '--evaluation.interval', "
        "'--checkpoint.interval' or '--logging.interval'?",
    ),
    (["--xyzzy", "4"], "unknown key '--xyzzy' on the command line; --help lists all keys"),
    (["--confg", "a"], "unknown key '--confg' on the command line; did you mean '--config'?"),
    (["--training.steps"], "--training.steps has no value on the command line; write an integer behind it"),
    (
        ["--training.steps", "--training.seed"],
        "--training.steps has no value on the command line; write an integer behind it",
    ),
    (["--config"], "--config has no value on the command line; write a value behind it"),
    (
        ["--solver.iterations", "0", "1"],
        "unexpected word '1' on the command line: write --section.key VALUE, and a list as one word such as "
        '"[0,1,2]"',
    ),
    (
        ["--ds-config", "a", "--deepspeed_config", "b"],
        "--deepspeed_config names b on the command line, but a is given too; keep one",
    ),
    (
        ["--optimizer.velocity", "0.9", "--optimizer.kind", "lion"],
        "optimizer.kind is 'lion' on the command line, but must be 'adamw' or 'muon'",
    ),
    (
        ["--optimizer.velocity=0.9", "--optimizer.kind=lion"],
        "optimizer.kind is 'lion' on the command line, but must be 'adamw' or 'muon'",
    ),
    (
        ["--optimizer.velocity", "0.9", "--optimizer.kind", "adamw", "--solver.kind", "lion"],
        "unknown key '--optimizer.velocity' on the command line; did you mean '--optimizer.lr', "
        "'--optimizer.beta1' or '--optimizer.beta2'?",
    ),
    (["--optimizer.lr", "abc"], "optimizer.lr is 'abc' on the command line, but must be a number"),
    (["--training.steps", "1.5"], "training.steps is 1.5 on the command line, but must be an integer"),
    (["--training.steps", "true"], "training.steps is True on the command line, but must be an integer"),
    (["--training.steps", "null"], "training.steps is null on the command line, but must be an integer"),
    (
        ["--training.stop_after", "x"],
        "training.stop_after is 'x' on the command line, but must be an integer or null",
    ),
    (
        ["--model.tie_embeddings", "maybe"],
        "model.tie_embeddings is 'maybe' on the command line, but must be true or false",
    ),
    (
        ["--solver.kind", "iit"],
        "solver.kind is 'iit' on the command line, but must be 'euler', 'dlcl', 'weight-sharing', 'rk2', 'rk4', "
        "'pcformer' or 'iiet'; did you mean 'iiet'?",
    ),
    (
        ["--solver.coefficient_init", "avg"],
        "solver.coefficient_init is 'avg' on the command line, but must be 'identity', 'average' or null; "
        "did you mean 'average'?",
    ),
    (
        ["--model.embedding_scale", "units"],
        "model.embedding_scale is 'units' on the command line, but must be a number or 'unit'; did you mean 'unit'?",
    ),
    (
        ["--solver.iterations", "[1,2"],
        "solver.iterations is '[1,2' on the command line, but must be an integer or a list of integers",
    ),
    (
        ["--solver.schedule", "[[1,0.5]]"],
        "solver.schedule is [[1, 0.5]] on the command line, but must be a list of [number, integer or a "
        "list of integers] pairs or null",
    ),
    (["--data.split", "1"], "data.split is 1 on the command line, but must be a list of numbers"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINE_ERRORS, ids=lambda value: str(value)[:40])
def test_command_line_errors(arguments: list[str], message: str) -> None:
    assert message_of(*arguments) == message


FILE_ERRORS = [
    (
        "model:\n  hidden_sise: 4\n",
        "unknown key 'model.hidden_sise' in run.yaml (line 2); did you mean 'model.hidden_size'?",
    ),
    (
        "optimizer: {velocity: 0.9, kind: lion}\n",
        "optimizer.kind is 'lion' in run.yaml (line 1), but must be 'adamw' or 'muon'",
    ),
    ("lr: 1\n", "unknown key 'lr' in run.yaml (line 1); did you mean 'optimizer.lr'?"),
    ("\nmodle:\n  a: 1\n", "unknown key 'modle' in run.yaml (line 2); did you mean 'checkpoint.mode' or 'model'?"),
    (
        "solver:\n  optimizer.lr: 1\n",
        "unknown key 'solver.optimizer.lr' in run.yaml (line 2); did you mean 'optimizer.lr'?",
    ),
    ("optimizer.lr: 1\n", "unknown key 'optimizer.lr' in run.yaml (line 1); write keys inside their section, not with dots"),
    ("model: 4\n", "model is 4 in run.yaml (line 1), but is a section and must hold keys"),
    ("- 1\n", "run.yaml must hold sections with keys, but holds [1]"),
    ("model:\n  num_layers: 2\n  num_layers: 3\n", "cannot read run.yaml (line 3, column 3): the key 'num_layers' appears twice"),
    ("model:\n  num_layers: 2\nmodel:\n  vocab_size: 3\n", "cannot read run.yaml (line 3, column 1): the key 'model' appears twice"),
    ("a: [1\n", "cannot read run.yaml (line 2, column 1): expected ',' or ']', but got '<stream end>'"),
    ("training:\n  steps: 1e3\n", "training.steps is 1000.0 in run.yaml (line 2), but must be an integer"),
    ("data:\n  prefix: 12\n", "data.prefix is 12 in run.yaml (line 2), but must be a text"),
    ("data:\n  blend: a\n", "data.blend is 'a' in run.yaml (line 2), but must be a mapping of texts to numbers"),
    ("data:\n  blend:\n    a: much\n", "data.blend is {'a': 'much'} in run.yaml (line 2), but must be a mapping of texts to numbers"),
    ("data:\n  prefix:\n", "data.prefix is null in run.yaml (line 2), but must be a text"),
    (
        "optimizer:\n  schedule: cosin\n",
        "optimizer.schedule is 'cosin' in run.yaml (line 2), but must be 'cosine', 'linear', 'constant' or 'wsd'; did you mean 'cosine'?",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS, ids=lambda value: value[:30])
def test_file_errors(run_yaml: str, text: str, message: str) -> None:
    Path(run_yaml).write_text(text)
    assert message_of("--config", run_yaml) == message


def test_unreadable_files(run_yaml: str) -> None:
    missing = "cannot read the configuration file no.yaml: No such file or directory"
    assert message_of("--config", "no.yaml") == missing
    assert message_of("--config", ".") == "cannot read the configuration file .: Is a directory"
    Path(run_yaml).write_bytes(b"\xff\xfe\xfa")
    assert message_of("--config", run_yaml) == "cannot read the configuration file run.yaml: not a UTF-8 text"


def test_the_wrong_value_is_found_among_right_ones(run_yaml: str) -> None:
    message = message_of("--config", run_yaml, "--training.seed", "3", "--training.steps", "x")
    assert message == "training.steps is 'x' on the command line, but must be an integer"


def test_values_are_validated_after_loading() -> None:
    assert message_of("--optimizer.lr", "-1") == "optimizer.lr is -1.0, but must be greater than 0"
    with pytest.raises(ConfigError, match=r"^optimizer\.lr is -1\.0"):
        config_from_dict({"optimizer": {"lr": -1}})


def test_config_from_dict_names_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"model": {"hiden_size": 3}}, "checkpoint step_5")
    assert str(caught.value) == (
        "unknown key 'model.hiden_size' in checkpoint step_5; did you mean 'model.hidden_size'?"
    )


# --- help ---


def test_help_explains_every_field() -> None:
    text = "".join(format_help().split())  # argparse breaks lines anywhere, also at hyphens
    docstrings = field_docstrings()
    assert {"solver.kind", "solver.variant", "optimizer.kind", *docstrings} == set(key_types())
    for key, docstring in docstrings.items():
        assert f"--{key}" in text
        assert "".join(docstring.split()) in text, key
    assert "default:0.0003" in text
    assert "--ds-configFILE.json" in text
    assert "+ITERATIONS" not in text  # jsonargparse's append syntax is not offered


def field_docstrings() -> dict[str, str]:
    """Docstring of every leaf field, by dotted key, read from the sources of the declarations."""
    by_class: dict[str, dict[str, str]] = {}
    modules = (schema, solvers, optimizers)
    for node in [node for module in modules for node in ast.parse(inspect.getsource(module)).body]:
        if isinstance(node, ast.ClassDef):
            for field, following in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                    docstring = ast.literal_eval(following.value)
                    by_class.setdefault(node.name, {})[ast.unparse(field.target)] = docstring
    found = {}
    for kinds in schema.KINDS.values():
        for declared in kinds:
            of_base = [by_class.get(cls.__name__, {}) for cls in inspect.getmro(declared)]
            for name in own_keys(declared):
                found[f"{kinds.section}.{name}"] = next(leaves[name] for leaves in of_base if name in leaves)
    for name, docstring in by_class["RunConfig"].items():
        if name in schema.KINDS:
            continue
        leaves = by_class.get(type(getattr(RunConfig(), name)).__name__)
        found.update(
            {f"{name}.{leaf}": words for leaf, words in leaves.items()} if leaves else {name: docstring}
        )
    return found


def test_help_exits_with_zero_and_speaks_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            load_config(["--model.num_layers", "2", "--help"])
        assert stopped.value.code == 0
        assert bool(capsys.readouterr().out) is printed


@pytest.mark.parametrize(
    ("word", "candidates", "said"),
    [
        ("interval", [f"{s}.interval" for s in "abcd"], "'a.interval', 'b.interval' or 'c.interval'"),
        ("abcdefghij", ["abcdefwxyz"], "'abcdefwxyz'"),  # six of ten letters
        ("abcdefghij", ["abcdewxyzv"], ""),
        ("x.hidden", ["model.width", "model.hidden"], "'model.hidden'"),
        ("hidden", ["model.hidden", "hidden"], "'hidden' or 'model.hidden'"),  # the whole name goes before
        (20 * "a", [f"{n * 'a':b<20}" for n in (17, 18, 19)], f"'{19 * 'a'}b' or '{18 * 'a'}bb'"),
        ("lr", [], ""),
    ],
    ids=str,
)
def test_suggestions_are_the_nearest_few(word: str, candidates: list[str], said: str) -> None:
    """Up to three, all nearly as near as the nearest, which comes first."""
    assert did_you_mean(word, candidates) == (f"; did you mean {said}?" if said else "")


def test_type_descriptions() -> None:
    assert describe_type(list[list[int]]) == "a list of lists of integers"
    assert describe_type(tuple[float, int]) == "a pair [number, integer]"
    assert describe_type(dict[str, float]) == "a mapping of texts to numbers"
    assert describe_type(list[dict[str, int]]) == "a list of mappings of texts to integers"


# --- scripts ---


def test_load_or_exit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(SystemExit) as stopped:
        load_config_or_exit(["--lr", "1"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == ("error: unknown key '--lr' on the command line; did you mean '--optimizer.lr'?\n")
    assert not captured.out
    assert load_config_or_exit([]).config == RunConfig()


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"SLURM_PROCID": "2"}, False),
     ({"RANK": "0", "SLURM_PROCID": "2"}, True)],
)  # fmt: skip
def test_one_rank_speaks(
    environment: dict[str, str],
    speaks: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron_iiet.config.errors._PATIENCE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as stopped:
        load_config_or_exit(["--lr", "1"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") is speaks
    assert bool(re.match(r"error on rank [23]: ", said)) is not speaks  # nobody has ended it


def test_neither_torch_nor_deepspeed_is_imported() -> None:
    code = (
        "import sys, megatron_iiet.config as c, megatron_iiet.config.deepspeed; c.load_config([]);"
        "sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- round trip ---

number = st.floats(1e-12, 1e12)
whole = st.integers(1, 10**12)
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)
tricky = st.sampled_from(
    ["off", "yes", "null", "~", "1e5", "3", "010", "0x1f", "1:30", "true", "<<", "=", "a: b", "#"]
)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Valid configurations with hard-to-write values where validity leaves the choice."""
    base, layers = RunConfig(), draw(st.integers(1, 6))
    counts = draw(st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=layers, max_size=layers)))
    stages = [[(0.75, 0), (0.25, counts)], [(0.25, 1), (0.25, [3] * layers), (0.5, counts)]]
    schedule = draw(st.sampled_from([None, *stages]))
    blend = {
        os.path.normpath(k): v for k, v in draw(st.dictionaries(st.one_of(text, tricky), number)).items()
    }
    prefix = "" if blend else draw(st.one_of(text, tricky))
    return replace(
        base,
        output_dir=draw(st.one_of(text, tricky)),
        model=replace(
            base.model,
            num_layers=layers,
            embedding_scale=draw(st.one_of(number, st.just("unit"))),
            tie_embeddings=draw(st.booleans()),
            init_std=draw(number),
        ),
        solver=replace(base.solver, iterations=counts, schedule=schedule),
        data=replace(base.data, prefix=prefix, blend=blend, tokenizer=draw(tricky)),
        optimizer=replace(base.optimizer, lr=draw(number), eps=draw(number)),
        training=replace(base.training, steps=draw(whole), stop_after=draw(st.one_of(st.none(), whole))),
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(config=configs())
def test_round_trip_through_yaml(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / "run.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert config_from_file(path) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_written_yaml_is_readable() -> None:
    text = config_to_yaml(RunConfig())
    assert "optimizer:\n  kind: adamw\n  lr: 0.0003\n" in text
    assert "  split: [0.98, 0.02, 0.0]\n" in text
    assert "recompute: 'off'" in text  # quoted, so that YAML 1.1 readers agree


ACCEPT = "--checkpoint.accept_changes"


@pytest.mark.parametrize("word", ["solver.iterations,training.seed", "[solver.iterations, training.seed]"])
def test_changes_to_accept_are_of_the_start_and_not_of_the_run(word: str) -> None:
    loaded = load_config([ACCEPT, word])
    assert loaded.accept_changes == ("solver.iterations", "training.seed")
    assert loaded.config == load_config([]).config
    assert load_config([]).accept_changes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [ACCEPT, "solver.iteration"],
            "--checkpoint.accept_changes names 'solver.iteration' on the command line, which is no key; did you "
            "mean 'solver.iterations'?",
        ),
        ([ACCEPT, ""], "--checkpoint.accept_changes names '' on the command line, which is no key; --help"),
        ([ACCEPT], "--checkpoint.accept_changes has no value on the command line"),
        ([ACCEPT, "training.seed", ACCEPT, "solver.kind"], "names solver.kind .* training.seed is given too"),
    ],
)
def test_changes_to_accept_that_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(arguments)


def test_changes_are_not_accepted_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("checkpoint:\n  accept_changes: [solver.iterations]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file)])
    assert str(caught.value) == (
        f"checkpoint.accept_changes stands in {file} (line 2), but is meant for one start and must not become "
        "a habit; give it on the command line, --checkpoint.accept_changes KEY"
    )


def test_help_names_the_changes_to_accept() -> None:
    assert "--checkpoint.accept_changes KEY[,KEY...]" in format_help()


def test_a_tool_tells_what_is_to_be_known_without_its_source_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    ArgumentParser()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("config.json: nothing reads gate", ConfigWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: config.json: nothing reads gate\n"
