"""The SLURM job of a training run; srun and scontrol are scripts that note when they are called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.processes import own_mark

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
trap 'sleep 1; echo saved >>"$NOTES"; exit 0' USR1
echo started >>"$NOTES"
while true; do sleep 0.1; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$NOTES"\n'


def test_before_the_time_limit_training_saves_and_then_the_job_is_requeued(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "venv/bin/activate": ""}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        **own_mark(),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "VENV": str(tmp_path / "venv"),
        "CONFIG": "run.yaml",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    script = ROOT / "examples/slurm/pretrain_multinode.sbatch"
    job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 30
        while not notes.exists() and time.time() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert notes.read_text().split("\n") == ["started", "saved", "requeue 7", ""]
    assert "time limit ahead: stopping training and requeueing job 7" in output
