"""What a run reports of itself: learning rate, throughput, FLOPs and utilisation, to the digit."""

from __future__ import annotations

import json
import math
import mmap
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_iiet.training import loop, utilisation
from megatron_iiet.training.callbacks import MetricLogger
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.metrics import MetricWriter, read_log
from megatron_iiet.training.utilisation import PEAKS, RankReport, memory_bytes, peak_flops, peaks_of, slowest
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config
from tests.training.bare_run import Clock, bare_run

STEPS, BATCH, LENGTH, LAYERS, WIDTH, FFN, VOCABULARY = 8, 8, 16, 3, 32, 48, 384
"""Of :func:`tests.tiny.tiny_config`."""
PEAK = 0.1e12
SECONDS = [60.0, 30.0, 120.0, 40.0, 10.0, 50.0, 70.0, 90.0]
"""Of each step."""
TWO_STAGE = {"kind": "iiet", "iterations": 1, "schedule": [[0.5, 0], [0.5, 1]]}
"""One evaluation a layer in steps 1 to 4, two in 5 to 8: it changes inside an interval of three steps."""


def layer_flops(evaluations: int) -> int:
    """Of the forward pass of one sequence: every product of a matrix is 2 FLOPs a weight and token."""
    matrices = WIDTH * 3 * WIDTH + WIDTH * WIDTH + 3 * WIDTH * FFN  # qkv, output; gate, up and down
    scores = 2 * LENGTH * WIDTH  # q kᵀ and its product with v
    return LAYERS * evaluations * LENGTH * 2 * (matrices + scores)


HEAD_FLOPS = LENGTH * 2 * WIDTH * VOCABULARY


def step_flops(evaluations: int) -> int:
    """Model FLOPs of a step: a backward pass has two products where the forward pass has one."""
    return BATCH * 3 * (layer_flops(evaluations) + HEAD_FLOPS)


def evaluations_of(step: int) -> int:
    return 1 if step <= 4 else 2


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take :data:`SECONDS`."""
    monkeypatch.setattr(loop, "time", Clock(SECONDS))


def test_learning_rate_of_every_step(tmp_path: Path) -> None:
    """What is logged, and what the engine is given: a warm-up of 3 of 12 steps, then a cosine to a tenth."""
    optimizer = {"lr": 2e-3, "min_lr_ratio": 0.1, "warmup_fraction": 0.25}
    run = bare_run(tmp_path / "run", optimizer=optimizer, training={"steps": 12})
    loop.train(run, [MetricLogger()])
    run.close()
    expected = [2e-3 * part for part in (1 / 3, 2 / 3, 1.0)]
    for ninth in range(1, 10):
        expected.append(2e-4 + 1.8e-3 * math.cos(math.pi * ninth / 18) ** 2)  # (1 + cos 2x) / 2
    log = read_log(tmp_path / "run")
    assert [log[step]["lr"] for step in range(1, 13)] == pytest.approx(expected, rel=1e-12)
    assert run.engine.lrs == [log[step]["lr"] for step in range(1, 13)]  # type: ignore[attr-defined]
    assert expected[-1] == pytest.approx(2e-4)


def test_learning_rate_goes_on_after_a_resume(tmp_path: Path) -> None:
    optimizer = {"lr": 2e-3, "schedule": "constant", "warmup_fraction": 0.5}
    run = bare_run(tmp_path / "run", step=2, optimizer=optimizer)
    loop.train(run, [MetricLogger()])
    run.close()
    assert run.engine.lrs == [1.5e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recompute", ["off", "layer", "evaluation"])
def test_throughput_and_utilisation(
    world_size: int, recompute: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each interval alone, its steps' iterations counted one by one, and the last one shorter."""
    run = bare_run(
        tmp_path / "run",
        world_size=world_size,
        solver=TWO_STAGE,
        training={"recompute": recompute},
        logging={"interval": 3},
    )
    loop.train(run, [MetricLogger()])
    run.close()
    log = read_log(tmp_path / "run")
    for step in range(1, STEPS + 1):
        assert log[step]["flops"] == step_flops(evaluations_of(step))
        assert log[step]["step_seconds"] == SECONDS[step - 1]
    intervals = {3: (1, 2, 3), 6: (4, 5, 6), 8: (7, 8)}
    assert [step for step in log if "mfu" in log[step]] == list(intervals)
    for end, steps in intervals.items():
        seconds = sum(SECONDS[step - 1] for step in steps)
        needed = sum(step_flops(evaluations_of(step)) for step in steps)
        again = sum(BATCH * layer_flops(evaluations_of(step)) for step in steps)
        base = seconds * PEAK * world_size
        assert log[end]["tokens_per_second"] == len(steps) * BATCH * LENGTH / seconds
        assert log[end]["mfu"] == pytest.approx(needed / base, rel=1e-12)
        done = needed + (0 if recompute == "off" else again)
        assert log[end]["hfu"] == pytest.approx(done / base, rel=1e-12)
        assert log[end]["epoch/shard"] == 0.25
        assert log[end]["coefficient_norm/layers.0.solver.coefficients"] == 2.0
    said = capsys.readouterr().out.splitlines()
    assert "utilisation is a share of 0.1 TFLOP/s a device (logging.peak_tflops)" in said
    # 5 steps of 70 s on average, 2 of 33.3 s, none.
    assert [line.rpartition(" | ")[2] for line in said if "MFU" in line] == [
        "5:50 left",
        "1:07 left",
        "0:00 left",
    ]


