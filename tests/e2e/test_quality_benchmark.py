"""The quality benchmark on tiny trials: resumes, gives up, stops in time, and reports what it measured."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.training.metrics import read_log
from tests.tiny import write_corpus

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = 16


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
    trials = importlib.import_module("quality_trials")
    monkeypatch.setitem(trials.BASE["model"], "vocab_size", 300)
    monkeypatch.setitem(trials.BASE["model"], "num_layers", 2)
    monkeypatch.setitem(trials.BASE["data"], "sequence_length", 32)
    monkeypatch.setitem(trials.BASE["evaluation"], "samples", 16)
    for name in ("SHORT", "FULL"):
        monkeypatch.setattr(trials, name, STEPS)
    return importlib.import_module("quality")


@pytest.mark.long
def test_trials(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "valid"):
        write_corpus(tmp_path / f"{name}.jsonl", seed=len(name))
    quality.prepare(tmp_path / "data", str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"))
    data = quality.data_keys(tmp_path / "data")
    euler, iiet = (quality.Trial(system, 1e-2, 1, STEPS) for system in ("euler", "paper-r1"))
    spoilt = quality.Trial("released-r0", 1e-2, 1, STEPS)
    folder = tmp_path / "trials" / euler.name

    # Time is up at once: nothing starts, and the next call begins where this one ended.
    quality.Runner(tmp_path, data, time.time() - 1).train([], 1)
    runner_module = sys.modules["quality_runner"]
    runner = quality.Runner(tmp_path, data, float("inf"))
    folder.mkdir(parents=True)
    (folder / "trial.yaml").write_text(quality.strict_yaml.dump(euler.config(data, str(folder))))
    assert runner.run(euler, folder, STEPS // 2)
    assert not (folder / ".trained").exists()
    runner.train([euler], 1)
    runner.train([euler, iiet], 2)
    for trial in (euler, iiet):
        log = read_log(tmp_path / "trials" / trial.name)
        assert list(range(STEPS + 1)) == sorted(log)
    assert "resuming from" in (folder / "console.log").read_text()

    # Trials of a seed start from the same decoder weights and see the same batches.
    logs = [read_log(tmp_path / "trials" / trial.name) for trial in (euler, iiet)]
    assert logs[0][0]["validation_loss"] == pytest.approx(logs[1][0]["validation_loss"], abs=0.1)
    assert logs[1][1]["flops"] > 1.5 * logs[0][1]["flops"]

    monkeypatch.setattr(runner_module, "HOPELESS", -1.0)
    runner.train([spoilt], 1)
    assert (tmp_path / "trials" / spoilt.name / ".given-up").exists()
    assert max(read_log(tmp_path / "trials" / spoilt.name)) == STEPS // 4

    capsys.readouterr()
    quality.write_report(tmp_path, [], {})
    text = capsys.readouterr().out
    assert f"| Transformer++ | **{logs[0][STEPS]['validation_loss']:.4f}** |" in text
    assert "given up" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["given_up"] for row in stored["trials"]] == [False, False, True]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    quality.write_report(tmp_path / "again", *quality.load_results(tmp_path / "results.json"))
    assert capsys.readouterr().out == text


@pytest.mark.long
def test_distillation(quality: Any, tmp_path: Path) -> None:
    """From nothing to the table: teachers, influence, plan, students with and without a teacher."""
    benchmark = importlib.import_module("distillation_quality")
    for name in ("train", "valid"):
        write_corpus(tmp_path / f"{name}.jsonl", seed=len(name))
    quality.prepare(tmp_path / "data", str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"))
    runner = quality.Runner(tmp_path, quality.data_keys(tmp_path / "data"), float("inf"))
    teachers = [benchmark.starts("paper-r2", 1, {"euler": 1e-2})]
    names = ["e-iiet", "e-iiet-continued", "lower-bound", "euler-continued"]
    benchmark.train(runner, tmp_path, teachers, names, 2)

    found = benchmark.results(tmp_path, teachers)
    assert list(found) == ["iiet", "euler", *names]
    assert {result.trial.system for result in quality.read_results(tmp_path)} == {"paper-r2", "euler"}
    rows = {name: entry["seeds"][f"1 {benchmark.cpu_kind()}"] for name, entry in found.items()}
    assert rows["iiet"]["evaluations"] == 6
    assert rows["e-iiet"]["evaluations"] == rows["e-iiet-continued"]["evaluations"] == 3
    assert rows["lower-bound"]["evaluations"] == rows["euler"]["evaluations"] == 2
    assert rows["e-iiet"]["start"] == rows["e-iiet-continued"]["start"]
    assert rows["euler-continued"]["start"] == pytest.approx(rows["euler"]["loss"], abs=1e-6)
    assert rows["e-iiet"]["teacher_flops"] > 0 == rows["e-iiet-continued"]["teacher_flops"]
    gained = rows["euler"]["loss"] - rows["iiet"]["loss"]
    gain = f"{(rows['euler']['loss'] - rows['e-iiet']['loss']) / gained:.0%}" if gained > 0 else ""
    benchmark.measure_speed(tmp_path, found, benchmark.folders_of(tmp_path, teachers[0]))
    speeds = json.loads((tmp_path / "distillation_speed.json").read_text())
    assert speeds["iiet"]["cache"] == 3 * speeds["lower-bound"]["cache"]
    (line,) = [row for row in benchmark.table(found, speeds).splitlines() if row.startswith("| E-IIET |")]
    assert f"| {rows['e-iiet']['loss'] / rows['iiet']['loss'] - 1:+.2%} | {gain} |" in line
    assert line.endswith(f"| {speeds['e-iiet']['cache']:,} |")


def test_the_same_trial_on_another_machine_is_another_run(quality: Any) -> None:
    """Compared with its own machine's Transformer++ and teacher."""
    report = importlib.import_module("quality_report")
    results = [
        report.Result(quality.Trial(system, 1e-2, 1, report.FULL), [(report.FULL, 1.0, loss)], [], cpu=cpu)
        for cpu, losses in {"old": (3.0, 2.9), "new": (4.0, 3.7)}.items()
        for system, loss in zip(("euler", "rms-r3"), losses, strict=True)
    ]
    assert "| 2 | 3.3000 ± 0.5657 | -0.2000 ± 0.1414 |" in report.main_table(results, {})

    benchmark = importlib.import_module("distillation_quality")
    run = {
        "start": 5.0,
        "evaluations": 4,
        "training_flops": 0.0,
        "teacher_flops": 0.0,
        "flops_per_token": 1.0,
    }
    old, new = (
        {
            name: {"label": name, "seeds": {f"1 {cpu}": {**run, "loss": loss}}}
            for name, loss in zip(("iiet", "euler", "e-iiet"), losses, strict=True)
        }
        for cpu, losses in {"old": (2.0, 4.0, 3.0), "new": (3.0, 4.0, 3.0)}.items()
    )
    del new["euler"]
    both = benchmark.with_earlier(new, old)
    assert list(both) == ["iiet", "euler", "e-iiet"]
    (line,) = [row for row in benchmark.table(both, {}).splitlines() if row.startswith("| E-IIET |")]
    assert "| 4/4 | 2 |" in line
    assert "| +25.00% ± 35.36% | 50% |" in line  # the new machine has no Transformer++ to gain on


