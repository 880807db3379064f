"""A stopped and resumed run is the uninterrupted run, to the bit."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_iiet.config import LoadedConfig, config_from_dict, config_from_file
from megatron_iiet.storage import checkpoint, retention
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import pretrain
from megatron_iiet.training.record import read_starts
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, write_shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def bits(folder: Path) -> dict[int, tuple[str, ...]]:
    """Loss, gradient norm and learning rate of every step, and validation losses, in hexadecimal."""
    keys = ("loss", "grad_norm", "lr", "validation_loss")
    return {s: tuple(v[k].hex() for k in keys if k in v) for s, v in read_log(folder).items()}


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "iiet": (1, {"solver": {"kind": "iiet", "iterations": 2}}),
    "released": (1, {"solver": {"kind": "iiet", "variant": "released", "iterations": 1}}),
    "two-stage": (1, {"solver": {"kind": "iiet", "iterations": 2, "schedule": [[0.5, 0], [0.5, 2]]}}),
    "zero0": (0, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "bf16": (1, {"training": {"precision": "bf16"}}),
    "json optimizer": (2, {}),
    "muon": (1, {"optimizer": {"kind": "muon"}, "training": {"precision": "bf16"}}),
    "readers": (1, {"data": {"num_workers": 2}}),
}


JSON_OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


@pytest.mark.slow
@pytest.mark.parametrize("case", long_but(CASES, "two-stage", "zero3"))
def test_resumed_twice_equals_uninterrupted(case: str, data: dict[str, str], tmp_path: Path) -> None:
    """Stops after steps 3 and 5 of 8 (two-stage training switches between), resumes with the same command."""
    stage, sections = CASES[case]
    sections = {name: dict(values) for name, values in sections.items()}
    ds_path = ds_json(tmp_path, stage, **(JSON_OPTIMIZER if case == "json optimizer" else {}))
    whole = tiny_config(data, tmp_path / "whole", **sections)
    expected = run_ranks(pretrain_rank, 2, as_data(whole), ds_path)[0]
    for stop in (3, 5, None):
        training = {**sections.get("training", {}), "stop_after": stop}
        part = tiny_config(data, tmp_path / "parts", **{**sections, "training": training})
        weights = run_ranks(pretrain_rank, 2, as_data(part), ds_path)[0]
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert max(bits(tmp_path / "parts")) == 8
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.slow
def test_two_stage_switches_and_leaves_coefficients_alone(data: dict[str, str], tmp_path: Path) -> None:
    """The first stage is plain Transformer++, bit for bit; the coefficients start moving after it."""
    schedule = {"kind": "iiet", "iterations": 1, "schedule": [[0.5, 0], [0.5, 1]]}
    first = tiny_config(data, tmp_path / "two", solver=schedule, training={"stop_after": 4})
    weights = run_ranks(pretrain_rank, 1, as_data(first), ds_json(tmp_path, 1))[0]
    euler = tiny_config(data, tmp_path / "euler", solver={"kind": "euler"}, training={"stop_after": 4})
    run_ranks(pretrain_rank, 1, as_data(euler), ds_json(tmp_path, 1))
    two, plain = bits(tmp_path / "two"), bits(tmp_path / "euler")
    assert [two[s][0] for s in range(5)] == [plain[s][0] for s in range(5)]  # step 0: validation loss
    assert weights["layers.2.solver.coefficients"].tolist() == [0.0, 0.0, 1.0]
    rest = tiny_config(data, tmp_path / "two", solver=schedule)
    weights = run_ranks(pretrain_rank, 1, as_data(rest), ds_json(tmp_path, 1))[0]
    assert weights["layers.2.solver.coefficients"].tolist() != [0.0, 0.0, 1.0]


@pytest.mark.slow
def test_keeps_the_newest_checkpoints_and_their_configuration(data: dict[str, str], tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", checkpoint={"interval": 2, "keep": 2})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    folder = checkpoint.checkpoints_folder(tmp_path / "run")
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000006", "step_00000008"]
    assert checkpoint.latest_tag(tmp_path / "run") == "step_00000008"
    assert (folder / "step_00000008" / "config.yaml").read_text() == (
        tmp_path / "run/config.yaml"
    ).read_text()
    assert checkpoint.read_state(folder / "step_00000008").step == 8


@pytest.mark.slow
def test_a_save_over_an_older_one_is_never_a_mixture(data: dict[str, str], tmp_path: Path) -> None:
    """Set back to step 2 and trained to step 4 again: what is replaced is incomplete until it is whole."""
    config = tiny_config(data, tmp_path / "run", training={"stop_after": 4}, checkpoint={"interval": 2})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    folder = checkpoint.checkpoints_folder(tmp_path / "run")
    retention.make_way(folder / "step_00000004")
    with pytest.raises(ValueError, match="step_00000004 is not a complete checkpoint"):
        checkpoint.latest_tag(tmp_path / "run")
    (folder / "latest").write_text("step_00000002")
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    assert checkpoint.latest_tag(tmp_path / "run") == "step_00000004"
    assert len(export_run(tmp_path / "run").state) > 0


def pretrain_until_killed(config: dict[str, Any], ds_path: Path, victim: int) -> None:
    """Train; rank ``victim`` dies in the middle of writing its part of the second checkpoint."""
    from megatron_iiet.storage import safetensors_stream

    whole, calls = safetensors_stream.replacing, [0]

    @contextmanager
    def dying(path: Path) -> Iterator[Any]:
        with whole(path) as file:
            calls[0] += path.suffix == ".safetensors"
            if calls[0] == 2 and os.environ["RANK"] == str(victim):
                file.write(b"half a fi")
                file.flush()
                os._exit(9)
            yield file

    safetensors_stream.replacing = dying
    pretrain_rank(config, ds_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", long_but([0, 1], 1))
def test_a_rank_killed_while_saving_costs_one_interval(
    victim: int, data: dict[str, str], tmp_path: Path
) -> None:
    """The newest complete checkpoint stays in force, and the resumed run is the uninterrupted one."""
    config = tiny_config(data, tmp_path / "run", checkpoint={"interval": 2}, training={"steps": 6})
    with pytest.raises(RanksFailedError):
        run_ranks(pretrain_until_killed, 2, as_data(config), ds_json(tmp_path, 1), victim)
    assert checkpoint.latest_tag(tmp_path / "run") == "step_00000002"
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 1))
    whole = tiny_config(data, tmp_path / "whole", checkpoint={"interval": 2}, training={"steps": 6})
    run_ranks(pretrain_rank, 2, as_data(whole), ds_json(tmp_path, 1))
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def pretrain_until_signalled(config: dict[str, Any], ds_path: Path) -> None:
    """Train; rank 1 alone is sent SIGUSR1, in the third step."""
    from megatron_iiet.training import loop

    whole = loop.learning_rate

    def signalling(optimizer: Any, step: int, steps: int) -> float:
        if step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(optimizer, step, steps)

    loop.learning_rate = signalling
    pretrain_rank(config, ds_path)


@pytest.mark.slow
def test_a_signal_ends_all_ranks_with_a_checkpoint_of_the_step_in_progress(
    data: dict[str, str], tmp_path: Path
) -> None:
    """What is due after that step is left out, and made up for by the next start: the whole log is that of
    the uninterrupted run."""
    sections: dict[str, Any] = {
        "training": {"steps": 6},
        "evaluation": {"interval": 3},
        "logging": {"solver_interval": 3},
        "guidance": {"interval": 3, "budget": 0.7, "samples": 8},
    }
    whole, config = (tiny_config(data, tmp_path / name, **sections) for name in ("whole", "run"))
    run_ranks(pretrain_rank, 2, as_data(whole), ds_json(tmp_path, 1))
    run_ranks(pretrain_until_signalled, 2, as_data(config), ds_json(tmp_path, 1))
    assert checkpoint.latest_tag(tmp_path / "run") == "step_00000003"
    interrupted = read_log(tmp_path / "run")[3]
    assert "loss" in interrupted
    assert not {"validation_loss", "guidance/evaluations"} & interrupted.keys()
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 1))
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 7


def untimed(folder: Path) -> dict[int, dict[str, float]]:
    """All values of a log that are no matter of time or memory."""
    timed = ("time", "step_seconds", "tokens_per_second", "mfu", "hfu", "memory_bytes", "peak_memory_bytes")
    timed += ("slowest_rank", "slowest_over_median")
    log = read_log(folder)
    return {step: {k: v for k, v in values.items() if k not in timed} for step, values in log.items()}


@pytest.mark.slow
def test_refuses_a_checkpoint_of_another_format(data: dict[str, str], tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", training={"stop_after": 1})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    state = checkpoint.checkpoints_folder(tmp_path / "run") / "step_00000001" / "state.json"
    state.write_text('{"format": 1, "step": 1}')
    with pytest.raises(
        RanksFailedError, match=r"ConfigError: .*state.json is of format 1, not 5; use the version that"
    ):
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))


@pytest.mark.slow
def test_stops_at_a_step_that_is_not_finite(data: dict[str, str], tmp_path: Path) -> None:
    """DeepSpeed would leave the step out in silence, and the run would log a loss that stands still."""
    config = tiny_config(data, tmp_path / "run", optimizer={"lr": 1e18, "warmup_fraction": 0.0})
    with pytest.raises(RanksFailedError, match=r"BadNumbersError: step \d has loss"):
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    assert checkpoint.latest_tag(tmp_path / "run") is None


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of change and content of every file."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def half(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 2 of 8 steps."""
    folder = tmp_path_factory.mktemp("half")
    config = tiny_config(data, folder / "run", training={"stop_after": 2})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(folder, 1))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "accept", "message"),
    [
        ({"model": {"ffn_hidden_size": 64}}, (), "model.ffn_hidden_size is 48 there and 64 here"),
        ({"model": {"ffn_hidden_size": 64}}, ("model.ffn_hidden_size",), "ValueError: .*shape"),
        ({"solver": {"kind": "pcformer"}}, ("solver.kind",), "ValueError: .*"),
        ({"solver": {"kind": "euler"}}, (), "solver.kind is iiet there and euler here"),
        ({"solver": {"key_values": "first"}}, (), "solver.key_values is every there and first here"),
        ({"training": {"seed": 1}}, ("solver.iterations",), "training.seed is 1234 there and 1 here"),
        ({"training": {"steps": 2, "seed": 1}}, (), "training.seed is 1234 there and 1 here"),
        ({"checkpoint": {"interval": 0, "resume": False}}, (), "checkpoint.resume is false"),
    ],
    ids=str,
)
def test_refuses_a_checkpoint_that_does_not_fit(
    sections: dict[str, Any], accept: tuple[str, ...], message: str, half: Path, data: dict[str, str]
) -> None:
    """Also where a person means it, but the weights have no place; and where there is nothing left to do."""
    before = files(half)
    other = tiny_config(data, half, **sections)
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(pretrain_rank, 1, as_data(other), ds_json(half.parent, 1), accept)
    assert files(half) == before