def test_a_teachers_flops_are_done_and_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "time", Clock(SECONDS))
    parts = {"cross_entropy": 4.0, "hidden_mse": 0.5, "kl_divergence": 0.25}
    run = bare_run(
        tmp_path / "run",
        lambda step, lr: StepResult(5.0, 1.0, lr, parts),
        teacher={"kind": "iiet", "iterations": 3},
        solver={"kind": "iiet", "iterations": 1},
    )
    loop.train(run, [MetricLogger()])
    run.close()
    log = read_log(tmp_path / "run")
    taught = BATCH * (layer_flops(4) + HEAD_FLOPS)
    assert {log[step]["teacher_flops"] for step in range(1, 9)} == {taught}
    assert log[8]["flops"] == step_flops(2)
    assert log[8]["hfu"] - log[8]["mfu"] == pytest.approx(2 * taught / (160.0 * PEAK), rel=1e-9)
    assert [log[8][f"distillation/{name}"] for name in parts] == list(parts.values())


def pretrain_timed(config: dict[str, Any], ds_path: Path) -> None:
    """Train with steps that take :data:`SECONDS`."""
    loop.time = Clock(SECONDS)  # type: ignore[attr-defined]
    pretrain_rank(config, ds_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})], ids=str
)
def test_real_runs_report_the_same_work(ranks: int, parallel: dict[str, int], tmp_path: Path) -> None:
    """However it is shared out: tokens and FLOPs are the global batch's, the peak is all ranks'."""
    sections = {"parallel": parallel, "solver": TWO_STAGE, "training": {"recompute": "layer"}}
    config = tiny_config(make_data(tmp_path), tmp_path / "run", **sections, logging={"solver_interval": 0})
    run_ranks(pretrain_timed, ranks, as_data(config), ds_json(tmp_path, 1))
    log = read_log(tmp_path / "run")
    base = 160.0 * PEAK * ranks
    assert log[8]["tokens_per_second"] == 2 * BATCH * LENGTH / 160.0
    assert log[8]["mfu"] == pytest.approx(2 * step_flops(2) / base, rel=1e-12)
    again = 2 * BATCH * layer_flops(2)
    assert log[8]["hfu"] - log[8]["mfu"] == pytest.approx(again / base, rel=1e-9)


