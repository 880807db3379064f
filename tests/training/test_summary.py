"""Curves and summaries, on a run folder written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iiet.config import config_to_yaml
from megatron_iiet.training.curves import plot_losses
from megatron_iiet.training.summary import list_files, summarize_run
from tests.tiny import make_data, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data: dict[str, str], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000002").mkdir(parents=True)
    (folder / "checkpoints/step_00000002/a.pt").write_bytes(bytes(10))
    (folder / "checkpoints/step_00000002/b.pt").write_bytes(bytes(20))
    (folder / "config.yaml").write_text(config_to_yaml(tiny_config(data, folder, training={"steps": 2})))
    rows = [
        {"step": 0, "validation_loss": 5.0},
        {"step": 1, "loss": 9.0},
        {"step": 1, "loss": 4.0},  # repeated after a resume: the last one counts
        {"step": 2, "loss": 3.0, "tokens_per_second": 100.0, "validation_loss": 2.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in rows))
    return folder


def test_summary(run: Path) -> None:
    text = summarize_run(run)
    assert "2 of 2 steps" in text
    assert "validation perplexity 148.4 at step 0 → 7.39 at step 2" in text
    files = list_files(run)
    assert sum("step_00000002/" in line for line in files) == 1  # a checkpoint's shards are one line
    assert any(line.endswith("log.jsonl") for line in files)


def test_summary_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        summarize_run(tmp_path)


def test_plot_is_a_picture(run: Path, tmp_path: Path) -> None:
    plot_losses({"a": run, "b": run}, tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
