"""``model.from``: the section of another model, resolved to numbers; what contradicts it is refused."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, config_from_file, config_to_yaml, load_config
from megatron_iiet.config.help import format_help

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
EXPECTED: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "attention_bias": "none", "qk_norm": True, "vocab_size": 500, "vocab_multiple": 128,
    "max_position_embeddings": 4096, "tie_embeddings": True, "embedding_scale": 1.0, "rms_norm_eps": 1e-5,
    "rotary_base": 1e6, "init_std": 0.03,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qwen").mkdir()
    Path("qwen/config.json").write_text(json.dumps(QWEN3))


def message_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_section_is_the_source_s() -> None:
    by_flag = load_config(["--model.from", "qwen", "--training.steps", "7"]).config
    assert vars(by_flag.model) == EXPECTED
    assert by_flag.training.steps == 7
    Path("run.yaml").write_text("training: {steps: 7}\nmodel:\n  from: qwen\n")
    by_file = config_from_file("run.yaml")
    assert by_file == by_flag
    text = config_to_yaml(by_file)
    assert "from" not in text
    Path("qwen/config.json").unlink()  # nobody needs it any more
    Path("resolved.yaml").write_text(text)
    assert config_from_file("resolved.yaml") == by_flag


def test_one_of_our_own() -> None:
    Path("run").mkdir()
    source = load_config(
        ["--model.hidden_size", "64", "--model.init_std", "0.01", "--model.vocab_multiple", "64"]
    )
    Path("run/config.yaml").write_text(config_to_yaml(source.config))
    flags = ["--model.from", "run", "--model.init_std", "0.05"]
    model = load_config(flags).config.model
    assert (model.hidden_size, model.vocab_multiple, model.init_std) == (64, 64, 0.05)
    assert model.embedding_scale == 100.0, "the source's, whatever the initial weights"


def test_what_an_earlier_file_says_gives_way() -> None:
    Path("base.yaml").write_text("model: {hidden_size: 512, vocab_multiple: 16}\ntraining: {steps: 3}\n")
    Path("run.yaml").write_text("base: base.yaml\nmodel: {from: qwen}\n")
    for config in (
        config_from_file("run.yaml"),
        load_config(["--config", "base.yaml", "--model.from", "qwen"]).config,
    ):
        assert vars(config.model) == {**EXPECTED, "vocab_multiple": 16}
        assert config.training.steps == 3
    Path("last.yaml").write_text("base: run.yaml\nmodel: {from: null}\n")
    assert config_from_file("last.yaml").model.hidden_size == 512, "unset again"


def test_what_says_the_same_or_nothing_of_the_function_may_stand_beside_it() -> None:
    Path("run.yaml").write_text(
        "model:\n  max_position_embeddings: 2048\n  vocab_multiple: 4\n  num_key_value_heads: 2\n  from: qwen\n"
        "  embedding_scale: 1\n  rotary_base: 1000000\n  init_std: 0.1\n"
        "  rope_scaling: {kind: yarn, factor: 4, beta_fast: 32, original_max_position_embeddings: 1024}\n"
    )
    model = config_from_file("run.yaml", ["--model.hidden_size", "64", "--model.vocab_multiple", "8"]).model
    assert (model.max_position_embeddings, model.vocab_multiple, model.init_std) == (2048, 8, 0.1)
    assert model.resolved_rope_scaling is not None
    assert model.hidden_size == 64


SOURCE = "in qwen, which model.from names on the command line; leave one of them out"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.hidden_size", "128"], f"model.hidden_size is 128 on the command line, but 64 {SOURCE}"),
        (
            ["--model.num_key_value_heads", "null"],
            f"model.num_key_value_heads is None on the command line, but 2 {SOURCE}",
        ),
        (
            ["--model.embedding_scale", "unit"],
            f"model.embedding_scale is 'unit' on the command line, but 1.0 {SOURCE}",
        ),
        (["--model.qk_norm", "false"], f"model.qk_norm is False on the command line, but True {SOURCE}"),
        (["--model.head_dim", "null"], f"model.head_dim is None on the command line, but 32 {SOURCE}"),
    ],
)
def test_contradictions(flags: list[str], message: str) -> None:
    assert message_of("--model.from", "qwen", *flags) == message
    assert message_of(*flags, "--model.from=qwen") == message


def test_a_value_of_a_wrong_type() -> None:
    llama = {**QWEN3, "model_type": "llama", "architectures": None, "head_dim": None}
    Path("qwen/config.json").write_text(json.dumps(llama))
    message = message_of("--model.from", "qwen", "--model.num_attention_heads", "many")
    assert message == "model.num_attention_heads is 'many' on the command line, but must be an integer"
    message = message_of("--model.from", "qwen", "--model.num_attention_heads", "0")
    assert message == "model.num_attention_heads is 0, but must be greater than 0"


def test_a_contradiction_in_a_file() -> None:
    Path("run.yaml").write_text("model:\n  num_layers: 3\n  from: qwen\n")
    assert message_of("--config", "run.yaml") == (
        "model.num_layers is 3 in run.yaml (line 2), but 2 in qwen, which model.from names in run.yaml (line 3); "
        "leave one of them out"
    )


def test_a_folder_as_base() -> None:
    Path("runs").mkdir()
    Path("runs/run.yaml").write_text("training: {steps: 7}\nbase: ../qwen\n")
    config = load_config(["--config", "runs/run.yaml"]).config
    assert (vars(config.model), config.training.steps) == (EXPECTED, 7)
    Path("runs/run.yaml").write_text("model:\n  num_layers: 3\nbase: ../qwen\n")
    assert message_of("--config", "runs/run.yaml") == (
        "model.num_layers is 3 in runs/run.yaml (line 2), but 2 in runs/../qwen, which model.from names in runs/run.yaml "
        "(line 3), as base; leave one of them out"
    )
    Path("qwen/config.yaml").write_text("model: {num_layers: 3}\n")
    assert message_of("--config", "runs/run.yaml") == (
        "base is '../qwen' in runs/run.yaml (line 3), which is a folder; name its config.yaml, or write model: {from: "
        "runs/../qwen} for the model alone"
    )


def test_sources_that_are_none() -> None:
    Path("empty").mkdir()
    give = "give the folder of a model that tools/convert_checkpoint.py reads, or a run's"
    assert (
        message_of("--model.from", "gone")
        == f"model.from is gone on the command line: it is no folder; {give}"
    )
    assert message_of("--model.from", "empty") == (
        f"model.from is empty on the command line: it has no config.json or config.yaml; {give}"
    )
    Path("empty/config.json").write_text('{"model_type": "gemma"}')
    assert message_of("--model.from", "empty").startswith(
        "model.from is empty on the command line: empty/config.json: model_type is 'gemma'; supported is"
    )
    Path("run.yaml").write_text("model: {from: [qwen]}\n")
    assert message_of("--config", "run.yaml") == (
        "model.from is ['qwen'] in run.yaml (line 1), but must be the folder of a model"
    )
    assert message_of("--model.from", "") == (
        "model.from is '' on the command line, but must be the folder of a model"
    )
    assert (
        message_of("--model.from") == "--model.from has no value on the command line; write a value behind it"
    )


def test_it_is_in_the_help() -> None:
    assert "--model.from FOLDER" in format_help()
