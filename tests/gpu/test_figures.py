"""What the checks of a GPU make of measurements that are given: figures, bounds, notes, the report."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from gpu_checks import (  # noqa: E402
    bandwidth,
    base,
    deepspeed_runs,
    documents,
    inference,
    pretraining,
    report,
    sanitizer,
    step,
    training,
)
from gpu_checks.base import FAILED, LATE, OK, Figure, Outcome, RefusedError, Setting  # noqa: E402

from megatron_iiet.data.tokenizers.loading import load_tokenizer  # noqa: E402
from megatron_iiet.models import Transformer  # noqa: E402
from megatron_iiet.training.utilisation import step_flops  # noqa: E402


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", True, tmp_path / "check", 300.0)


@pytest.fixture
def judging(tmp_path: Path) -> Setting:
    """As on a GPU: figures of speed and memory have their bounds."""
    found = Setting("cpu", True, tmp_path / "judged", 300.0)
    found.judged = lambda bound: bound  # type: ignore[method-assign]
    return found


def by_name(figures: Any) -> dict[str, Figure]:
    listed = list(figures)
    found = {figure.name: figure for figure in listed}
    assert len(found) == len(listed)
    return found


def test_a_race_is_the_median_of_rounds_that_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read around the run; a slow first round does not count."""
    now, waited = [0.0], list[str]()
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(base, "synchronize", waited.append)

    def taking(*seconds: float) -> Callable[[], None]:
        each = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(each))

    slow_start = {"a": taking(99, 99, 1, 5, 2), "b": taking(99, 99, 4, 4, 4)}
    assert base.race(slow_start, "cuda", 3) == {"a": 2.0, "b": 4.0}
    assert waited == ["cuda"] * 20
    asked = iter([True, False])
    assert base.race({"a": taking(*range(20))}, "cpu", 18, lambda: next(asked)) == {"a": 3.5}, "of 2 to 5"
    assert base.race({"a": taking(9, 9, 3, 3, 3)}, "cpu", 3, lambda: False) == {"a": 3.0}


ROW = {
    "system": "IIET r = 3", "cache": "dynamic", "refused": "", "peak_bytes": 3 << 20,
    "weights_and_cache_bytes": 7 << 20, "tokens_per_second": 12.34, "comparison": "equal",
    "time_ratio_to_transformer_pp": 4.6,
}  # fmt: skip


def test_what_decoding_costs(judging: Setting) -> None:
    rows = [ROW, {**ROW, "cache": "static", "peak_bytes": None, "comparison": None},
            {**ROW, "system": "E-IIET, 36 layers", "time_ratio_to_transformer_pp": 1.9},
            {**ROW, "system": "Transformer++"}, {**ROW, "cache": "paged", "refused": "no room"}]  # fmt: skip
    found = by_name(inference.figures_of(rows, judging))
    dynamic = found["IIET r = 3, dynamic: time a token"]
    assert (dynamic.value, dynamic.unit, dynamic.against, dynamic.bound) == (
        4.6, "x", "Transformer++", "<= 4.5",
    )  # fmt: skip
    assert not dynamic.holds
    assert dynamic.note == "12.3 tokens/s, 3 MiB, equal"
    static = found["IIET r = 3, static: time a token"]
    assert (static.bound, static.note) == ("", "12.3 tokens/s, 7 MiB, ")
    fast = found["E-IIET, 36 layers, dynamic: time a token"]
    assert (fast.bound, fast.holds) == ("<= 1.9", True)
    assert found["Transformer++, dynamic: time a token"].bound == ""
    refused = found["IIET r = 3, paged"]
    assert (refused.value, refused.note, refused.holds) == (None, "refused: no room", True)
    assert {figure.bound for figure in inference.figures_of(rows, judging, "curve: ")} == {""}
    assert "curve: IIET r = 3, dynamic: time a token" in by_name(
        inference.figures_of([ROW], judging, "curve: ")
    )


