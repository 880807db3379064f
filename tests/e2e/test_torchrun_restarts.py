"""torchrun starts the ranks again after one is killed, and they go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iiet.config import config_to_yaml
from megatron_iiet.training.metrics import read_log
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_killed_ranks_are_restarted_and_go_on(tmp_path: Path) -> None:
    """The agent's store, in which they meet again, has what the first start left there."""
    config = tiny_config(
        make_data(tmp_path),
        tmp_path / "run",
        training={"steps": 6},
        checkpoint={"interval": 2, "mode": "sync"},
        debug={"inject": ["kill@step=4,rank=1"]},  # type: ignore[dict-item]
    )
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", "pretrain_iiet.py", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(read_log(tmp_path / "run")) == list(range(7))
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["resumed_step"] for start in starts] == [None, 2]