def test_plans_are_fair(quality: Any) -> None:
    """Trials of a phase and seed differ in solver, embedding scale, depth and learning rate only."""
    rates = {"euler": 1e-2, "released-r1": 2e-2}
    phases = [quality.sweep({}), quality.ablations(rates), quality.main_table(rates, "released")]
    for trials in phases:
        assert len({trial.name for trial in trials}) == len(trials)
        rest = set()
        for trial in trials:
            config = trial.config({}, "x")
            for section, key in (
                ("optimizer", "lr"),
                ("model", "embedding_scale"),
                ("model", "num_layers"),
                ("training", "seed"),
            ):
                config[section].pop(key)
            for section in ("solver", "guidance"):
                config.pop(section, None)
            if trial.system.endswith("-muon"):
                assert config.pop("optimizer") == {"kind": "muon", "matrix_lr_ratio": 1}
                config["optimizer"] = {}
            rest.add(json.dumps(config, sort_keys=True))
        assert len(rest) == 1
    main = phases[2]
    assert sum(trial.system == "euler" for trial in main) == 3
    assert {t.lr for t in main if t.system == "euler"} == {1e-2}
    assert {t.lr for t in main if t.system.startswith("released")} == {2e-2}


def test_a_rate_given_up_on_one_machine_counts_where_another_completed_it(quality: Any) -> None:
    report = importlib.import_module("quality_report")
    results = [
        report.Result(quality.Trial("euler", lr, 1, report.SHORT), [(1, 1.0, loss)], [], gone, cpu)
        for lr, loss, gone, cpu in (
            (1.0, 9.0, True, "old"),
            (1.0, 4.0, False, "new"),
            (2.0, 9.0, True, "old"),
        )
    ]
    assert report.sweep_losses(results) == {("euler", 1.0): 4.0, ("euler", 2.0): float("inf")}