def test_which_benchmarks_of_decoding_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def measured(_: Setting, name: str, options: list[str]) -> list[dict[str, Any]]:
        asked.append((name, options))
        return [ROW]

    monkeypatch.setattr(inference, "measured", measured)
    assert len(list(inference.check(Setting("cpu", True, tmp_path, 300.0)))) == 1
    assert asked == [("table", inference.TABLE)]
    names = [figure.name for figure in inference.check(Setting("cpu", False, tmp_path, 300.0))]
    label = "IIET r = 3, dynamic: time a token"
    assert names == [label, f"curve: {label}", f"compiled: {label}"]
    assert asked[2:] == [("curve", inference.CURVE), ("compiled", ["--iterations", "3", "--compile"])]
    late = Setting("cpu", False, tmp_path, 25.0)
    assert len(list(inference.check(late))) == 1
    assert late.skipped == ["the curve runs", "the compiled runs"]


def test_a_benchmark_is_asked_and_believed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process: what it wrote, and what is told where it fails or does not end."""
    script = setting.folder / "benchmark.py"
    monkeypatch.setattr(inference, "BENCHMARK", script)
    script.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'inference.png').write_text('picture')\n"
        "(folder / 'inference.json').write_text(json.dumps({'rows': [{'argv': sys.argv[1:]}]}))\n"
    )
    (row,) = inference.measured(setting, "table", ["--iterations", "0"])
    folder = str(setting.folder / "table")
    assert row["argv"] == ["--device", "cpu", "--toy", "--iterations", "0", "--output", folder]
    assert (setting.folder / "table.png").read_text() == "picture"
    large = Setting("cpu", False, setting.folder, 300.0)
    assert inference.measured(large, "large", [])[0]["argv"][2:-2] == inference.OPTIONS
    script.write_text("print('fine\\nan UNEQUAL text\\nError: bad\\n'); raise SystemExit(3)\n")
    with pytest.raises(
        RuntimeError, match=r"^the benchmark ended with status 3: an UNEQUAL text; Error: bad$"
    ):
        inference.measured(setting, "again", [])
    script.write_text("import time; time.sleep(60)\n")
    with pytest.raises(TimeoutError, match=r"^the benchmark did not end in time \(late\)$"):
        inference.measured(Setting("cpu", True, setting.folder, 0.0), "late", [])


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Steps are not made; what they would be made of."""
    made: list[tuple[Any, ...]] = []
    for name in ("our_step", "their_step"):
        monkeypatch.setattr(step, name, lambda *given, name=name: made.append((name, *given)) or name)
    return made


def test_a_step_against_llama(
    judging: Setting, no_steps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"ours": 0.25, "LLaMA": 0.2}
    monkeypatch.setattr(step, "race", lambda contenders, *_: {name: times[name] for name in contenders})
    found = by_name(step._against_llama(judging, "55m", 1e9))
    faster = found["Transformer++ 55m, eager: step"]
    assert (faster.value, faster.bound, faster.holds) == (0.8, ">= 1.0", False)
    assert faster.note == "250.0 ms, 1 x 64 tokens"
    config = step.preset("transformer-pp-55m", judging)
    flops = step_flops(Transformer.on_meta(config), 64, "off")[0]
    assert found["Transformer++ 55m, eager: MFU"].value == pytest.approx(flops / 0.25 / 1e9)
    assert found["LlamaForCausalLM 55m, eager: MFU"].value == pytest.approx(flops / 0.2 / 1e9)
    assert len(found) == 3, "a toy is not compiled"
    assert [name for name, *_ in no_steps] == ["our_step", "their_step"]

    judging.toy = False
    monkeypatch.setattr(step, "preset", lambda *_: config)
    monkeypatch.setattr(step, "MICRO_BATCH", {"55m": 3, "340m": 2})
    assert len(list(step._against_llama(judging, "340m", 1e9))) == 3, "nor what is large"
    whole = by_name(step._against_llama(judging, "55m", 1e9))
    assert {figure.bound for name, figure in whole.items() if "compile" in name} == {""}
    assert whole["Transformer++ 55m, torch.compile: step"].note == "250.0 ms, 3 x 64 tokens"

    def failing(contenders: Any, *_: Any) -> dict[str, float]:
        raise ZeroDivisionError("x" * 300)

    monkeypatch.setattr(step, "race", failing)
    with pytest.raises(ZeroDivisionError):
        list(step._against_llama(judging, "55m", 1e9))
    calls = iter([lambda contenders: times, failing])
    monkeypatch.setattr(step, "race", lambda contenders, *_: next(calls)(contenders))
    refused = list(step._against_llama(judging, "55m", 1e9))[-1]
    assert (refused.name, refused.value, len(refused.note)) == ("55m, torch.compile", None, 200)
    assert refused.note.startswith("refused: ZeroDivisionError: xx")


