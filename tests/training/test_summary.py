"""Curves and summaries, on a run folder written by hand."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iiet.config import config_from_file, config_to_yaml
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.curves import plot_losses
from megatron_iiet.training.record import append_start
from megatron_iiet.training.summary import check_complete, list_files, summarize_run
from tests.tiny import make_data, save_of, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data: dict[str, str], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000002").mkdir(parents=True)
    (folder / "checkpoints/step_00000002/a.pt").write_bytes(bytes(1_000_000))
    (folder / "checkpoints/step_00000002/b.pt").write_bytes(bytes(2_000_000))
    training = {"steps": 4, "global_batch_size": 1000}
    (folder / "config.yaml").write_text(config_to_yaml(tiny_config(data, folder, training=training)))
    rows = [
        {"step": 0, "validation_loss": 5.0},
        {"step": 1, "loss": 9.0, "tokens_per_second": 10.0},
        {"step": 1, "loss": 4.0, "tokens_per_second": 3000.0},  # repeated after a resume: the last one counts
        {"step": 2, "loss": 3.5, "tokens_per_second": 1000.0, "validation_loss": 3.0},
        {"step": 3, "loss": 3.0, "tokens_per_second": 2000.0, "validation_loss": 2.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in rows))
    return folder


def test_summary(run: Path) -> None:
    """16 tokens a sequence, 1000 sequences a step."""
    assert summarize_run(run).splitlines() == [
        "3 of 4 steps, 0.05 M tokens, median 2,000 tokens/s",
        "validation perplexity 148.4 at step 0 → 7.39 at step 3 (loss 2.0000 nats per token; "
        "windows: rule first)",
    ]


@pytest.mark.parametrize(
    ("git", "step", "code"),
    [
        ({"commit": "0123456789abcdef", "dirty": True}, 40, "from step 40, commit 0123456789 with changes"),
        ({"commit": "0123456789abcdef", "dirty": False}, 0, "from step 0, commit 0123456789"),
        ({"commit": None, "dirty": None}, None, "no known commit"),
    ],
)
def test_the_last_start_is_described(run: Path, git: dict[str, Any], step: int | None, code: str) -> None:
    first = {"time": "early", "git": {"commit": None, "dirty": None}, "resumed_step": None}
    append_start(run, {**first, "layout": {"world_size": 1}})
    append_start(run, {"time": "late", "git": git, "resumed_step": step, "layout": {"world_size": 8}})
    last = summarize_run(run).splitlines()[-1]
    assert last == f"started 2 x, last late{' ' if step is not None else ', '}{code}, on 8 process(es)"


def test_a_run_says_whether_it_is_complete(run: Path, data: dict[str, str]) -> None:
    """By its newest checkpoint, not by its log: a save may have failed."""
    with pytest.raises(
        ValueError, match=f"^{run} has a checkpoint of 0 of 4 steps; the same command goes on"
    ):
        check_complete(run)
    make_complete(run)
    check_complete(run)


def make_complete(run: Path) -> None:
    """As the last save leaves it."""
    config, state = config_from_file(run / "config.yaml"), checkpoint.TrainState(step=4, data={}, layout={})
    folder = run / "checkpoints/step_00000004"
    folder.mkdir()
    checkpoint.write_metadata(folder, config, state, save_of(config, state))


@pytest.mark.parametrize("complete", [False, True])
def test_a_comparison_asks_its_runs_and_not_their_launcher(
    complete: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lost its ranks ends with 0, and one may fail after the last save."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(f"#!/bin/sh\nexit {int(complete)}\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    train = importlib.import_module("compare_demo").train
    if complete:
        make_complete(run)
        train(run, 2, [])
    else:
        with pytest.raises(
            SystemExit, match=r"0 of 4 steps.* \(its launcher's status is 0; see .*console.log"
        ):
            train(run, 2, [])
    assert (run / ".trained").exists() is complete


def test_files_are_listed_a_checkpoint_in_one_line(run: Path) -> None:
    checkpoint = run / "checkpoints/step_00000002"
    (run / "big").write_bytes(bytes(1_500_000))
    lines = list_files(run, checkpoint / "a.pt")
    assert [line for line in lines if "MB" in line and not line.startswith("     0.00 MB")] == [
        f"     1.50 MB  {run}/big",
        f"     4.00 MB  {checkpoint}/",  # a.pt counts where it is named, too
    ]
    assert any(line.endswith("log.jsonl") for line in lines)


def test_summary_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        summarize_run(tmp_path)


def test_losses_of_two_rules_are_not_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of one run, nor in a picture of two; a log that does not say is older than the second rule."""
    other = tmp_path / "other"
    other.mkdir()
    rows = [{"step": step, "validation_loss": 3.0, "validation_rule": 1} for step in (0, 3)]
    (other / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses({"a": run, "b": other}, tmp_path / "x.png")
    assert capsys.readouterr().err == (
        "warning: the validation losses are over windows of different rules and cannot be compared (a: "
        "first, b: spread)\n"
    )
    plot_losses({"a": run}, tmp_path / "x.png")
    assert not capsys.readouterr().err
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "validation_loss": 1.0, "validation_rule": 1}) + "\n")
    lines = summarize_run(run).splitlines()
    assert lines[1].endswith("; windows: rule first and spread)")
    assert lines[2].endswith(f"cannot be compared ({run}: first and spread)")


