"""Evaluation tasks while training: in every layout what the tool finds in the checkpoint of that step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config import ConfigError, LoadedConfig, config_from_dict
from megatron_iiet.evaluation.harness import HarnessModel, run_tasks
from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.evaluation.tasks import load_tasks
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from megatron_iiet.training.task_evaluation import TaskEvaluation
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json
from tests.evaluation.task_data import write_task_data
from tests.tiny import make_data, tiny_config

torch.set_num_threads(1)

TASKS = ("lambada_openai", "piqa", "wikitext")
LENGTH = 48
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one process": (1, {}, 1),
    "tensor": (2, {"tensor": 2, "sequence": True}, 1),
    "ZeRO-3": (2, {}, 3),
    "pipeline": (2, {"pipeline": 2}, 1),
}


def train_with_tasks(config: dict[str, Any], ds_path: Path) -> None:
    """What pretrain_iiet.py does, with the callback once."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, callbacks = prepare(loaded.config, ds_config, context)
        others = [c for c in callbacks if not isinstance(c, TaskEvaluation)]
        train(run, [*others[:-1], TaskEvaluation(loaded.config), others[-1]])
        run.close()


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    tasks = {
        "tasks": list(TASKS),
        "tasks_interval": 2,
        "tasks_limit": 3,
        "tasks_data_dir": str(folder / "tasks"),
    }
    write_task_data(folder / "tasks")
    config = tiny_config(
        make_data(folder),
        folder / "run",
        model={"max_position_embeddings": 64},
        data={"sequence_length": LENGTH},
        solver={"kind": "iiet", "iterations": 2, "coefficient_init": "average"},
        training={"steps": 3},
        evaluation={"interval": 0, "samples": 8, **tasks},
        checkpoint={"interval": 2, "keep": 0},
        **sections,
    )
    return as_data(config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "ZeRO-3" else pytest.mark.long)
        for name in LAYOUTS
    ],
)
def test_log_has_what_the_tool_finds(name: str, tmp_path: Path) -> None:
    world_size, parallel, stage = LAYOUTS[name]
    run_ranks(train_with_tasks, world_size, settings(tmp_path, parallel=parallel), ds_json(tmp_path, stage))
    log = read_log(tmp_path / "run")
    recorded = {
        step: {k: v for k, v in values.items() if k.startswith("tasks/")} for step, values in log.items()
    }
    assert [step for step, values in recorded.items() if values] == [2, 3]  # every second, and the last
    tasks = load_tasks(TASKS, tmp_path / "tasks")
    options = ModelOptions(str(tmp_path / "run"), step=2, max_length=LENGTH)
    for step in (2, 3):
        prepared = prepare_model(replace(options, step=step), 1)
        with ParallelContext.start() as context:
            found = run_tasks(HarnessModel(prepared.load(context), prepared.codec), tasks, limit=3)
        expected = {
            f"tasks/{task}/{metric}": value
            for task, metrics in found.metrics.items()
            for metric, value in metrics.items()
            if "stderr" not in metric
        }
        assert recorded[step] == pytest.approx(expected, rel=1e-4)
    assert recorded[2] != recorded[3]


def test_missing_data_is_known_before_training(tmp_path: Path) -> None:
    config = tiny_config(
        {"prefix": "unread", "tokenizer": "unread"},
        tmp_path,
        evaluation={"tasks": ["piqa"], "tasks_data_dir": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match=r"evaluation.tasks is \['piqa'\]: .*piqa.jsonl is missing"):
        TaskEvaluation(config)


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.tasks is \['piqa', ''\], but every entry"):
        config_from_dict({"evaluation": {"tasks": ["piqa", ""]}})
    with pytest.raises(ConfigError, match=r"evaluation.tasks_limit is 0, but must be greater than 0"):
        config_from_dict({"evaluation": {"tasks_limit": 0}})
    with pytest.raises(ConfigError, match=r"evaluation.tasks_interval is -1, but must be 0 or greater"):
        config_from_dict({"evaluation": {"tasks_interval": -1}})
