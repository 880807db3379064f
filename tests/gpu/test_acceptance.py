"""The acceptance of a GPU, at toy size on a CPU: what is wrong turns its check red, and no other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import cuda_check  # noqa: E402
import gpu_acceptance  # noqa: E402
from gpu_checks import (  # noqa: E402
    CHECKS,
    bandwidth,
    base,
    build,
    deepspeed_runs,
    documents,
    host_waits,
    kernels,
    pretraining,
    runner,
    sanitizer,
    step,
    training,
    waits,
)
from gpu_checks.base import (  # noqa: E402
    FAILED,
    LATE,
    NEEDS,
    OK,
    REFUSED,
    Figure,
    NeedsGpuError,
    Outcome,
    RefusedError,
    Setting,
    outcome_of,
    race,
    shown,
)

from megatron_iiet.data.corpora.mmididx import bin_path  # noqa: E402
from megatron_iiet.models.attention_layout import document_mask  # noqa: E402
from megatron_iiet.ops import backends  # noqa: E402
from tests.ops.inputs import needs_extension  # noqa: E402


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", True, tmp_path / "check", 300.0)


def broken(outcome: Outcome) -> list[str]:
    return [figure.name for figure in outcome.figures if not figure.holds]


@pytest.mark.long
def test_every_check_runs_at_toy_size(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/gpu_acceptance.py",
        "--device",
        "cpu",
        "--toy",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert list(stored["checks"]) == list(CHECKS)
    said = {name: (check["status"], check["reason"]) for name, check in stored["checks"].items()}
    assert all(status in (OK, NEEDS) for status, _ in said.values()), said
    assert said["sanitizer"][0] == NEEDS
    for name in ("kernels", "documents", "bandwidth", "step", "deepspeed", "waits", "inference", "training"):
        assert said[name][0] == OK
        assert stored["checks"][name]["figures"], name
    assert done.returncode == 0, done.stderr
    _, *last = done.stdout.rpartition("\n\n")[2].splitlines()
    assert len(last) <= 20
    assert last[-1] == f"all figures: {tmp_path / 'report.md'}"
    report = (tmp_path / "report.md").read_text()
    assert "![loss](training/loss.png)" in report
    assert (tmp_path / "training/loss.png").stat().st_size > 1000


def merged_times(factor: float) -> Callable[..., Any]:
    true = backends.get_backend("cpu")

    def merge_norm(*arguments: Any) -> Any:
        merged, normed = true.merge_norm(*arguments)
        return merged * factor, normed

    return merge_norm


def products_times(factor: float) -> Callable[..., Any]:
    true = backends.get_backend("cpu")

    def transposed_merge(*arguments: Any) -> Any:
        gradient, products = true.transposed_merge(*arguments)
        return gradient, products * factor

    return transposed_merge


def drifting() -> Callable[..., Any]:
    factors = itertools.cycle((1.0, 1.0 + 2**-22))
    true = backends.get_backend("cpu")

    def merge_norm(*arguments: Any) -> Any:
        merged, normed = true.merge_norm(*arguments)
        return merged * next(factors), normed

    return merge_norm


@needs_extension
@pytest.mark.parametrize(
    ("function", "seed", "red"),
    [
        ("merge_norm", lambda: merged_times(1.001), "error"),
        ("merge_norm", lambda: merged_times(math.nan), "error"),
        ("transposed_merge", lambda: products_times(1.001), "error"),
        ("merge_norm", drifting, "repeated"),
        ("", None, ""),
    ],
    ids=["wrong", "not finite", "wrong gradient", "not repeatable", "right"],
)
def test_kernels(
    function: str, seed: Callable[[], Any], red: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "NAMES", ("cpu",))
    monkeypatch.setattr(kernels, "DTYPES", {"fp32": torch.float32})
    if function:
        faulty = dataclasses.replace(backends.get_backend("cpu"), **{function: seed()})
        monkeypatch.setitem(backends._READY, "cpu", faulty)
    outcome = outcome_of(kernels.check, setting)
    assert outcome.status == (FAILED if red else OK)
    if red:
        assert [red in name for name in broken(outcome)].count(True) == 1, outcome


@pytest.mark.parametrize("fault", ["", "the document before", "not finite"])
def test_documents(fault: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(positions_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        mask_B1TT = document_mask(positions_BT, dtype)
        if fault == "the document before":
            first = int((positions_BT[0] == 0).nonzero()[1])
            mask_B1TT[0, 0, first, first - 1] = 0
        elif fault:
            mask_B1TT[0, 0, 5] = -torch.inf
        return mask_B1TT

    monkeypatch.setattr(documents, "document_mask", mask)
    outcome = outcome_of(documents.check, setting)
    assert outcome.status == (FAILED if fault else OK)
    assert any("float32" in name for name in broken(outcome)) == bool(fault)


@pytest.mark.parametrize("local_bytes", [0, 8])
def test_kernels_that_spill(local_bytes: int, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(storage: str, target: str, _: None) -> cuda_check.Unit:
        kernel = cuda_check.Kernel("forward_kernel<float>", registers=64, local_bytes=local_bytes)
        return cuda_check.Unit(storage, target, [kernel, cuda_check.Kernel("other", 32, 0)])

    monkeypatch.setattr(cuda_check, "compile_unit", compiled)
    monkeypatch.setattr(build.shutil, "which", lambda _: "/bin/nvcc")
    monkeypatch.setattr(build, "_doctor", lambda: Figure("doctor", 0))
    outcome = outcome_of(build.check, setting)
    assert outcome.status == (FAILED if local_bytes else OK)
    assert len(broken(outcome)) == bool(local_bytes)
    assert all("spills" in name for name in broken(outcome))


Rows = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("fault", "red"),
    [
        ("", []),
        ("lost resume", ["resumed"]),
        ("resumed nowhere", []),
        ("started again", []),
        ("wrong ZeRO", ["losses of ZeRO-2"]),
        ("not finite", ["losses of ZeRO-2"]),
    ],
)
def test_deepspeed_judges_what_runs_log(
    fault: str, red: list[str], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(folder: Path, arguments: list[str], *_: Any, **__: Any) -> Rows:
        rows: Rows = [
            {"loss": 6.0 - 0.1 * step, "grad_norm": 1.0 + step} for step in range(deepspeed_runs.STEPS)
        ]
        if folder.name == "resumed":
            assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_00000003"]
            assert (folder / "checkpoints/latest").read_text() == "step_00000003"
            assert not (folder / "log.jsonl").exists()
            rows = rows[{"resumed nowhere": 6, "started again": 0}.get(fault, 3) :]
        else:
            for step in ("step_00000003", "step_00000006"):
                (folder / "checkpoints" / step).mkdir(parents=True)
            (folder / "checkpoints/latest").write_text("step_00000006")
            (folder / "log.jsonl").write_text("")
        if folder.name == "resumed" and fault == "lost resume":
            rows[-1]["loss"] += 1e-6
        if folder.name == "ZeRO-2" and fault in ("wrong ZeRO", "not finite"):
            rows[2]["loss"] = 5.7 if fault == "wrong ZeRO" else math.nan
        return rows

    monkeypatch.setattr(deepspeed_runs, "run", logged)
    outcome = outcome_of(deepspeed_runs.check, setting)
    assert outcome.status == (FAILED if fault else OK)
    for name in red:
        assert any(name in figure for figure in broken(outcome)), outcome
    if fault == "wrong ZeRO":
        (apart,) = (figure.value for figure in outcome.figures if "losses of ZeRO-2" in figure.name)
        assert apart == pytest.approx(0.1 / 5.8)


@pytest.mark.parametrize(
    ("waited", "status"),
    [
        ([9, 9, 9, *[0] * 12, 3], OK),
        ([9, 9, 9, 0, 0, 0, 2, *[0] * 8, 3], OK),
        ([*[0] * 3, *[1] * 12, 0], FAILED),
        ([], FAILED),
    ],
    ids=["none", "now and then", "every step", "nothing counted"],
)
def test_waits_of_the_host(
    waited: list[int], status: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first steps and the last, which is logged."""

    def run(folder: Path, arguments: list[str], *_: Any) -> Rows:
        _, script, counts, device, *options = arguments
        assert (script, device) == (host_waits.__file__, "cpu")
        assert "--ds-config" in options
        Path(counts).write_text(json.dumps([{"loop.py:9": n} for n in waited]))
        return []

    monkeypatch.setattr(waits, "run", run)
    outcome = outcome_of(waits.check, setting)
    assert outcome.status == status
    if any(waited[3:-1]):
        assert outcome.figures[0].note.endswith(" at loop.py:9")
        assert outcome.figures[1].value == max(waited[3:-1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wait_is_counted_where_it_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of most of them on GPUs; those it is silent about are asked for by name."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    own = torch.cuda.synchronize

    def step(reads: int) -> None:
        for _ in range(reads):
            if device == "cpu":
                torch.ones(2).sum().item()
            else:
                warnings.warn(host_waits.SAID, stacklevel=1)
                torch.cuda.synchronize()

    with host_waits.Waits(device) as counted:
        for reads in (1, 0, 3):
            counted.of_steps(step)(reads)
    each = 1 if device == "cpu" else 2
    assert [sum(places.values()) for places in counted.steps] == [each, 0, 3 * each]
    assert all(place.startswith("gpu/test_acceptance.py:") for places in counted.steps for place in places)
    assert modes == ([] if device == "cpu" else ["warn", "default"])
    assert torch.cuda.synchronize is own
    with warnings.catch_warnings(action="ignore"):
        step(1)
    assert sum(counted.steps[-1].values()) == 3 * each


@pytest.mark.parametrize(("end", "status"), [(5.0, OK), (6.5, FAILED), (math.nan, FAILED)])
def test_training_that_does_not_learn(
    end: float, status: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"loss": loss, "flops": 1, "step_seconds": 1.0} for loss in (6.0, 5.9, end)]
    monkeypatch.setattr(training, "run", lambda *_, **__: rows)
    assert outcome_of(training.check, setting).status == status


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_training_needs_two_steps_for_a_curve(
    steps: int, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"loss": loss, "flops": 1, "step_seconds": 1.0} for loss in (6.0, 5.0)][:steps]

    def run(folder: Path, *_: Any, **__: Any) -> Rows:
        folder.with_suffix(".txt").write_text("it says why\n")
        return rows

    monkeypatch.setattr(training, "run", run)
    outcome = outcome_of(training.check, setting)
    assert outcome.status == (OK if steps == 2 else FAILED)
    assert (f"logged {steps} steps in" in outcome.reason) == (steps < 2)
    assert outcome.reason.endswith("it says why") == (steps < 2)


