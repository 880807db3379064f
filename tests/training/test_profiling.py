"""What a profile of some steps says: where their time went."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.engine.phases import PHASES, STEP, label_of, phase
from megatron_iiet.training.loop import train
from megatron_iiet.training.profiling import FOLDER, Profiling, table_of
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config
from tests.training.bare_run import bare_run


def event(name: str, start: float, end: float, kernels: dict[str, float] | None = None) -> Any:
    listed = [SimpleNamespace(name=name, duration=duration) for name, duration in (kernels or {}).items()]
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), kernels=listed)


def rows(table: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}


def two_steps() -> Iterator[Any]:
    """In microseconds, as a profiler gives them; kernels run when they like."""
    for start in (0.0, 20_000.0):
        yield event(label_of(STEP), start, start + 10_000)
        yield event(label_of("data"), start, start + 1_000)
        yield event(label_of("forward"), start + 1_000, start + 3_000)
        yield event(label_of("backward"), start + 3_000, start + 8_000)
        yield event("aten::mm", start + 1_500, start + 1_600, {"gemm": 4_000.0})
        yield event("aten::mm", start + 4_000, start + 4_100, {"gemm": 6_000.0})
        yield event("nccl:all_reduce", start + 7_000, start + 7_100, {"ncclDevKernel_AllReduce": 2_000.0})
    yield event("aten::mm", 50_000.0, 50_100.0, {"gemm": 9e9})  # of no step


def test_times_are_of_one_step_and_of_the_kernels_it_started() -> None:
    assert rows(table_of(two_steps(), 2)) == {
        "data": ["1.00", "0.0%", "0.00"],
        "forward": ["2.00", "33.3%", "4.00"],
        "backward": ["5.00", "66.7%", "8.00"],
        "other": ["2.00", "0.0%", "0.00"],
        "step": ["10.00", "100.0%", "12.00"],
        "communication": ["2.00", "16.7%", "2.00"],
    }


def test_without_a_gpu_shares_are_of_the_host() -> None:
    events = [event(each.name, each.time_range.start, each.time_range.end) for each in two_steps()]
    events.append(event("gloo:all_reduce", 7_000.0, 10_000.0))
    found = rows(table_of(events, 2))
    assert found["backward"] == ["5.00", "50.0%"]
    assert found["communication"] == ["1.50", "15.0%"]


def test_a_loop_profiles_the_steps_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bare_run(tmp_path / "run", training={"steps": 5})

    def step(number: int, lr: float) -> StepResult:
        with phase("forward"):
            time.sleep(0.002)
        return StepResult(5.0, 1.0, lr)

    run.engine._result = step  # type: ignore[attr-defined]
    assert train(run, [Profiling(2, 4)])
    run.close()
    folder = tmp_path / "run" / FOLDER
    assert {path.name for path in folder.iterdir()} == {
        f"steps_2_to_4.rank_0.{end}" for end in ("json.gz", "txt")
    }
    trace = json.loads(gzip.decompress((folder / "steps_2_to_4.rank_0.json.gz").read_bytes()))
    names = [each.get("name") for each in trace["traceEvents"] if each.get("ph") == "X"]
    assert names.count(label_of(STEP)) == names.count(label_of("forward")) == 3
    said = capsys.readouterr().out
    assert f"traces and tables: {folder}" in said
    table = (folder / "steps_2_to_4.rank_0.txt").read_text()
    assert float(rows(table.partition("\n\n")[0])["forward"][0]) >= 2.0
    assert table.partition("\n\n")[0] in said


def test_what_cannot_be_written_or_is_behind_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run", training={"steps": 5})
    (tmp_path / "run" / FOLDER).write_text("in the way")
    assert train(run, [Profiling(2, 2), Profiling(4, 4)])
    assert "warning: the profile of steps 2 to 2 is not kept: " in capsys.readouterr().out
    run.close()
    late = bare_run(tmp_path / "late", step=3, training={"steps": 5})
    assert train(late, [Profiling(3, 4)])
    late.close()
    said = capsys.readouterr().out
    assert "nothing is profiled: step 3 (logging.profile) is behind step 3" in said
    assert not (tmp_path / "late" / FOLDER).exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=["data", "pipeline"])
def test_every_rank_leaves_its_trace(parallel: dict[str, int], tmp_path: Path) -> None:
    """And every phase is found in it."""
    config = tiny_config(
        make_data(tmp_path),
        tmp_path / "run",
        training={"steps": 4},
        parallel=parallel,
        logging={"profile": [3, 4]},
    )
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 1))
    folder = tmp_path / "run" / FOLDER
    phases = {name for name in PHASES if name != "exchange" or parallel}
    for rank in range(2):
        found = rows((folder / f"steps_3_to_4.rank_{rank}.txt").read_text().partition("\n\n")[0])
        assert set(found) == phases | {"other", "step", "communication"}
        assert all(float(found[name][0]) > 0 for name in (*phases, "communication"))
        assert (folder / f"steps_3_to_4.rank_{rank}.json.gz").is_file()
