"""Training jobs on two nodes of two ranks that are stopped, preempted, cancelled, or lose a node."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

import pytest

from megatron_iiet.storage import checkpoint
from megatron_iiet.training.lock import LOCK
from tests.slurm.cluster import NODES, Job
from tests.slurm.training import SIZE, STEPS, STOPPED_BEFORE, Training

pytestmark = pytest.mark.slurm


def check_went_on(training: Training, job: Job, undisturbed: Training, steps: Iterable[int]) -> None:
    """To its end, from one of ``steps``, as if nothing had been."""
    assert job.wait() == "COMPLETED", training.said
    first, second = training.starts
    assert first is None
    assert second in steps
    assert training.losses == undisturbed.losses
    assert list(training.losses) == list(range(STEPS + 1))
    assert not (training.run / LOCK).exists()


@pytest.mark.parametrize("sent_by", ["scancel", "the time limit"])
def test_usr1(sent_by: str, training: Training, undisturbed: Training) -> None:
    """The run saves, the script puts the job back."""
    job, stopped = training.submit_stopped(2, "--signal=B:USR1@100")
    if sent_by == "scancel":
        training.cluster.call("scancel", "--batch", "--signal=USR1", job.id)
    else:  # in one to two minutes: now is the time for a warning
        hours, minutes, _ = map(int, job.field("RunTime").split(":"))
        training.cluster.call(
            "scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}"
        )
    training.wait_for(f"stopping job {job.id}")
    os.kill(stopped, signal.SIGCONT)
    training.wait_for(f"requeueing job {job.id}, to go on from its checkpoint")
    training.cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.restart()
    check_went_on(training, job, undisturbed, range(STOPPED_BEFORE - 1, STEPS))


@pytest.mark.parametrize("partition", ["low", "grace"])
def test_preemption(partition: str, training: Training, undisturbed: Training) -> None:
    """SLURM sends SIGTERM, and SIGCONT to the stopped rank, and puts the job back; where it grants a time of
    grace, the script does."""
    job, _ = training.submit_stopped(2, f"--partition={partition}")
    other = training.cluster.submit(
        *SIZE, "--partition=high", "--output=/dev/null", "--wrap", "exit 0", cwd=training.folder
    )
    assert other.wait() == "COMPLETED"
    job.restart()
    check_went_on(training, job, undisturbed, range(STOPPED_BEFORE - 1, STEPS))
    by_script = f"requeueing job {job.id}" if partition == "grace" else f"SLURM ends job {job.id}"
    assert by_script in training.said


def test_scancel_is_the_end(training: Training) -> None:
    """With a checkpoint; a job that was cancelled does not come back."""
    job, _ = training.submit_stopped(2)
    training.cluster.call("scancel", job.id)
    assert job.wait() == "CANCELLED"
    training.wait_for(f"SLURM ends job {job.id}")
    assert job.field("Restarts") == "0"
    assert checkpoint.latest_tag(training.run) is not None


@pytest.mark.parametrize(
    ("dead", "in_silence", "by_script"),
    [(NODES[0], True, False), (NODES[1], True, False), (NODES[1], False, True)],
    ids=["of rank 0 and the script", "of other ranks", "of other ranks, telling"],
)
def test_a_node_that_dies(
    dead: str, in_silence: bool, by_script: bool, training: Training, undisturbed: Training
) -> None:
    """The peers of its ranks fail at once. SLURM puts the job back when it misses the node; where it hears
    before that all tasks have ended, the script asks whether all nodes answer. The job goes on when the node
    is there again."""
    first = dead == NODES[0]
    job, stopped = training.submit_stopped(2 if first else 0, interval=2)
    training.cluster.kill_node(dead, in_silence=in_silence)
    os.kill(stopped, signal.SIGCONT)
    training.cluster.wait_until(lambda: job.field("JobState") == "PENDING", f"job {job.id} waits for {dead}")
    training.cluster.settle()
    training.cluster.start_node(dead)
    job.restart()
    check_went_on(training, job, undisturbed, [STOPPED_BEFORE - 1])
    assert ("a node has failed" in training.said) == by_script
    assert (f"it is of an earlier start of SLURM job {job.id}" in training.said) == first


def test_what_fails_by_itself_stays_failed(training: Training) -> None:
    job = training.submit(inject=("raise@step=2,rank=3",))
    assert job.wait() == "FAILED"
    assert "a callback raises before step 2" in training.said
    assert job.field("Restarts") == "0"