def test_iterations_against_their_flops(
    judging: Setting, no_steps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"Transformer++": 2.0, "r = 1": 5.0, "r = 3": 8.0}
    monkeypatch.setattr(step, "race", lambda contenders, *_: {name: times[name] for name in contenders})
    found = by_name(step._against_flops(judging, "55m"))
    flops = {
        name: step_flops(Transformer.on_meta(step.preset(preset, judging, *options)), 64, "off")[0]
        for name, preset, *options in (
            ("Transformer++", "transformer-pp-55m"),
            ("r = 1", "iiet-55m", "--solver.iterations", "1"),
            ("r = 3", "iiet-55m", "--solver.iterations", "3"),
        )
    }
    assert list(found) == [f"IIET 55m, r = {r}: time ratio over FLOPs ratio" for r in (1, 3)]
    for (name, bound), figure in zip((("r = 1", ""), ("r = 3", "<= 1.05")), found.values(), strict=True):
        ratio, by_flops = times[name] / 2.0, flops[name] / flops["Transformer++"]
        assert figure.value == pytest.approx(ratio / by_flops)
        assert (figure.bound, figure.note) == (bound, f"time {ratio:.3f}, FLOPs {by_flops:.3f}")
    assert [given[0] for given in no_steps] == ["our_step"] * 3