def test_a_sweep_goes_on_while_the_best_rate_is_at_an_edge(quality: Any) -> None:
    losses = {("euler", 4e-3): 3.0, ("euler", 8e-3): 2.0, ("euler", 1.6e-2): 1.0}
    wanted = {t.lr for t in quality.sweep(losses) if t.system == "euler"}
    assert wanted == {4e-3, 8e-3, 1.6e-2, 3.2e-2}
    losses["euler", 3.2e-2] = 1.5
    assert {t.lr for t in quality.sweep(losses) if t.system == "euler"} == {4e-3, 8e-3, 1.6e-2}
    losses["euler", 4e-3] = 0.5
    assert {t.lr for t in quality.sweep(losses) if t.system == "euler"} == {2e-3, 4e-3, 8e-3, 1.6e-2}


def test_optimizers_are_compared_each_at_its_best_rate(quality: Any) -> None:
    """Over all seeds; Muon also with other rates for its matrices alone."""
    trials = importlib.import_module("quality_trials")
    losses = {(s, lr): abs(lr - 1.6e-2) for s in trials.COMPARED for lr in trials.BRIEF_RATES}
    assert len(quality.optimizers({})) == len(losses)
    wanted = {t.name: t for t in quality.optimizers(losses)}.values()
    assert {t.steps for t in wanted} == {trials.BRIEF}
    for system in trials.COMPARED:
        assert {t.seed for t in wanted if (t.system, t.lr) == (system, 1.6e-2)} == set(trials.SEEDS)
    ratios = {
        t.config({}, "x")["optimizer"]["matrix_lr_ratio"] for t in wanted if t.system.startswith("euler-muon")
    }
    assert ratios == {0.5, 1, 2}
    report = importlib.import_module("quality_report")
    results = [
        report.Result(quality.Trial(system, lr, seed, report.BRIEF), [(report.BRIEF, 1.0, loss)], [])
        for system, lr, seed, loss in (
            *(("euler", 1.0, 1, 4.0), ("euler", 1.0, 2, 9.0), ("euler", 2.0, 1, 5.0)),
            *(("euler-muon", 2.0, 1, 3.5), ("euler-muon", 2.0, 2, 8.7)),
        )
    ]
    assert report.best_rates(results, report.BRIEF) == {"euler": 1.0, "euler-muon": 2.0}
    text = report.report(results, {})
    assert "| Transformer++ | **4.0000** | 5.0000 |" in text
    assert "| Transformer++, Muon | 2 | 2 | 6.1000 ± 3.6770 | -0.4000 ± 0.1414 |" in text


def test_every_system_is_valid(quality: Any) -> None:
    from megatron_iiet.config import config_from_dict

    for name in quality.SYSTEMS:
        config_from_dict(quality.Trial(name, 1e-3, 1, 640).config({}, "x"))


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train main other", "there is no phase 'other'"),
        ("train --jobs 0", "--jobs is 0"),
        ("report --output-dir EMPTY", "no complete trial yet"),
        ("report --results EMPTY/none.json", "none.json: No such file"),
        ("report --results OTHER", "is no results.json"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    quality: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    told: str,
) -> None:
    (tmp_path / "other.json").write_text('{"trials": [{"loss": 1}]}')
    command = command.replace("EMPTY", str(tmp_path / "empty")).replace("OTHER", str(tmp_path / "other.json"))
    monkeypatch.setattr(sys, "argv", ["quality.py", *command.split()])
    with pytest.raises(SystemExit) as end:
        quality.main()
    assert told in f"{end.value.code} {capsys.readouterr().err}"
    assert end.value.code != 0
    assert not (tmp_path / "empty").exists()