def test_the_peak_of_a_cpu_is_its_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 10.0, 10.5] + [20.0, 22.0] * 8)
    monkeypatch.setattr(utilisation, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(utilisation, "matmul", lambda a, b: None)
    peak, source = peak_flops(torch.device("cpu"), "fp32")
    assert peak == 2 * 1024**3 / 0.5
    assert "1024³" in source


@pytest.mark.parametrize(
    ("name", "precision", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 80GB HBM3", "fp32", 67.0),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA H800", "bf16", 989.0),
        ("NVIDIA GH200 480GB", "bf16", 989.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA B300 SXM6 AC", "bf16", 2250.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA A1000", "fp16", None),
        ("NVIDIA A1000", "bf16", None),
        ("Unheard-of 3000", "bf16", None),
    ],
)
def test_peaks_of_known_devices(
    name: str, precision: str, tera_flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very device: a name that only begins or ends like a known one is another."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    if precision == "tf32":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    peak, source = peak_flops(torch.device("cuda", 0), "fp32" if precision == "tf32" else precision)
    assert peak == (None if tera_flops is None else pytest.approx(tera_flops * 1e12))
    assert name in source
    assert ("logging.peak_tflops" in source) == (peak is None)
    assert f" {precision}" in source


DATA_SHEETS = {
    "V100": (15.7, None), "A10": (31.2, 125.0), "A10G": (31.5, 70.0), "A30": (10.3, 165.0),
    "A40": (37.4, 149.7), "A100": (19.5, 312.0), "A800": (19.5, 312.0), "RTX A6000": (38.7, 154.8),
    "RTX 3090": (35.6, 71.0),
    "RTX 4090": (82.6, 165.2), "RTX 6000 Ada": (91.1, 364.2), "L4": (30.3, 121.0), "L40": (90.5, 181.0),
    "L40S": (91.6, 362.0), "H20": (44.0, 148.0), "H100": (67.0, 989.0), "H100 PCIe": (51.0, 756.0),
    "H100 NVL": (60.0, 835.0), "H800": (67.0, 989.0), "H800 PCIe": (51.0, 756.0), "H200": (67.0, 989.0),
    "H200 NVL": (60.0, 835.0), "GH200": (67.0, 989.0), "B200": (75.0, 2250.0), "GB200": (80.0, 2500.0),
    "B300": (75.0, 2250.0), "GB300": (80.0, 2500.0), "MI250X": (47.9, 191.5), "MI300X": (163.4, 1307.4),
    "MI325X": (163.4, 1307.4),
}  # fmt: skip
"""fp32 and bf16 of every device, dense."""
EQUAL_IN_TF32 = ("RTX 3090", "RTX 4090", "L40")
"""tf32 is half of bf16 on all devices that have it, which on these is fp32."""
WITH_FP8 = ("RTX 4090", "RTX 6000 Ada", "L4", "L40", "L40S", "H20", "H100", "H100 PCIe", "H100 NVL", "H800")
WITH_FP8 += ("H800 PCIe", "H200", "H200 NVL", "GH200", "B200", "GB200", "B300", "GB300", "MI300X", "MI325X")


def test_every_peak_is_that_of_the_data_sheet() -> None:
    """fp8 is twice bf16, and tf32 half of it, as far as the makers' rounding goes."""
    assert {name: (peaks.fp32, peaks.bf16) for name, peaks in PEAKS.items()} == DATA_SHEETS
    for name, peaks in PEAKS.items():
        assert peaks_of(name) is peaks_of(f"Maker {name} 80GB") is peaks
        assert (peaks.fp8 is not None) == (name in WITH_FP8)
        assert (peaks.tf32 is None) == (name in ("V100", "MI250X"))
        if peaks.bf16 and peaks.tf32:
            assert peaks.tf32 == pytest.approx(peaks.bf16 / 2, rel=0.012)
            assert (peaks.tf32 == peaks.fp32) == (name in EQUAL_IN_TF32)
        assert peaks.fp16 == (125.0 if name == "V100" else None)  # else bf16's
        if peaks.bf16 and peaks.fp8:
            assert peaks.fp8 == pytest.approx(peaks.bf16 * 2, rel=0.026)


def test_without_a_peak_there_is_no_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "megatron_iiet.training.callbacks.peak_flops", lambda device, precision: (None, "why")
    )
    run = bare_run(tmp_path / "run", training={"steps": 2}, logging={"peak_tflops": None})
    loop.train(run, [MetricLogger()])
    run.close()
    log = read_log(tmp_path / "run")
    assert not {"mfu", "hfu"} & set(log[2])
    assert log[2]["tokens_per_second"] > 0
    said = capsys.readouterr().out
    assert "utilisation is unknown: why" in said
    assert " | MFU unknown | " in said


