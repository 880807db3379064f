"""What a user does wrong ends before training with one sentence and a non-zero status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iiet.config import config_to_yaml
from tests.distributed.harness import free_port, run_ranks
from tests.marks import long_but
from tests.tiny import make_data, tiny_config
from tests.tool_runs import run_here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working configuration, its data, and broken variants of the data."""
    folder = tmp_path_factory.mktemp("bad")
    data = make_data(folder)
    (folder / "run.yaml").write_text(config_to_yaml(tiny_config(data, folder / "run")))
    for name in ("empty", "torn", "no_bin"):
        for suffix in (".bin", ".idx"):
            (folder / (name + suffix)).write_bytes((folder / ("shard" + suffix)).read_bytes())
    (folder / "empty.idx").write_bytes(b"")
    with (folder / "torn.bin").open("r+b") as f:
        f.truncate(100)
    (folder / "no_bin.bin").unlink()
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 2.5}))
    return folder


BAD = {
    "missing data": (["--data.prefix", "{folder}/nowhere"], "nowhere"),
    "empty index": (["--data.prefix", "{folder}/empty"], "empty.idx"),
    "index without its bin": (["--data.prefix", "{folder}/no_bin"], "no_bin.bin"),
    "index of another bin": (["--data.prefix", "{folder}/torn"], "torn.bin"),
    "missing tokenizer": (["--data.tokenizer", "{folder}/none.model"], "none.model"),
    "tokenizer larger than the vocabulary": (["--model.vocab_size", "128"], "300"),
    "sequence longer than the rotary table": (["--data.sequence_length", "64"], "64"),
    "unknown key": (["--optimizer.learning_rate", "1"], "optimizer.lr"),
    "batch sizes that do not divide": (["--training.micro_batch_size", "3"], "3"),
    "contradicting DeepSpeed file": (["--ds-config", "{folder}/ds.json"], "2.5"),
    "backend that is not there": (["--ops.backend", "cuda"], "cuda"),
    "tensor that does not divide": (["--parallel.tensor", "4"], "model.num_attention_heads = 2"),
    "more stages than layers": (["--parallel.pipeline", "4"], "model.num_layers is 3"),
    "sequence that cannot be cut": (
        ["--parallel.tensor", "2", "--parallel.sequence", "true", "--data.sequence_length", "15"],
        "14 or 16",
    ),
    "too few processes": (["--parallel.tensor", "2"], "the number of processes is 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_one_sentence_and_nothing_written(case: str, folder: Path) -> None:
    flags, named = BAD[case]
    argv = ["--config", f"{folder}/run.yaml", *(flag.format(folder=folder) for flag in flags)]
    [ended] = run_ranks(run_here, 1, "pretrain_iiet.py", *argv)
    assert named in ended.error
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", long_but(["deepspeed", "torchrun"], "deepspeed"))
def test_two_ranks_speak_once(launcher: str, folder: Path) -> None:
    """Under real launchers, for an error found after the ranks have met."""
    program = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [*program, "pretrain_iiet.py", "--config", f"{folder}/run.yaml", "--data.prefix", f"{folder}/torn"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: ") == 1, done.stdout + done.stderr
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_wrong_layout_ends_all_ranks_at_once(folder: Path) -> None:
    """One sentence for all ranks, well before the wait of any collective."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--config", str(folder / "run.yaml"), "--parallel.pipeline", "3"]
    done = subprocess.run(
        [*command, str(ROOT / "pretrain_iiet.py"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(sentences) == 1, done.stderr
    assert "the number of processes is 2" in sentences[0]
    assert "start 3" in sentences[0]
    assert not (folder / "run").exists()
