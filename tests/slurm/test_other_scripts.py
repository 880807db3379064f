"""What else the multinode script starts, on two nodes of two ranks, and preprocessing as a job array."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iiet.data.tokenizers.training import train_tokenizer
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import documents, run_tool, write_rows
from tests.evaluation.task_data import write_task_data
from tests.slurm.cluster import Cluster
from tests.slurm.training import ROOT, SCRIPT, SIZE, STEPS, Training

pytestmark = pytest.mark.slurm
PREPROCESSING = ROOT / "examples/slurm/preprocess_slimpajama.sbatch"


def alone(script: str, *arguments: str) -> None:
    """Run a tool in one process."""
    done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_distillation(training: Training, undisturbed: Training) -> None:
    job = training.submit(
        arguments=("--teacher", str(undisturbed.run), "--plan", "0"), SCRIPT="distill_iiet.py"
    )
    assert job.wait() == "COMPLETED", training.said
    assert "teacher: " in training.said
    assert list(training.losses) == list(range(STEPS + 1))
    assert training.losses != undisturbed.losses


def test_influence(cluster: Cluster, undisturbed: Training, tmp_path: Path) -> None:
    """Of iterations, as one process measures it."""
    common = ("--model", str(undisturbed.run), "--sequences", "6", "--output")
    job = cluster.submit(
        *(*SIZE, "--time=60", f"--output={tmp_path / 'out'}", SCRIPT, *common, tmp_path / "here"),
        cwd=ROOT,
        SCRIPT="tools/iteration_influence.py",
        TENSOR="2",
        SEQUENCE="true",
        VENV=sys.prefix,
    )
    assert job.wait() == "COMPLETED", (tmp_path / "out").read_text()
    alone("tools/iteration_influence.py", *common, str(tmp_path / "alone"))
    found, expected = (
        json.loads((tmp_path / name / "influence.json").read_text()) for name in ("here", "alone")
    )
    for layer, wanted in zip(found["influence"], expected["influence"], strict=True):
        assert layer == pytest.approx(wanted, rel=1e-4)


def test_evaluation(cluster: Cluster, undisturbed: Training, tmp_path: Path) -> None:
    """The figures of one process."""
    data = write_task_data(tmp_path / "tasks", ("piqa",))
    common = ("--model", str(undisturbed.run), "--tasks", "piqa", "--data-dir", str(data), "--output")
    job = cluster.submit(
        *(*SIZE, "--time=60", f"--output={tmp_path / 'out'}", SCRIPT, *common, tmp_path / "here"),
        cwd=ROOT,
        SCRIPT="tools/evaluate.py",
        VENV=sys.prefix,
    )
    assert job.wait() == "COMPLETED", (tmp_path / "out").read_text()
    alone("tools/evaluate.py", *common, str(tmp_path / "alone"))
    found, expected = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "alone")
    )
    assert found["tasks"]["piqa"]["metrics"] == pytest.approx(expected["tasks"]["piqa"]["metrics"], rel=1e-4)


def test_another_script_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = cluster.submit(
        *SIZE, f"--output={out}", SCRIPT, cwd=ROOT, SCRIPT="tools/generate.py", VENV=sys.prefix
    )
    assert job.wait() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert "error: SCRIPT is tools/generate.py, not pretrain_iiet.py" in out.read_text()


def test_preprocessing_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """Three elements on two nodes; together they have what one process makes of it."""
    (tmp_path / "in").mkdir()
    texts = make_texts(120)
    for number in range(5):
        write_rows(tmp_path / f"in/{number}.jsonl.zst", [{"text": text} for text in texts[number::5]])
    tokenizer = train_tokenizer([str(tmp_path / "in/0.jsonl.zst")], tmp_path / "small", vocab_size=300)
    array = cluster.submit(
        *("--array=0-2", "--cpus-per-task=1", "--mem=0", f"--output={tmp_path}/%a.out", PREPROCESSING),
        cwd=ROOT,
        INPUT=str(tmp_path / "in"),
        OUTPUT=str(tmp_path / "out"),
        TOKENIZER=str(tokenizer.path),
        INPUTS_PER_SHARD="1",
        VENV=sys.prefix,
    )
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), "all elements have ended")
    said = {path.name: path.read_text() for path in tmp_path.glob("*.out")}
    assert array.field("JobState") == "COMPLETED", said
    assert len(said) == 3
    options = ("--tokenizer-model", tokenizer.path, "--append-eod")
    whole = run_tool("--input", tmp_path / "in", "--output-prefix", tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    assert len(list((tmp_path / "out").rglob("*.bin"))) == 5
    made = [path.with_suffix("") for path in (tmp_path / "out").glob("*.shards")]
    assert [documents(prefix) for prefix in made] == [documents(tmp_path / "whole_text_document")]