def test_memory_is_that_of_the_rank_with_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run", training={"steps": 2})
    ranks = [RankReport("a", 0, 2**30, 3 * 2**30, 1.0), RankReport("b", 0, 2**31, 2**31, 1.5)]
    monkeypatch.setattr(run, "ranks", lambda: ranks)
    loop.train(run, [MetricLogger()])
    run.close()
    log = read_log(tmp_path / "run")[2]
    assert (log["memory_bytes"], log["peak_memory_bytes"]) == (2**31, 3 * 2**30)
    assert (log["slowest_rank"], log["slowest_over_median"]) == (1, 1.5)
    assert " | 2.00 GiB, peak 3.00 | slowest rank 1 (b) 1.50 x median | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stages_and_seconds", "expected"),
    [
        ([(0, 1.0), (0, 1.0), (0, 1.25)], (2, 1.25)),
        ([(0, 2.0), (0, 1.0)], (0, 2.0)),  # of two, the faster one is what is usual
        ([(0, 4.0), (0, 4.0), (1, 1.0), (1, 1.5)], (3, 1.5)),  # stages have other work
        ([(0, 0.0), (0, 0.0)], (0, 1.0)),
    ],
)
def test_the_slowest_rank_is_found_among_its_like(
    stages_and_seconds: list[tuple[int, float]], expected: tuple[int, float]
) -> None:
    reports = [RankReport("host", stage, 0, 0, seconds) for stage, seconds in stages_and_seconds]
    assert slowest(reports) == expected


def test_memory_of_a_gpu_is_what_torch_gave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {device: 5}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 7}.__getitem__)
    assert memory_bytes(device) == (5, 7)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(
    ("parts", "said"), [({}, ""), ({"cross_entropy": 4.0, "kl": 0.25}, " (cross_entropy 4.0000, kl 0.2500)")]
)
def test_the_line_of_a_step(
    parts: dict[str, float],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the last step of an interval; throughput and time left are of the interval's two steps."""
    run = bare_run(
        tmp_path / "run",
        lambda step, lr: StepResult(5.0 / step, 1.5, lr, parts),
        optimizer={"lr": 2e-3, "warmup_fraction": 0.0, "schedule": "constant"},
        logging={"peak_tflops": 1e-6},
    )
    monkeypatch.setattr(run, "ranks", lambda: [RankReport("host", 0, 3 * 2**29, 2**31, 1.0)])
    loop.train(run, [MetricLogger()])
    run.close()
    needed = 2 * step_flops(2) / 90.0 / 1e6
    assert capsys.readouterr().out.splitlines()[2] == (
        f"step      2/8 | loss 2.5000{said} | lr 2.00e-03 | grad norm 1.500 | 3 tok/s | MFU {needed:.1%} "
        f"HFU {needed:.1%} | 1.50 GiB, peak 2.00 | 4:30 left"
    )


def test_memory_of_a_cpu_is_resident() -> None:
    before = memory_bytes(torch.device("cpu"))
    with mmap.mmap(-1, 64 << 20) as held:  # new pages; an allocator may have had these before
        held.write(b"1" * len(held))
        now, most = memory_bytes(torch.device("cpu"))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert now - before[0] > 0.9 * (64 << 20)
    assert most >= now
    assert abs(now - resident) < 16 << 20


def test_the_log_is_json_whatever_happens(tmp_path: Path) -> None:
    """NaN and Infinity are none; readers see such values as missing."""
    writer = MetricWriter(tmp_path, tensorboard=True, first_step=0)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["lr"]) == (None, None, 0.5)
    values = read_log(tmp_path)[1]
    assert values.keys() == {"time", "lr"}


@pytest.mark.slow
def test_events_of_repeated_steps_are_replaced(tmp_path: Path) -> None:
    """Eight steps; then a start from a checkpoint of step 5, whose steps 6 to 8 have other losses."""
    for first, loss in ((0, 5.0), (5, 4.0)):
        run = bare_run(tmp_path / "run", lambda step, lr, loss=loss: StepResult(loss, 1.0, lr), step=first)  # type: ignore[misc]
        loop.train(run, [MetricLogger()])
        run.close()
        # Files are read in the order of their names: of seconds, then of a number that sorts 10 before 9.
        time.sleep(1)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), purge_orphaned_data=True).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, 5.0 if step <= 5 else 4.0) for step in range(1, 9)]
    assert {step: values["loss"] for step, values in read_log(tmp_path / "run").items()} == dict(found)


def written(folder: Path, first_step: int, *steps: tuple[int, dict[str, float]]) -> bytes:
    """The log after a start from the checkpoint of ``first_step`` has written these."""
    writer = MetricWriter(folder, tensorboard=False, first_step=first_step)
    for step, values in steps:
        writer.write(step, values)
    writer.sync()
    writer.close()
    return (folder / "log.jsonl").read_bytes()