def test_memory_against_the_presets(
    judging: Setting, no_steps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter(range(1, 7))
    monkeypatch.setattr(step, "peak_of", lambda make, device: next(peaks) << 20)
    found = by_name(step._memory(judging))
    assert list(found) == [
        f"{name}, recompute {mode}: peak memory over the presets' estimate"
        for name in ("transformer-pp-55m", "iiet-55m")
        for mode in ("off", "evaluation", "layer")
    ]
    assert [figure.bound for figure in found.values()] == ["<= 1.15", "", ""] * 2
    expected = step.estimate(step.preset("transformer-pp-55m", judging), 1)
    first = next(iter(found.values()))
    assert first.value == pytest.approx((1 << 20) / expected)
    assert first.note == f"0.00 GiB, estimate without recomputation {expected / 2**30:.2f}"


@pytest.mark.parametrize(("left", "figures"), [(300.0, 6), (14.0, 1)])
def test_which_steps_are_taken(
    left: float, figures: int, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "left", property(lambda _: left))
    monkeypatch.setattr(step, "product_rate", lambda _: 3e12)
    for name, count in (("_against_llama", 3), ("_against_flops", 2), ("_memory", 9)):
        monkeypatch.setattr(step, name, lambda *given, count=count: [Figure(str(given[1]), 0.0)] * count)
    found = list(step.check(setting))
    assert len(found) == figures
    assert (found[0].value, found[0].unit) == (3.0, "TFLOP/s")
    assert len(setting.skipped) == (0 if left > 15 else 2)


def test_bandwidths(judging: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"copy": 0.8, "eager": 3.0, "ours": 0.5}
    monkeypatch.setattr(
        bandwidth, "race", lambda contenders, *_: {name: times.get(name, 1.0) for name in contenders}
    )
    found = by_name(bandwidth.check(judging))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for n in (0, 4, 12, 23):
            share = found[f"merge_norm, {dtype}, n = {n}: share of a copy's bandwidth"]
            assert (share.value, share.bound, share.holds) == (0.8, ">= 0.85", False)
            assert share.note == f"{(n + 4) * 64 * 96 * size / 1e9:,.0f} GB/s"
            assert found[f"merge_norm, {dtype}, n = {n}: faster than eager"].value == 3.0
            backward = found.get(f"transposed backward, {dtype}, {n} merges: share of a copy's bandwidth")
            assert (backward is None) == (n == 0)
            assert backward is None or (backward.value, backward.bound) == (1.6, ">= 0.85")


def test_a_copy_moves_as_many_bytes() -> None:
    slab = torch.zeros(6, 4, dtype=torch.bfloat16)
    copied = bandwidth.copy_of(5, slab)()
    assert isinstance(copied, torch.Tensor)
    assert (copied.numel(), copied.dtype) == (60, torch.bfloat16)
    runs: list[int] = []
    bandwidth.repeated(lambda: runs.append(1), 7)()
    assert len(runs) == 7


def test_samples_of_documents() -> None:
    """So many each, cut elsewhere, each counted from its start."""
    rows = documents.positions(50, 3, 7)
    assert rows.shape == (3, 50)
    assert (rows == 0).sum(1).tolist() == [7] * 3
    assert not torch.equal(rows[0], rows[1])
    for row in rows.tolist():
        assert all(after in (0, before + 1) for before, after in itertools.pairwise(row))


def test_differences_of_runs_and_the_folder_of_one_that_was_killed(tmp_path: Path) -> None:
    assert deepspeed_runs.difference([(1.0, 5.0), (2.0, 6.0)], [(1.0, 5.5), (2.25, 6.0)]) == 0.5
    assert deepspeed_runs.difference([(1.0, 5.0)], [(1.25, 5.0)]) == 0.25
    assert deepspeed_runs.folder_of("ZeRO-1, offloaded all") == "ZeRO-1-offloaded-all"


@pytest.mark.parametrize(("again", "bound"), [(0.25, "<= 0.5"), (0.0, "== 0")])
def test_a_resumed_run_may_differ_as_undisturbed_ones_do(
    again: float, bound: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(folder: Path, arguments: list[str], device: str, seconds: float) -> list[dict[str, Any]]:
        apart = {"resumed": 0.5, "once-more": again}.get(folder.name, 0.0)
        rows = [{"loss": 6.0 - 0.1 * n + apart, "grad_norm": 1.0} for n in range(deepspeed_runs.STEPS)]
        if folder.name == "resumed":
            return rows[deepspeed_runs.STEPS // 2 :]
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints/latest").write_text("step")
        return [*rows, {"validation_loss": 3.0}]

    monkeypatch.setattr(deepspeed_runs, "run", logged)
    *_, last = deepspeed_runs.check(setting)
    assert last.value == pytest.approx(0.5)
    assert (last.bound, last.note) == (bound, f"two runs that nobody stopped differ by {again:.2g} here")


def test_the_command_of_a_run(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    alone = pretraining.command(config, {"x": 1}, 1, "cpu", "--output_dir", "out")
    ds_path = tmp_path / "a.ds.json"
    assert json.loads(ds_path.read_text()) == {"x": 1}
    entry = ["pretrain_iiet.py", "--config", str(config), "--ds-config", str(ds_path), "--output_dir", "out"]
    assert alone == [sys.executable, *entry]
    for ranks, device, count in ((1, "cpu", "--num_accelerators"), (2, "cuda", "--num_gpus")):
        launched = pretraining.command(config, {}, ranks, device, "--output_dir", "out", launcher=ranks == 1)
        module, port_flag, port, *rest = launched[2:]
        assert (launched[:2], module, port_flag) == (
            [sys.executable, "-m"], "deepspeed.launcher.runner", "--master_port",
        )  # fmt: skip
        assert rest == [count, str(ranks), *entry]
        with socket.create_server(("127.0.0.1", int(port))):
            pass  # it is free


def test_what_a_run_said(tmp_path: Path) -> None:
    log = tmp_path / "run.txt"
    for text, expected in (
        ("", "nothing"),
        ("one\ntwo\n", "two"),
        ("error: this\nerror: that\nends\n", "error: that"),
        ("error: " + "x" * 600, "error: " + "x" * 493),
    ):
        log.write_text(text)
        assert pretraining.said(log) == expected


def test_a_run_is_started_and_its_log_read(tmp_path: Path) -> None:
    """Real processes: one that ends, one that fails, one that is late, and one that is stopped."""
    folder = tmp_path / "run"

    def run(code: str, seconds: float = 60.0, **options: bool) -> list[dict[str, Any]]:
        return pretraining.run(folder, [sys.executable, "-c", code], "cpu", seconds, **options)

    assert run("pass") == []
    folder.mkdir()
    environment = "import os, pathlib; print(os.environ['OMP_NUM_THREADS'], os.environ['DS_ACCELERATOR'])"
    log = f"pathlib.Path({str(folder)!r}, 'log.jsonl').write_text('{{}}' + chr(10) + '{{}}')"
    assert run(f"{environment}; {log}") == [{}, {}]
    assert folder.with_suffix(".txt").read_text() == "1 cpu\n"
    with pytest.raises(RuntimeError, match=r"^run ended with status 3: error: no room$"):
        run("print('error: no room'); raise SystemExit(3)")
    wait = "import time; print('waits', flush=True); time.sleep(60)"
    with pytest.raises(TimeoutError, match=r"^run did not end within 0 s: "):
        run(wait, 0.1)
    stopping = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); " + wait
    assert run(stopping, 0.5, stop=True) == [{}, {}]


def test_the_tokenizer_that_is_made_up(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(pretraining.made_up_tokenizer(tmp_path / "tokenizer.json")))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 0)
    ids = tokenizer.encode("a é\n")
    assert len(ids) == 5
    assert 0 < min(ids) <= max(ids) < 257
    assert tokenizer.decode(ids) == "a é\n"


def test_what_a_system_is_trained_with(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def command(config: Path, ds_config: Any, ranks: int, device: str, *arguments: str) -> list[str]:
        given.update(config=config.read_text(), ds=ds_config, ranks=ranks, device=device)
        return list(arguments)

    def run(folder: Path, started: list[str], *rest: Any, stop: bool) -> list[dict[str, Any]]:
        flags = dict(zip(started[::2], started[1::2], strict=True))
        given.update(folder=folder.name, flags=flags, rest=rest, stop=stop)
        return [{"loss": 1.0}, {"validation_loss": 9.0}, {"loss": 2.0}]

    monkeypatch.setattr(training, "command", command)
    monkeypatch.setattr(training, "run", run)
    label, options = "IIET r = 3", ["--solver.iterations", "3"]
    rows = training._train(setting, label, "iiet-55m", options, {"data.prefix": "p"}, 12.5)
    assert rows == [{"loss": 1.0}, {"loss": 2.0}]
    assert given["config"] == f"base: {step.CONFIGS / 'iiet-55m.yaml'}\n"
    assert (given["ds"], given["ranks"], given["device"]) == ({"zero_optimization": {"stage": 1}}, 1, "cpu")
    assert (given["folder"], given["rest"], given["stop"]) == ("IIETr3", ("cpu", 12.5), False)
    flags = given["flags"]
    assert {name: flags.pop(f"--training.{name}") for name in ("steps", "global_batch_size")} == {
        "steps": "4", "global_batch_size": "4",
    }  # fmt: skip
    assert (flags.pop("--training.micro_batch_size"), flags.pop("--output_dir")) == (
        "1", str(setting.folder / "IIETr3"),
    )  # fmt: skip
    toy = {step.TOY[i]: step.TOY[i + 1] for i in range(0, len(step.TOY), 2)}
    assert flags == toy | {
        "--solver.iterations": "3", "--data.prefix": "p", "--optimizer.schedule": "constant",
        "--optimizer.lr": "5e-4", "--evaluation.interval": "0", "--evaluation.samples": "8",
        "--checkpoint.interval": "0", "--logging.interval": "10",
    }  # fmt: skip
    setting.toy = False
    training._train(setting, "Transformer++", "transformer-pp-55m", [], {}, 12.5)
    assert (given["folder"], given["stop"]) == ("Transformerpp", True)
    sizes = ("steps", "global_batch_size", "micro_batch_size")
    assert [given["flags"][f"--training.{name}"] for name in sizes] == ["100000", "64", "16"]


def test_curves_by_steps_flops_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    rows = [{"loss": 6.0, "flops": 10, "step_seconds": 0.5}, {"loss": 5.0, "flops": 20, "step_seconds": 0.25}]
    training._draw(tmp_path / "loss.png", {"A": rows})
    panels = pyplot.gcf().axes
    monkeypatch.undo()
    pyplot.close()
    assert [panel.lines[0].get_xydata().tolist() for panel in panels] == [
        [[1, 6], [2, 5]], [[10, 6], [30, 5]], [[0.5, 6], [0.75, 5]],
    ]  # fmt: skip
    assert [panel.get_xlabel() for panel in panels] == ["steps (equal tokens)", "FLOPs", "seconds"]
    assert panels[0].get_ylabel() == "loss, nats per token"
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["A"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prints", "status", "told"),
    [
        ("all calls ran; ERROR SUMMARY: 0 errors; RACECHECK SUMMARY: 0 hazards", OK, ""),
        ("all calls ran; ERROR SUMMARY: 2 errors", FAILED, "memcheck: errors is 2, expected == 0"),
        ("all calls ran", FAILED, "memcheck: errors is none"),
        (
            "Device not supported: all calls ran",
            "refused",
            "memcheck could not run the calls here: Device no",
        ),
        ("one\nan Error here", "refused", "memcheck could not run the calls here: an Error here"),
    ],
)
def test_the_sanitizer_is_asked_and_believed(
    prints: str, status: str, told: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = setting.folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho \"$1 $2\" >> {setting.folder}/tools\necho '{prints}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(setting.folder), prepend=os.pathsep)
    setting.device = "cuda"
    outcome = base.outcome_of(sanitizer.check, setting)
    assert outcome.status == status
    assert told in outcome.reason
    tools = (setting.folder / "tools").read_text().splitlines()
    assert tools == ["--tool memcheck", "--tool racecheck"][: 1 if status == "refused" else 2]
    assert all(figure.against == "12 calls, forward and backward" for figure in outcome.figures)


def test_without_a_sanitizer_there_is_a_reason(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.device = "cuda"
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: None)
    with pytest.raises(RefusedError, match="there is no compute-sanitizer; it comes with a CUDA toolkit"):
        list(sanitizer.check(setting))


def test_the_report(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step/loss.png").write_text("")
    figures = [
        Figure("speed", 0.9, "x", "peer", ">= 0.85", "noted"),
        Figure("error", 2.0, "", "", "<= 1"),
        Figure("told", 1234.5, "GB/s"),
    ]
    outcomes = {
        "step": Outcome(FAILED, "error is 2, expected <= 1", figures, 12.4),
        "kernels": Outcome(OK, "", figures[:1], 3.0),
        "bandwidth": Outcome(LATE, "a | b", [], 9.0),
        "documents": Outcome(OK, "", [Figure("first", 1.0, "s"), Figure("second", 2.0)], 1.0),
    }
    about = {"torch": "2.13", "device": "cpu", "date": "today", "sizes": "toy"}
    report.write_report(tmp_path, about, outcomes)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["about"] == about
    assert list(stored["checks"]) == list(outcomes)
    lines = (tmp_path / "report.md").read_text().splitlines()
    for line in (
        "# What held on this machine",
        "* torch: 2.13",
        "| step | FAILED | 12 | error is 2, expected <= 1 |",
        "| bandwidth | out of time | 9 | a / b |",
        f"## kernels: {report.CHECKS['kernels'].title}",
        "FAILED error is 2, expected <= 1",
        "| speed | 0.9 x | peer | >= 0.85 | holds noted |",
        "| error | 2  |  | <= 1 | **BROKEN**  |",
        "| told | 1,234 GB/s |  |  |   |",
        "![loss](step/loss.png)",
    ):
        assert line in lines, line
    said = report.summary(about, outcomes, tmp_path).splitlines()
    assert said[:2] == ["", "cpu, torch 2.13, today, sizes toy"]
    assert said[2] == "step       FAILED         12 s  error is 2, expected <= 1"
    assert said[3] == "kernels    ok              3 s  speed 0.9 x >= 0.85"
    assert said[5] == "documents  ok              1 s  first 1 s "
    assert said[6] == f"all figures: {tmp_path / 'report.md'}"
    worst = {"step": Outcome(OK, "", figures[::2] + figures[1:2], 1.0)}
    assert "error 2  <= 1" in report.summary({**about, "gpu": "H"}, worst, tmp_path)
    assert report.summary({**about, "gpu": "H"}, worst, tmp_path).splitlines()[1].startswith("H, torch")


def test_this_checkout_is_found_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert base.with_package()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert base.with_package()["PYTHONPATH"] == str(ROOT)
    assert base.with_package()["PATH"] == os.environ["PATH"]


def test_all_that_a_process_has_started() -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; read stop; kill $!"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        below = int(shell.stdout.readline())
        assert {shell.pid, below} <= set(base.descendants(os.getpid()))
        assert base.descendants(shell.pid) == [below]
        assert pretraining.ranks_of(shell.pid) == [shell.pid], "it trains itself"
        shell.communicate("\n")
    assert base.descendants(shell.pid) == []


def test_the_largest_is_nan_if_one_is() -> None:
    assert base.largest([1.0, 3.0, 2.0]) == 3.0
    assert str(base.largest([1.0, float("nan"), 2.0])) == "nan"