@pytest.mark.slow
def test_an_accepted_change_holds_for_one_start(data: dict[str, str], half: Path, tmp_path: Path) -> None:
    """The run's configuration is the checkpoint's until there is a newer one; the record has the change, and
    the next start need not accept it again."""
    shutil.copytree(half, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text("of a save that was killed before it wrote this file")
    solver = {"iterations": 0}
    config = tiny_config(data, tmp_path / "run", solver=solver, training={"stop_after": 4})
    seen = run_ranks(config_at_every_step, 1, as_data(config), ds_json(tmp_path, 1), ["solver.iterations"])[0]
    assert seen == [before, before]
    assert config_from_file(tmp_path / "run" / "config.yaml").solver.iterations == 0
    assert "accept_changes" not in (tmp_path / "run" / "config.yaml").read_text()
    config = tiny_config(data, tmp_path / "run", solver=solver, optimizer={"lr": 1e-3})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    starts, broken = read_starts(tmp_path / "run" / "starts.jsonl")
    assert broken == []
    assert [(start["resumed_step"], start["accepted"], start["changed"]) for start in starts] == [
        (None, [], []),
        (2, [{"key": "solver.iterations", "old": 1, "new": 0}], []),
        (4, [], [{"key": "optimizer.lr", "old": 0.01, "new": 0.001}]),
    ]
    newest = checkpoint.checkpoints_folder(tmp_path / "run") / "step_00000008"
    assert read_starts(newest / "starts.jsonl")[0] == starts


def config_at_every_step(config: dict[str, Any], ds_path: Path, accept: list[str]) -> list[str]:
    """The run's ``config.yaml`` as each of its steps begins."""
    from megatron_iiet.training import loop

    whole, seen = loop.learning_rate, []

    def noting(*arguments: Any) -> float:
        seen.append((Path(config["output_dir"]) / "config.yaml").read_text())
        return whole(*arguments)

    loop.learning_rate = noting
    pretrain_rank(config, ds_path, accept)
    return seen


def pretrain_saying(config: dict[str, Any], ds_path: Path, accept: tuple[str, ...] = ()) -> str:
    """Train as the scripts do; what is printed."""
    with redirect_stdout(io.StringIO()) as said:
        pretrain(LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path, accept_changes=accept))
    return said.getvalue()