@pytest.mark.parametrize(
    ("left", "expected", "skipped"),
    [
        (300.0, {"Transformer++": 94, "IIET r = 1": 143, "IIET r = 3": 290}, []),
        (30.0, {"IIET r = 1": 8, "IIET r = 3": 20}, ["Transformer++"]),
        (24.0, {"IIET r = 3": 14}, ["Transformer++", "IIET r = 1"]),
    ],
)
def test_systems_share_the_time_that_is_left(
    left: float, expected: dict[str, float], skipped: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each stops early enough to end in order; one for which there is not enough is named."""
    given: dict[str, float] = {}
    rows = [{"loss": loss, "flops": 1, "step_seconds": 1.0} for loss in (6.0, 5.0)]

    def train(setting: Setting, label: str, *rest: Any) -> Rows:
        given[label] = rest[-1]
        return rows

    monkeypatch.setattr(Setting, "left", property(lambda _: left))
    monkeypatch.setattr(training, "_train", train)
    monkeypatch.setattr(training, "_draw", lambda *_: None)
    setting = Setting("cpu", False, tmp_path, left, shard="corpus", tokenizer="tokenizer.json")
    figures = list(training.check(setting))
    assert given == expected
    assert setting.skipped == skipped
    assert [f.value for f in figures] == [2, 5.0] * len(expected) + [5.5] * len(expected)
    assert "loss at step 2, mean of 2" in figures[-1].name


@needs_extension
def test_of_kernels_one_shape_is_tried_whatever_the_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0.0
    monkeypatch.setattr(Setting, "left", property(lambda _: left))
    worst, differ, tried = kernels._compare(setting, "cpu", torch.float32)
    assert (worst < 1e-5, differ, tried) == (True, 0, 1)
    assert setting.skipped == [f"{kernels.TOY_SHAPES - 1} of {kernels.TOY_SHAPES} shapes, cpu, torch.float32"]
    left = 4.0
    assert kernels._compare(setting, "cpu", torch.float32)[2] == kernels.TOY_SHAPES


def test_what_the_sanitizer_counts() -> None:
    assert sanitizer.errors_in("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer.errors_in("========= ERROR SUMMARY: 3 errors") == 3
    racing = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
    assert sanitizer.errors_in(racing) == 2
    assert sanitizer.errors_in("nothing of the kind") is None


def test_bounds() -> None:
    for value, bound, holds in (
        *((0.85, ">= 0.85", True), (0.84, ">= 0.85", False), (1e-5, "<= 1e-05", True)),
        *((2e-5, "<= 1e-05", False), (0, "== 0", True), (1, "== 0", False)),
        *((math.nan, "<= 1", False), (math.nan, ">= 1", False), (None, "== 0", False)),
        *((None, "", True), (math.nan, "", True)),
    ):
        assert Figure("f", value, bound=bound).holds == holds, (value, bound)
    assert Setting("cuda", False, Path(), 1.0).judged(">= 1") == ">= 1"
    assert Setting("cuda", True, Path(), 1.0).judged(">= 1") == ""
    assert Setting("cpu", True, Path(), 1.0).judged(">= 1") == ""


def test_reports_are_json(setting: Setting) -> None:
    outcome = Outcome(FAILED, "", [Figure("f", math.nan, bound="<= 1"), Figure("g", 0.5, bound="<= 1")])
    stored = json.loads(json.dumps(outcome.as_dict(), allow_nan=False))
    assert [(f["value"], f["holds"], f["note"]) for f in stored["figures"]] == [
        (None, False, "nan"),
        (0.5, True, ""),
    ]
    assert [f.holds for f in Outcome.from_dict(stored).figures] == [False, True]
    with pytest.raises(ValueError, match="not JSON compliant"):
        Outcome(OK, seconds=math.inf).write(setting.folder / "outcome.json")
    assert list(setting.folder.iterdir()) == [], "and nothing else is written"


def test_reasons(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: Exception) -> Callable[[Setting], list[Figure]]:
        def check(_: Setting) -> list[Figure]:
            raise error

        return check

    for error, status, reason in (
        (NeedsGpuError("the kernels"), NEEDS, "the kernels"),
        (RefusedError("there is no nvcc"), REFUSED, "there is no nvcc"),
        (TimeoutError("it did not end"), LATE, "it did not end"),
        (ZeroDivisionError("division"), FAILED, "ZeroDivisionError: division"),
    ):
        outcome = outcome_of(raising(error), setting)
        assert (outcome.status, outcome.reason) == (status, reason)
        assert ("Traceback" in capsys.readouterr().err) == (status == FAILED), "where it happened is logged"


CHILD = """
import json, os, pathlib, subprocess, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, folder = arguments["--check"], pathlib.Path(arguments["--output"])
if name == "build":
    print("before the crash", flush=True)
    os.abort()
figures = [{"name": "speed", "value": 0.5, "unit": "", "against": "", "bound": ">= 0.85", "note": ""}]
if name == "kernels":
    held = {"status": "out of time", "reason": "", "figures": [figures[0] | {"bound": ""}], "seconds": 1.0}
    (folder / name / "so_far.json").write_text(json.dumps(held))
    rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "rank.txt").write_text(str(rank.pid))
    time.sleep(600)