def abandoned(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses in the files of what was set aside, in order."""
    lines = [line for path in folder.glob("log.abandoned-*.jsonl") for line in path.read_bytes().splitlines()]
    return sorted((record["step"], record["loss"]) for record in map(json.loads, lines))


def test_a_log_is_a_line_a_step(tmp_path: Path) -> None:
    """What else is found of a step, be it after a resume, goes into its line."""
    written(tmp_path, 0, (1, {}), (2, {"loss": 5.0}), (2, {"lr": 0.5}))
    log = written(tmp_path, 2, (2, {"validation_loss": 4.0}), (3, {"loss": 3.0}))
    two, three = map(json.loads, log.splitlines())
    assert (two.pop("time"), three.pop("time")) == pytest.approx((time.time(),) * 2, abs=100)
    assert two == {"step": 2, "loss": 5.0, "lr": 0.5, "validation_loss": 4.0}
    assert three == {"step": 3, "loss": 3.0}
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(("first", "kept"), [(3, [1, 2, 3]), (1, [1]), (0, []), (9, [1, 2, 3, 4, 5])])
def test_what_a_run_did_not_take_is_set_aside(first: int, kept: list[int], tmp_path: Path) -> None:
    """From scratch it has taken nothing. A start that was killed in the midst of it leaves nothing twice."""
    before = written(tmp_path, 0, *((step, {"loss": float(step)}) for step in range(1, 6)))
    written(tmp_path, first)
    (tmp_path / "log.jsonl").write_bytes(before)
    written(tmp_path, first, (first + 1, {"loss": 0.5}))
    assert [v["loss"] for v in read_log(tmp_path).values()] == [*map(float, kept), 0.5]
    assert abandoned(tmp_path) == [(step, float(step)) for step in range(1, 6) if step not in kept]


def test_logs_of_older_versions_have_a_step_once(tmp_path: Path) -> None:
    """They repeat steps after a resume: the last line of each counts, for readers and for the next start."""
    rows = [(1, 5.0), (2, 4.0), (2, 3.0), (3, 2.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in rows))
    assert read_log(tmp_path)[2]["loss"] == 3.0
    written(tmp_path, 2)
    assert {step: values["loss"] for step, values in read_log(tmp_path).items()} == {1: 5.0, 2: 3.0}
    assert abandoned(tmp_path) == [(2, 4.0), (3, 2.0)]


def test_half_a_line_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a crash leaves it. One that only lacks its end is whole."""
    whole = written(tmp_path, 0, (1, {"loss": 1.0}), (2, {"loss": 2.0}))
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole[:-1])
    assert written(tmp_path, 2) == whole
    assert capsys.readouterr().out == ""
    path.write_bytes(whole[:-20])
    assert written(tmp_path, 2) == whole.splitlines(keepends=True)[0]
    assert capsys.readouterr().out == f"{path} (line 2): half a line, which a crash left, is cut\n"


ODD = ["", "null", "[1]", '{"loss": 1.0}', '{"step": "2"}', '{"step": true, "loss": 1.0}', '{"step": -1}',
       '{"step": 2.0}', '{"step": 2, "loss": NaN}', '{"step": 2, "loss": 1e999}', '{"step": 2, "loss": "x"}',
       '{"step": 2, "loss": [1.0]}', '{"step": 2, "loss"', "[" * 100_000, "\u2028", "\x00"]  # fmt: skip


def test_what_is_no_record_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next start leaves it where it is."""
    whole = written(tmp_path, 0, (1, {"loss": 1.0}))
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + "\n".join([*ODD, '{"step": 2, "loss": 0.5}', ""]).encode() + b"\xff\n")
    assert {step: values["loss"] for step, values in read_log(tmp_path).items()} == {1: 1.0, 2: 0.5}
    lines = [*range(2, len(ODD) + 2), len(ODD) + 3]
    told = [f"warning: {path} (line {n}) is not a whole record; it is left out" for n in lines]
    assert capsys.readouterr().err.splitlines() == told
    before = path.read_bytes()
    assert written(tmp_path, 2) == before
    added = written(tmp_path, 2, (2, {"lr": 0.25}))
    assert added == before.replace(b'{"step": 2, "loss": 0.5}', b'{"step": 2, "loss": 0.5, "lr": 0.25}')