def test_plot_is_a_picture(run: Path, tmp_path: Path) -> None:
    plot_losses({"a": run, "b": run}, tmp_path / "new" / "x.png")
    picture = (tmp_path / "new" / "x.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">2I", picture[16:24]) == (960, 540)


def test_the_smoothed_loss_is_the_mean_of_the_steps_up_to_each(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    rows = [{"time": 0.0, "step": step, "loss": float(step)} for step in range(1, 31)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_losses({"a": run}, tmp_path / "x.png")
    axes = plt.gcf().axes[0]
    every, smooth, _ = axes.lines
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    monkeypatch.undo()
    plt.close()
    assert every.get_xydata().tolist() == [[step, step] for step in range(1, 31)]
    assert smooth.get_xydata().tolist() == pytest.approx(
        np.array([[step, step - 9.5] for step in range(20, 31)])
    )


@pytest.mark.parametrize(
    ("steps", "drawn"), [(20, ["b, validation"]), (21, ["b, training", "b, validation"])]
)
def test_a_legend_names_what_is_drawn(
    steps: int, drawn: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean from more than 20 steps on, and validation where there was any."""
    from matplotlib import pyplot as plt

    rows: list[dict[str, float]] = [{"time": 0.0, "step": step, "loss": 3.0} for step in range(1, steps + 1)]
    rows += [{"time": 0.0, "step": step, "validation_loss": step / 8} for step in (0, 48)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_losses({"b": run}, tmp_path / "x.png")
    axes = plt.gcf().axes[0]
    monkeypatch.undo()
    plt.close()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == drawn
    assert axes.lines[-1].get_xydata().tolist() == [[0.0, 0.0], [48.0, 6.0]]
    assert len({line.get_color() for line in axes.lines}) == 1


def test_the_rate_is_the_one_in_the_middle(run: Path) -> None:
    """Of an even number the higher of both; validation is of the first and the last step that has one."""
    rows: list[dict[str, float]] = [
        {"step": step, "loss": 1.0, "tokens_per_second": rate}
        for step, rate in enumerate((9e3, 1e3, 5e3, 3e3), start=1)
    ]
    rows += [{"step": 3, "validation_loss": 0.0, "loss": 1.0, "tokens_per_second": 5e3}]
    (run / "log.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in rows))
    assert summarize_run(run).splitlines() == [
        "4 of 4 steps, 0.06 M tokens, median 5,000 tokens/s",
        "validation perplexity 1.0 at step 3 → 1.00 at step 3 (loss 0.0000 nats per token; "
        "windows: rule first)",
    ]
    for missing in ("validation_loss", "loss"):
        kept = [{key: value for key, value in row.items() if key != missing} for row in rows]
        (run / "log.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in kept))
        with pytest.raises(ValueError, match="holds no validated steps yet"):
            summarize_run(run)
