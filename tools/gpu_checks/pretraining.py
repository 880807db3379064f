"""Pretraining as users start it, for checks: a corpus made up here, the command, what its log says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gpu_checks.base import RefusedError, descendants, with_package
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter

ROOT = Path(__file__).resolve().parents[2]


def need_deepspeed() -> None:
    """Raises RefusedError where it is not installed."""
    if find_spec("deepspeed") is None:
        raise RefusedError(
            "DeepSpeed is not installed; pip install deepspeed, or bring it with make gpu-bundle"
        )


def made_up_corpus(prefix: Path, vocab_size: int, tokens: int, length: int = 1024) -> Path:
    """A corpus that can be learned: each token is one of four that follow its two predecessors."""
    rng = np.random.default_rng(0)
    documents = np.empty((max(tokens // length, 16), length), dtype=np.int64)
    documents[:, :2] = rng.integers(1, vocab_size, documents[:, :2].shape)
    branches = rng.integers(0, 4, documents.shape)
    for i in range(2, length):
        mixed = documents[:, i - 1] * 31 + documents[:, i - 2] * 17 + branches[:, i] * 7919
        documents[:, i] = 1 + mixed % (vocab_size - 1)
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        writer.add_documents(documents.reshape(-1), [length] * len(documents))
    return prefix


def made_up_tokenizer(path: Path) -> Path:
    """Of the 256 bytes: the corpus is made of ids, and only the end of a document is asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))
    return path


def command(
    config: Path,
    ds_config: dict[str, Any],
    ranks: int,
    device: str,
    *options: str,
    launcher: bool = False,
) -> list[str]:
    """``deepspeed pretrain_iiet.py …`` as in the README, on ``ranks`` devices and a free port.

    Args:
        launcher: also for one rank, which needs none and starts ten seconds sooner without.
    """
    ds_path = config.with_suffix(".ds.json")
    ds_path.write_text(json.dumps(ds_config), encoding="utf-8")
    entry = ["pretrain_iiet.py", "--config", str(config), "--ds-config", str(ds_path), *options]
    if ranks == 1 and not launcher:
        return [sys.executable, *entry]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = "--num_gpus" if device == "cuda" else "--num_accelerators"
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    return [*runner, count, str(ranks), *entry]


def run(
    folder: Path, arguments: list[str], device: str, seconds: float, *, stop: bool = False
) -> list[dict[str, Any]]:
    """Run it in ROOT; the lines of the run's log.jsonl.

    Args:
        folder: the run's output_dir, and where the command's output goes (``FOLDER.txt``).
        stop: end it by SIGUSR1 when ``seconds`` are over, which is no failure.

    Raises:
        RuntimeError: it failed.
        TimeoutError: it took longer.
    """
    environ = with_package()
    if device == "cpu":
        environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".txt")
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(arguments, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        stopped = stop and child.poll() is None
        if stopped:
            for rank in ranks_of(child.pid):
                os.kill(rank, signal.SIGUSR1)
            child.wait(30)
    finally:
        late = child.poll() is None
        if late:
            child.terminate()  # the launcher, which ends its ranks
            child.wait()
    if late and not stop:
        raise TimeoutError(f"{folder.name} did not end within {seconds:.0f} s: {said(log)}")
    if child.returncode and not stopped:
        raise RuntimeError(f"{folder.name} ended with status {child.returncode}: {said(log)}")
    rows = folder / "log.jsonl"
    return (
        [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    )


def said(log: Path) -> str:
    """The error of a run that failed, else its last line."""
    lines = log.read_text(errors="replace", encoding="utf-8").strip().splitlines() or ["nothing"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])[:500]


def ranks_of(started: int) -> list[int]:
    """Processes that train: those a launcher has started, or this one."""
    below = descendants(started)
    launched = [pid for pid in below if b"--local_rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return launched or [started]
