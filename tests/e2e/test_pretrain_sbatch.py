"""The SLURM job of a training run; srun and scontrol are scripts that note when they are called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import own_mark

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
trap 'sleep 1; echo saved >>"$NOTES"; exit "$STATUS"' USR1
echo started >>"$NOTES"
[[ $SENT == none ]] && exit "$STATUS"
while true; do sleep 0.1; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$NOTES"\n'


@pytest.mark.parametrize(
    ("sent", "status", "requeued"),
    [
        ("USR1", 75, True),
        ("TERM", 75, True),  # a preemption
        ("USR1", 0, False),  # it was complete
        ("USR1", 143, True),  # the last task to end was killed because of the first
        ("none", 75, True),  # the tasks were told by somebody else
        ("none", 1, False),
    ],
)
def test_a_job_that_was_asked_to_stop_is_requeued(
    sent: str, status: int, requeued: bool, tmp_path: Path
) -> None:
    """After it has saved. One that failed is not: it would fail again."""
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
        "SENT": sent,
        "STATUS": str(status),
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
        if sent != "none":
            job.send_signal(signal.Signals[f"SIG{sent}"])
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    saved = [] if sent == "none" else ["saved"]
    assert notes.read_text().split() == ["started", *saved, *(["requeue", "7"] if requeued else [])]
    assert job.returncode == status
    assert ("stopping training and requeueing job 7" in output) == (sent != "none")
