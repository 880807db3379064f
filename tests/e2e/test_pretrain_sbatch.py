"""The SLURM job of a training run; srun, squeue and scontrol are scripts that note when they are called. On a
real SLURM: tests/slurm."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import own_mark

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
[[ ${*: -1} == SLURMD_NODENAME ]] && { printf "%s\\n" $ANSWERING; exit; }
trap 'trap "" USR1; sleep 0.3; echo saved >>"$NOTES"; exit "$STATUS"' USR1
echo started >>"$NOTES"
[[ -n $WORDS ]] && echo "$@" >>"$NOTES"
[[ $SENT == none ]] && exit "$STATUS"
while true; do sleep 0.1; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$NOTES"\n'
SQUEUE = '#!/bin/bash\necho "$STATE"\n'
SCRIPT = ROOT / "examples/slurm/pretrain_multinode.sbatch"


def environment_of(folder: Path, **variables: str) -> dict[str, str]:
    """Of a job on two nodes, with stand-ins for SLURM's commands in ``folder``."""
    files = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "venv/bin/activate": ""}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        **own_mark(),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NOTES": str(folder / "notes"),
        "VENV": str(folder / "venv"),
        "CONFIG": "run.yaml",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SENT": "none",
        "STATUS": "0",
        "STATE": "RUNNING None",
        "ANSWERING": "n1 n2",
        "WORDS": "",
        **variables,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "state", "requeued"),
    [
        ("USR1", 75, "RUNNING None", True),
        ("USR1", 75, "COMPLETING TimeLimit", True),  # it took too long to save
        ("USR1", 75, "", True),  # squeue has failed
        ("TERM", 75, "RUNNING None", True),  # a preemption, with a time of grace
        ("TERM", 75, "COMPLETING None", False),  # cancelled; or preempted, and SLURM does it
        ("TERM", 75, "PENDING BeginTime", False),  # SLURM has done it
        ("USR1", 0, "RUNNING None", False),  # it was complete
        ("USR1", 143, "RUNNING None", True),  # the last task to end was killed because of the first
        ("none", 75, "RUNNING None", True),  # the tasks were told by somebody else
    ],
)
def test_a_job_that_was_asked_to_stop_is_requeued(
    sent: str, status: int, state: str, requeued: bool, tmp_path: Path
) -> None:
    """After it has saved, unless SLURM is ending the job."""
    notes = tmp_path / "notes"
    environment = environment_of(tmp_path, SENT=sent, STATUS=str(status), STATE=state)
    job = subprocess.Popen(["bash", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True)
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
    assert ("stopping job 7" in output) == (sent != "none")


@pytest.mark.parametrize("script", ["pretrain_iiet.py", "tools/evaluate.py"])
@pytest.mark.parametrize(("answering", "requeued"), [("n1 n2", False), ("n1 n1", True), ("", True)])
def test_a_job_that_failed_is_requeued_if_a_node_has(
    script: str, answering: str, requeued: bool, tmp_path: Path
) -> None:
    """By itself it would fail again."""
    environment = environment_of(tmp_path, STATUS="1", ANSWERING=answering, SCRIPT=script)
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (tmp_path / "notes").read_text().split() == ["started", *(["requeue", "7"] if requeued else [])]


@pytest.mark.parametrize(
    ("script", "variables", "words"),
    [
        ("", {}, "pretrain_iiet.py --config run.yaml --ds-config examples/ds_configs/zero1.json --x 'y z'"),
        (
            "distill_iiet.py",
            {"TENSOR": "2", "PIPELINE": "3", "SEQUENCE": "false", "DS_CONFIG": "d"},
            "distill_iiet.py --config run.yaml --ds-config d --parallel.sequence false --parallel.tensor 2 "
            "--parallel.pipeline 3 --x 'y z'",
        ),
        ("tools/evaluate.py", {"SEQUENCE": "false", "CONFIG": ""}, "tools/evaluate.py --x 'y z'"),
        (
            "tools/iteration_influence.py",
            {"TENSOR": "2", "SEQUENCE": "true"},
            "tools/iteration_influence.py --parallel.sequence --parallel.tensor 2 --x 'y z'",
        ),
    ],
)
def test_what_is_started(script: str, variables: dict[str, str], words: str, tmp_path: Path) -> None:
    environment = environment_of(tmp_path, WORDS="yes", SCRIPT=script, **variables)
    subprocess.run(["bash", SCRIPT, "--x", "y z"], env=environment, check=True, capture_output=True)
    expected = " ".join(["--kill-on-bad-exit=1 python -u", *shlex.split(words)])
    assert (tmp_path / "notes").read_text().splitlines() == ["started", expected]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SCRIPT": "tools/generate.py"}, "error: SCRIPT is tools/generate.py, not pretrain_iiet.py, "),
        ({"CONFIG": ""}, "CONFIG: is not set: give the YAML"),
        (
            {"SCRIPT": "tools/evaluate.py", "SEQUENCE": "yes"},
            "error: SEQUENCE is yes; tools/evaluate.py takes true or false",
        ),
    ],
)
def test_what_is_refused(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    environment = environment_of(tmp_path, **variables)
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "notes").exists()
