"""Runs of tests, each with its job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_iiet.config import config_to_yaml
from megatron_iiet.signals import process
from megatron_iiet.training.metrics import read_log
from tests.slurm.cluster import Cluster, Job
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/slurm/pretrain_multinode.sbatch"
STEPS = 100
"""Of less than a tenth of a second: far more than are trained between two questions whether to stop."""
STOPPED_BEFORE = 5
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")


class Training:
    """A run and its job."""

    def __init__(self, cluster: Cluster, folder: Path, data: dict[str, str]) -> None:
        self.cluster, self.folder, self.run, self._data = cluster, folder, folder / "run", data

    def submit(
        self,
        *options: str,
        inject: tuple[str, ...] = (),
        interval: int = 0,
        arguments: tuple[str, ...] = (),
        **variables: str,
    ) -> Job:
        """Have it trained; ``options``: of sbatch; ``interval``: between checkpoints."""
        sections: dict[str, Any] = {
            "training": {"steps": STEPS},
            "evaluation": {"interval": STEPS // 2},
            "checkpoint": {"interval": interval, "mode": "sync"},
            "debug": {"inject": list(inject)},
        }
        file = self.folder / "run.yaml"
        file.write_text(config_to_yaml(tiny_config(self._data, self.run, **sections)))
        variables = {"CONFIG": str(file), "VENV": sys.prefix, **variables}
        out = f"--output={self.folder / 'out'}"
        return self.cluster.submit(
            *SIZE, "--time=60", out, *options, SCRIPT, *arguments, cwd=ROOT, **variables
        )

    def submit_stopped(self, rank: int, *options: str, interval: int = 0) -> tuple[Job, int]:
        """Have it trained until one rank stops itself (SIGSTOP) before a step, and so all wait; the job, and
        the process of that rank."""
        job = self.submit(*options, inject=(f"stop@step={STOPPED_BEFORE},rank={rank}",), interval=interval)
        self.cluster.wait_until(
            lambda: bool(self._stopped(job, rank)) or job.over,
            f"rank {rank} of job {job.id} has stopped itself",
        )
        found = self._stopped(job, rank)
        assert found, self.said
        return job, found[0]

    def _stopped(self, job: Job, rank: int) -> list[int]:
        tasks = self.cluster.tasks(SLURM_JOB_ID=job.id, SLURM_PROCID=rank)
        return [task for task in tasks if (found := process(task)) is not None and found.state == "T"]

    def wait_for(self, text: str) -> None:
        """Wait until the job has said it."""
        self.cluster.wait_until(lambda: text in self.said, f"the job says {text!r}")

    @property
    def said(self) -> str:
        file = self.folder / "out"
        return file.read_text() if file.exists() else ""

    @property
    def losses(self) -> dict[int, dict[str, str]]:
        """By step, bit by bit."""
        kept = ("loss", "validation_loss", "grad_norm")
        return {
            step: {name: values[name].hex() for name in kept if name in values}
            for step, values in read_log(self.run).items()
        }

    @property
    def starts(self) -> list[int | None]:
        """The steps that they went on from."""
        lines = (self.run / "starts.jsonl").read_text().splitlines()
        return [json.loads(line)["resumed_step"] for line in lines]