@pytest.mark.slow
def test_a_complete_run_is_left_as_it_is(data: dict[str, str], half: Path, tmp_path: Path) -> None:
    """On two ranks, of which one speaks; nothing is built."""
    before = files(half)
    for sections, message in (
        (
            {"training": {"steps": 2}, "optimizer": {"lr": 1.0}},
            "complete: 2 of 2 steps; raise training.steps",
        ),
        ({"training": {"stop_after": 2}}, "complete up to training.stop_after = 2: 2 of 8 steps; raise it"),
    ):
        config = tiny_config(data, half, **sections)
        said = run_ranks(pretrain_saying, 2, as_data(config), ds_json(tmp_path, 1))
        assert said[0].startswith(message)
        assert said[0].count("\n") == 1
        assert said[1] == ""
        assert files(half) == before


@pytest.mark.slow
def test_more_steps_do_not_fall_back_into_an_earlier_stage(data: dict[str, str], tmp_path: Path) -> None:
    sections: dict[str, Any] = {"solver": {"iterations": 1, "schedule": [[0.75, 0], [0.25, 1]]}}
    first = tiny_config(data, tmp_path / "run", training={"steps": 4}, **sections)
    said = run_ranks(pretrain_saying, 1, as_data(first), ds_json(tmp_path, 1), ("a.b", "c.d"))[0]
    assert "\n--checkpoint.accept_changes names a.b, c.d, but there is no checkpoint to differ from\n" in said
    again = tiny_config(data, tmp_path / "run", training={"steps": 8}, **sections)
    message = (
        "training.steps is 4 there and 8 here, which moves step 4 into another stage, from r = 1 to r = 0"
    )
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(pretrain_rank, 1, as_data(again), ds_json(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["prefix", "validation_prefix"])
def test_tokens_changed_in_place_are_refused(key: str, data: dict[str, str], tmp_path: Path) -> None:
    """Same sizes, same path, another token."""
    write_shard(tmp_path / "own", documents=60, seed=3)
    paths = {**data, key: str(tmp_path / "own")}
    config = tiny_config(paths, tmp_path / "run", training={"stop_after": 1})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    tokens = np.memmap(tmp_path / "own.bin", dtype=np.uint16, mode="r+")
    tokens[1234] = (tokens[1234] + 1) % 96
    tokens.flush()
    message = (
        rf"data\.{key} is .*own with tokens of digest \w+ there and .*own with tokens of digest \w+ here"
    )
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"),
    long_but(product([1, 2, 3], ["fp32", "bf16"]), (1, "fp32"), (2, "bf16"), (3, "bf16")),
)
def test_exported_weights_are_the_master_weights(
    stage: int, precision: str, data: dict[str, str], tmp_path: Path
) -> None:
    """What two ranks sharded is put together again without a process group; the working weights of the last
    step are the masters, rounded."""
    config = tiny_config(data, tmp_path / "run", training={"precision": precision})
    expected = run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, stage))[0]
    state = export_run(tmp_path / "run").state
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name].to(value.dtype), value), name