if name == "documents":
    sys.exit("a package is missing")
status = {"bandwidth": "FAILED", "step": "ok"}[name]
found = {"status": status, "reason": "", "figures": figures if status == "FAILED" else [], "seconds": 1.0}
(folder / name / "outcome.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_no_check_stops_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools").mkdir()
    entry = tmp_path / "tools/child.py"
    entry.write_text(CHILD)
    monkeypatch.setattr(runner, "ENTRY", entry)
    monkeypatch.setattr(runner, "GRACE", 0.0)
    # The one that hangs has a few seconds, the others more than they need on a busy machine.
    names = ["kernels", "build", "documents", "bandwidth", "step"]
    seconds = dict.fromkeys(names, 60.0) | {"kernels": 4.0}
    checks = {name: dataclasses.replace(CHECKS[name], seconds=seconds[name]) for name in names}
    monkeypatch.setattr(runner, "CHECKS", checks)
    options = runner.Options(tmp_path / "report", sum(seconds.values()), names, "cpu", True, None, None)
    assert runner.run_checks(options) == 1
    stored = json.loads((tmp_path / "report/report.json").read_text())["checks"]
    assert {name: check["status"] for name, check in stored.items()} == {
        "build": FAILED, "kernels": LATE, "documents": FAILED, "bandwidth": FAILED, "step": OK,
    }  # fmt: skip
    assert stored["kernels"]["seconds"] >= 3
    assert all(check["seconds"] > 0 for check in stored.values())
    assert stored["build"]["reason"] == "it ended with status -6: before the crash"
    assert stored["documents"]["reason"] == "it ended with status 1: a package is missing"
    assert "it did not end within" in stored["kernels"]["reason"]
    assert [figure["name"] for figure in stored["kernels"]["figures"]] == ["speed"]
    with suppress(psutil.NoSuchProcess):  # what it had started elsewhere is gone as well
        psutil.Process(int((tmp_path / "report/rank.txt").read_text())).wait(10)
    last = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in last[1:-1]] == names
    assert "speed 0.5" in next(line for line in last if line.startswith("bandwidth"))
    assert "**BROKEN**" in (tmp_path / "report/report.md").read_text()


