"""``base: FILE`` in a run configuration: whose value counts, where it is said to stand, what is refused."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_iiet.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_from_file,
    config_to_yaml,
    load_config,
)
from megatron_iiet.config.help import format_help


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**files: str) -> None:
    """``run="..."`` is run.yaml, ``sub_one="..."`` is sub/one.yaml."""
    for name, text in files.items():
        path = Path(name.replace("_", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def message_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_keys_of_the_file_win_and_flags_win_over_both() -> None:
    write(
        run="training:\n  steps: 3\nbase: sub/one.yaml\nmodel:\n",  # base counts first wherever it stands
        sub_one="base: two.yaml\ntraining: {steps: 4, seed: 5}\noptimizer: {lr: 1e-3}\n",
        sub_two="base: ../three.yaml\ntraining: {seed: 6, global_batch_size: 64}\nmodel: {num_layers: 2}\n",
        three="optimizer: {lr: 2e-3, eps: 1e-6}\noutput_dir: runs/three\n",
    )
    config = config_from_file("run.yaml")
    expected = RunConfig(output_dir="runs/three")
    expected.training.steps, expected.training.seed, expected.training.global_batch_size = 3, 5, 64
    expected.optimizer.lr, expected.optimizer.eps = 1e-3, 1e-6
    expected.model.num_layers = 2
    assert config == expected
    flags = ["--training.global_batch_size", "16", "--training.steps=7", "--config", "run.yaml"]
    flagged = load_config(flags).config.training
    assert (flagged.steps, flagged.seed, flagged.global_batch_size) == (7, 5, 16)


def test_lists_and_mappings_are_replaced() -> None:
    write(
        run="base: sub/one.yaml\nsolver: {iterations: [3]}\ndata: {blend: {c: 1}}\nmodel: {num_layers: 1}\n",
        sub_one="solver: {iterations: [1, 2]}\ndata: {blend: {a: 1, b: 2}, split: [0.5, 0.25, 0.25]}\n",
    )
    config = config_from_file("run.yaml")
    assert config.solver.iterations == [3]
    assert config.data.blend == {"c": 1.0}
    assert config.data.split == [0.5, 0.25, 0.25]


def test_null_and_empty_values_replace_too() -> None:
    write(
        run="base: sub/one.yaml\ntraining: {stop_after: null}\ndata: {prefix: '', blend: {a: 1}}\n",
        sub_one="training: {stop_after: 5}\ndata: {prefix: b}\n",
    )
    config = config_from_file("run.yaml")
    assert config.training.stop_after is None
    assert config.data.weights == {"a": 1.0}


def test_paths_other_than_the_base_are_left_alone() -> None:
    write(run="base: sub/one.yaml\n", sub_one="data: {prefix: data/x, tokenizer: ./t.model}\n")
    data = config_from_file("run.yaml").data
    assert (data.prefix, data.tokenizer) == ("data/x", "./t.model")


def test_a_base_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(sub_run="base: one.yaml\n", sub_one="training: {seed: 5}\n", run=f"base: {tmp_path}/sub/one.yaml\n")
    assert config_from_file("run.yaml").training.seed == 5
    monkeypatch.chdir("sub")
    assert config_from_file("run.yaml").training.seed == 5
    monkeypatch.chdir(os.sep)
    assert config_from_file(tmp_path / "sub/run.yaml").training.seed == 5


def test_the_written_configuration_holds_everything_and_no_base() -> None:
    write(run="base: sub/one.yaml\n", sub_one="training: {seed: 5}\n")
    config = config_from_file("run.yaml")
    text = config_to_yaml(config)
    assert not any(line.startswith("base") for line in text.splitlines())
    Path("sub/one.yaml").unlink()
    Path("resolved.yaml").write_text(text)
    assert config_from_file("resolved.yaml") == config


def test_one_base_of_two_files_is_no_circle() -> None:
    write(a="base: c.yaml\n", b="base: c.yaml\n", c="training: {seed: 5}\n", run="base: ./a.yaml\n")
    assert config_from_file("run.yaml").training.seed == config_from_file("b.yaml").training.seed == 5


@pytest.mark.parametrize(
    ("run", "base", "message"),
    [
        (
            "base: sub/one.yaml\n",
            "model:\n  hidden_sise: 4\n",
            "unknown key 'model.hidden_sise' in sub/one.yaml (line 2); did you mean 'model.hidden_size'?",
        ),
        (
            "base: sub/one.yaml\ntraining:\n  seed: 1\n",
            "\ntraining:\n  steps: x\n",
            "training.steps is 'x' in sub/one.yaml (line 3), but must be an integer",
        ),
        (
            "base: sub/one.yaml\ntraining:\n  steps: y\n",
            "training:\n  steps: 3\n",
            "training.steps is 'y' in run.yaml (line 3), but must be an integer",
        ),
        ("base: sub/one.yaml\n", "- 1\n", "sub/one.yaml must hold sections with keys, but holds [1]"),
        (
            "base: sub/one.yaml\n",
            "a: 1\na: 2\n",
            "cannot read sub/one.yaml (line 2, column 1): the key 'a' appears twice",
        ),
        (
            "output_dir: a\nbase: sub/no.yaml\n",
            "",
            "cannot read the configuration file sub/no.yaml, the base named in run.yaml (line 2): No such file or directory",
        ),
        (
            "base: sub/one.yaml\n",
            "\nbase: no.yaml\n",
            "cannot read the configuration file sub/no.yaml, the base named in sub/one.yaml (line 2): No such file or directory",
        ),
        (
            "base: sub\n",
            "",
            "cannot read the configuration file sub, the base named in run.yaml (line 1): Is a directory",
        ),
        (
            "base: run.yaml\n",
            "",
            "base is 'run.yaml' in run.yaml (line 1), which closes a circle, run.yaml -> run.yaml; remove one of them",
        ),
        (
            "base: sub/one.yaml\n",
            "\nbase: ../run.yaml\n",
            "base is '../run.yaml' in sub/one.yaml (line 2), which closes a circle, run.yaml -> sub/one.yaml -> sub/../run.yaml; remove one of them",
        ),
        (
            "base: sub/one.yaml\n",
            "base: ../sub/one.yaml\n",
            "base is '../sub/one.yaml' in sub/one.yaml (line 1), which closes a circle, sub/one.yaml -> sub/../sub/one.yaml; remove one of them",
        ),
        *(
            (
                f"\nbase: {value}\n",
                "",
                f"base is {shown} in run.yaml (line 2), but must be the path of a YAML file, or of a model's folder, relative to this file",
            )
            for value, shown in [
                ("3", "3"),
                ("", "null"),
                ("''", "''"),
                ("[a.yaml, b.yaml]", "['a.yaml', 'b.yaml']"),
                ("{a: 1}", "{'a': 1}"),
            ]
        ),
        (
            "base: sub/one.yaml\nbase: sub/one.yaml\n",
            "",
            "cannot read run.yaml (line 2, column 1): the key 'base' appears twice",
        ),
    ],
)
def test_errors_name_file_and_line(run: str, base: str, message: str) -> None:
    write(run=run, sub_one=base)
    assert message_of("--config", "run.yaml") == message


def test_no_utf8() -> None:
    write(run="base: bad.yaml\n")
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    assert message_of("--config", "run.yaml") == (
        "cannot read the configuration file bad.yaml, the base named in run.yaml (line 1): not a UTF-8 text"
    )


def test_a_base_is_named_in_files_only() -> None:
    sentence = "--base is given on the command line, but is a key of YAML files only; write 'base: FILE' into the one that --config names"
    assert message_of("--base", "a.yaml") == message_of("--base=a.yaml") == sentence
    write(run="model:\n  base: sub/one.yaml\n")
    assert message_of("--config", "run.yaml").startswith("unknown key 'model.base' in run.yaml (line 2)")
    with pytest.raises(ConfigError, match=r"^unknown key 'base' in the given dictionary"):
        config_from_dict({"base": "a.yaml"})
    assert "`base: FILE.yaml`" in " ".join(format_help().split())
