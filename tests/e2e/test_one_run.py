"""A run in its folder, as a user starts it: who else is refused, and how it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iiet.config import config_to_yaml
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import read_log
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_second_start_is_refused_and_a_signal_saves_the_first(tmp_path: Path) -> None:
    config = tiny_config(
        make_data(tmp_path),
        tmp_path / "run",
        training={"steps": 1_000_000},
        logging={"interval": 1, "tensorboard": False, "solver_interval": 0},
    )
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    start = [sys.executable, "-u", str(ROOT / "pretrain_iiet.py"), "--config", str(tmp_path / "run.yaml")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(start, env=environ, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if line.startswith("step      3/"))
        second = subprocess.run(start, env=environ, capture_output=True, text=True)
        assert second.returncode == 2
        assert f"where another run writes, process {first.pid} on " in second.stderr
        first.send_signal(signal.SIGTERM)
        rest = first.stdout.read()
    assert first.returncode == 75
    taken = max(read_log(tmp_path / "run"))
    assert f"step {taken:>6} | stopping on SIGTERM; the same command goes on from here\n" in rest
    assert checkpoint.latest_tag(tmp_path / "run") == checkpoint.tag_of(taken)
    assert not (tmp_path / "run/run.lock").exists()