def test_nothing_is_taken_from_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run in the folder would say what it said before; a foreign folder is left alone."""
    stale = tmp_path / "report/sanitizer/run/log.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    arguments = ["gpu_acceptance.py", "--device", "cpu", "--toy", "--only", "sanitizer", "--output"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "report")])
    assert gpu_acceptance.main() == 2
    assert stale.exists()
    (tmp_path / "report/report.json").write_text("{}")
    assert gpu_acceptance.main() == 0
    assert not stale.exists()


def test_no_figure_is_no_success(setting: Setting) -> None:
    outcome = outcome_of(lambda _: [], setting)
    assert (outcome.status, outcome.reason) == (LATE, "no time was left for any figure")


@pytest.mark.parametrize(
    ("bound", "end", "status"),
    [("", None, OK), ("", TimeoutError("the second is late"), LATE), ("<= 1", None, FAILED),
     ("<= 1", TimeoutError("the second is late"), FAILED)],
)  # fmt: skip
def test_what_there_was_no_time_for_is_named_and_what_was_found_is_kept(
    bound: str, end: Exception | None, status: str, setting: Setting
) -> None:
    setting.seconds = 100

    def check(setting: Setting) -> Iterator[Figure]:
        if setting.time_for("the first", 50):
            yield Figure("f", 2.0, bound=bound)
        if setting.time_for("the second", 200) or setting.time_for("the third", 200):
            yield Figure("g", 0.0)
        if end:
            raise end

    known: list[Outcome] = []
    outcome = outcome_of(check, setting, known.append)
    assert [(so_far.status, [f.name for f in so_far.figures]) for so_far in known] == [
        (FAILED if bound else LATE, ["f"])
    ]
    assert outcome.status == status
    assert outcome.reason.endswith("no time was left for the second, the third")
    assert [figure.name for figure in outcome.figures] == ["f"]
    assert ("expected <= 1" in outcome.reason) == bool(bound)
    assert ("the second is late" in outcome.reason) == bool(end)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "documents", "bandwidth", "step", "waits"])
def test_checks_without_time_name_all_they_skipped(name: str, setting: Setting) -> None:
    """No figure of anything that took part of the time, no exception, and what is missing by name."""
    setting.seconds = 0
    outcome = outcome_of(CHECKS[name].load(), setting)
    assert outcome.status in (LATE, OK), outcome
    if name != "documents":  # as short as it can be
        assert "no time was left for" in outcome.reason, outcome


def test_a_check_without_time_is_told(tmp_path: Path) -> None:
    options = runner.Options(tmp_path, 0.5, ["sanitizer"], "cpu", True, None, None)
    assert runner.run_checks(options) == 0
    stored = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert (stored["sanitizer"]["status"], stored["sanitizer"]["reason"]) == (LATE, "no time was left for it")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: torch .* sees no GPU here; to try the checks without one: --device cpu --toy"),
        (["--device", "cpu"], "error: --device cpu is for trying the checks; add --toy"),
        (["--device", "cpu", "--toy", "--minutes", "0"], "error: --minutes is 0; give a number above 0"),
        (["--device", "cpu", "--toy", "--shard", "x"], "error: --shard and --tokenizer go together"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", *arguments, "--output", str(folder)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_acceptance.main() == 2
    assert re.match(said, capsys.readouterr().err)
    assert not folder.exists()


def test_rounds_interleave_and_the_first_two_are_left_out() -> None:
    order: list[str] = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 4)
    assert order == ["a", "b"] * 6
    assert set(times) == {"a", "b"}
    order.clear()
    race({"a": lambda: order.append("a")}, "cpu", 40, until=lambda: False)
    assert order == ["a"] * 5


def test_a_race_tells_the_median_of_what_the_clock_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that goes on only while somebody runs; the warm-up counts for nothing."""
    now, lasts = [100.0], itertools.cycle((50.0, 50.0, 1.0, 8.0, 2.0))
    monkeypatch.setattr(base.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(lasts)

    assert race({"a": run}, "cpu", 3) == {"a": 2.0}


def test_numbers_as_the_report_prints_them() -> None:
    numbers = (None, math.nan, math.inf, 0.0, 3.0, 0.12345, 999.5, 1234.5, -1234.5)
    printed = ["none", "nan", "inf", "0", "3", "0.123", "1e+03", "1,234", "-1,234"]
    assert [shown(number) for number in numbers] == printed


def test_checks_share_the_nine_minutes() -> None:
    assert sum(check.seconds for check in CHECKS.values()) == 9 * 60


@pytest.mark.parametrize(
    ("solver", "activations"),
    [("transformer-pp", 2 * (36 * 32 + 8 * 64)), ("iiet", 2 * 4 * (36 * 32 + 8 * 64) + 2 * 2 * 32)],
    ids=["one evaluation", "four, and increments brought to rms 1"],
)
def test_the_estimate_of_memory_is_that_of_the_presets(
    solver: str, activations: int, setting: Setting
) -> None:
    """examples/configs/sizes/common.yaml, with d = 32, ffn = 64, 2 layers, 64 tokens, a vocabulary of 512."""
    options = () if solver == "transformer-pp" else ("--solver.iterations", "3")
    config = step.preset(f"{solver}-55m", setting, *options)
    state = step.estimate(config, 0)
    assert 8 * 2 * (4 * 32 * 32 + 3 * 32 * 64) < state < 8 * (2 * (4 * 32 * 32 + 4 * 32 * 64) + 2 * 512 * 32)
    assert step.estimate(config, 3) - state == 3 * 64 * (activations + 4 * 512)


@pytest.mark.parametrize("toy", [False, True])
def test_what_merges_are_raced_against(toy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler takes part in two sizes, not in toys, which should be quick."""
    small = torch.ones(2, 2)
    monkeypatch.setattr(bandwidth.torch, "randn", lambda *_, **__: small)
    monkeypatch.setattr(bandwidth, "race", lambda contenders, *_: dict.fromkeys(contenders, 1.0))
    names = [figure.name for figure in bandwidth.check(Setting("cpu", toy, tmp_path, 300.0))]
    for dtype in ("float32", "bfloat16"):
        where = [f"merge_norm, {dtype}, n = {n}" for n in (0, 4, 12, 23)]
        assert {f"{w}: share of a copy's bandwidth" for w in where} <= set(names)
        assert {f"{w}: faster than eager" for w in where} <= set(names)
        compiled = [w for w in where if f"{w}: faster than torch.compile" in names]
        assert compiled == ([] if toy else where[1:3])


def test_calls_are_of_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are tried with: each form that merge_norm takes, at widths of every remainder of 4."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    monkeypatch.setattr(kernels.torch, "randn", lambda *size, generator: torch.empty(size))
    calls = [kernels.draw_call(rng, generator, torch.float32, "cpu") for _ in range(400)]
    forms = {
        (
            call.residual is not None,
            min(len(call.increments), 2),
            0 if call.coefficients is None else call.coefficients.dim(),
            call.norm_weight is not None,
        )
        for call in calls
    }
    assert forms == {
        (residual, k, rows, norm)
        for residual, k, rows, norm in itertools.product((False, True), (0, 1, 2), (0, 1, 2), (False, True))
        if (residual if k == 0 else True) and not (k == 0 and rows) and not (rows == 2 and norm)
    }
    assert {call.gradients[1].shape[-1] % 4 for call in calls} == {0, 1, 2, 3}


def test_the_rate_of_products_counts_every_multiplication_and_addition(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five products of 256 x 256 matrices in half a second."""
    monkeypatch.setattr(step, "race", lambda contenders, *_: dict.fromkeys(contenders, 0.5))
    assert step.product_rate(setting) == 5 * 2 * 256 * 256 * 256 / 0.5


def test_the_corpus_made_up_can_be_learned(tmp_path: Path) -> None:
    """At most four tokens follow any two, and all tokens occur; none is the end of a document."""
    prefix = pretraining.made_up_corpus(tmp_path / "corpus", 12, 32 * 1024)
    documents = np.fromfile(bin_path(prefix), dtype=np.uint16).reshape(32, 1024)
    follows: dict[tuple[int, int], set[int]] = {}
    for document in documents.tolist():
        for first, second, third in zip(document, document[1:], document[2:], strict=False):
            follows.setdefault((first, second), set()).add(third)
    assert {token for tokens in follows.values() for token in tokens} == set(range(1, 12))
    assert max(map(len, follows.values())) == 4
