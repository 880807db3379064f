"""Which model a checkpoint stands for: which of a run's, and the function that it computed at that step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.config import ConfigError, RunConfig, config_to_yaml
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.checkpoint_model import _settle_guidance, _settle_schedule, find_checkpoint
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.storage.retention import make_way
from tests.tiny import tiny_config


def saved(run: Path, config: RunConfig, step: int) -> Path:
    """What a checkpoint says of itself, without weights."""
    folder = checkpoint.checkpoints_folder(run) / checkpoint.tag_of(step)
    folder.mkdir(parents=True)
    layout = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}
    save = SaveIdentity.draw(step, config_to_yaml(config))
    checkpoint.write_metadata(folder, config, checkpoint.TrainState(step, {}, layout), save)
    return folder


def test_a_checkpoint_without_its_state_is_none(tmp_path: Path) -> None:
    """As a kill leaves it while it is written over."""
    config = tiny_config({}, tmp_path)
    torn, whole = saved(tmp_path, config, 2), saved(tmp_path, config, 4)
    assert find_checkpoint(tmp_path, 2) == torn
    (torn / "state.json").rename(torn / "other.json")
    with pytest.raises(ConfigError, match=r"has no checkpoint step_00000002; there are step_00000004$"):
        find_checkpoint(tmp_path, 2)
    assert find_checkpoint(tmp_path, 4) == whole
    assert find_checkpoint(tmp_path, None) == whole  # 'latest' is not there
    copy = whole.with_name(whole.name + "-good")
    copy.mkdir()
    (copy / "state.json").write_text((whole / "state.json").read_text())
    assert find_checkpoint(tmp_path, None) == whole
    (copy / "state.json").unlink()
    (whole / "state.json").unlink()
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path, 4)


def test_what_is_written_over_names_no_files_meanwhile(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_config({}, tmp_path), 2)
    (folder / "index.json").write_text("{}")
    make_way(folder)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_only_an_older_format_is_said_to_lack_digests(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_config({}, tmp_path), 2)
    assert checkpoint.lacks(folder) == ""
    state = {"format": 4, "step": 2, "data": {}, "layout": {}}
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoint.lacks(folder).startswith("of a format without digests")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": float("nan")}, "step is nan"),
        ({"step": True}, "step is True"),
        ({"data": [1]}, r"data is \[1\]"),
        ({"data": None}, "data is missing"),
        ({"layout": {"tensor": 1.5}}, r"layout\.tensor is 1\.5"),
        ({"plan": 7}, "plan is 7"),
    ],
)
def test_an_edited_state_without_a_digest(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_config({}, tmp_path), 2)
    state = {"format": 4, "step": 2, "data": {}, "layout": {}} | edits
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=rf"state\.json is damaged: {message}; copy the whole checkpoint"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00step", b"x" * 300, b"", b"step_00000004\nstep_00000002"])
def test_what_latest_cannot_name(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path, tiny_config({}, tmp_path), 2)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"latest names '.*', but .* is not a complete checkpoint; "
    ) as caught:
        checkpoint.latest_tag(tmp_path)
    assert str(caught.value).isprintable()


def test_latest_is_no_folder(tmp_path: Path) -> None:
    """A start would not see it, and the first save fail."""
    saved(tmp_path, tiny_config({}, tmp_path), 2)
    (tmp_path / "checkpoints" / "latest").mkdir()
    with pytest.raises(
        ConfigError, match="latest is a folder, not a file that names a checkpoint; remove it"
    ):
        checkpoint.latest_tag(tmp_path)
    assert checkpoint.latest_tag(tmp_path / ("x" * 300)) is None


@pytest.mark.parametrize(
    ("step", "kind", "iterations"), [(0, "euler", 0), (4, "euler", 0), (5, "iiet", 2), (8, "iiet", 2)]
)
def test_the_function_is_that_of_the_last_step_taken(step: int, kind: str, iterations: int) -> None:
    """Of 8 steps the first 4 are plain: after the fourth the model is still what they trained."""
    config = tiny_config(
        {}, Path("run"), solver={"kind": "iiet", "iterations": 2, "schedule": [[0.5, 0], [0.5, 2]]}
    )
    left_out: list[str] = []
    _settle_schedule(config, cast(Any, SimpleNamespace(leave_out=left_out.append)), step)
    assert (config.solver.kind, getattr(config.solver, "iterations", 0)) == (kind, iterations)
    assert left_out == [".solver."] * (kind == "euler")


def test_a_guided_model_keeps_its_iterations_and_not_the_guidance(tmp_path: Path) -> None:
    """Before the first plan the budget, 7 of 9 evaluations, is spent evenly."""
    config = tiny_config(
        {},
        tmp_path,
        solver={"kind": "iiet", "iterations": 2},
        guidance={"interval": 4, "budget": 0.8},
    )
    _settle_guidance(config, saved(tmp_path, config, 2))
    assert config.guidance.interval == 0
    assert config.solver.iterations == [1, 1, 2]  # type: ignore[attr-defined]
