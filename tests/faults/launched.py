"""Faults of runs under real launchers, for the matrix: signals, and ranks that stand still."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_iiet.config import config_to_yaml
from megatron_iiet.signals import REQUEUE
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import free_port
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
Tally = tuple[int, int]
"""As it must be, of how many."""

MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "start-up": ("", {}),
    "train": (r"step +3/", {}),
    "validation": (r"step +2 \| validation", {"evaluation": {"interval": 1, "samples": 64}}),
    "save": ("requested", {"debug": {"inject": ["slow_disk@seconds=1.5"]}}),
    "commit": ("durable", {"checkpoint": {"interval": 1}}),
    "last step": (r"step +11/", {}),
}
"""The line after which a signal is sent (none: once all ranks are there), and what the run is like."""
STEPS = 12
_PATIENCE_SECONDS = 240.0
_ORPHAN_SECONDS = 10.0


def command(launcher: str, file: Path, ranks: int) -> list[str]:
    """What starts a run."""
    script = [str(ROOT / "pretrain_iiet.py"), "--config", str(file)]
    port = str(free_port())
    if launcher == "deepspeed":
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        return [deepspeed, "--num_accelerators", str(ranks), "--master_port", port, *script]
    if launcher == "torchrun":
        number = ["--nproc-per-node", str(ranks), "--master-port", port]
        return [sys.executable, "-m", "torch.distributed.run", *number, *script]
    return [sys.executable, *script]


@contextmanager
def launched(launcher: str, file: Path, ranks: int) -> Iterator[subprocess.Popen[str]]:
    """A run with all of its output in one pipe; nothing of it is left afterwards."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        command(launcher, file, ranks),
        env=environ,
        cwd=file.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        yield run
    finally:
        for process in processes_of(file):
            with suppress(psutil.Error):
                process.kill()
        run.kill()
        run.wait()


def processes_of(file: Path, rank: int | None = None) -> list[psutil.Process]:
    """The processes that a configuration was given to; of ``rank`` alone."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or str(file) not in process.cmdline():
                continue
            of = process.environ().get("RANK")
            if rank is None or of == str(rank) or (of is None and rank == 0):
                found.append((process.create_time(), process))  # ids begin again at some time
    return [process for _, process in sorted(found, key=lambda one: one[0])]


def rank_process(run: subprocess.Popen[str], file: Path, rank: int, ranks: int) -> psutil.Process:
    """That of a rank, once all are there and heed SIGUSR1: Python itself takes a moment to be there."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until and run.poll() is None:
        there = [next(filter(_is_rank, processes_of(file, r)), None) for r in range(ranks)]
        if (found := there[rank]) is not None and None not in there:
            return found
        time.sleep(0.2)
    for process in processes_of(file):
        with suppress(psutil.Error):
            process.kill()
    raise AssertionError(f"the ranks did not start: {run.communicate()[0][-2000:]}")


def _is_rank(process: psutil.Process) -> bool:
    """Whether it is no launcher, and has a handler of SIGUSR1."""
    try:
        words = process.cmdline()[:4]
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (OSError, psutil.Error):
        return False
    if not any(word.endswith("pretrain_iiet.py") for word in words) or any("deepspeed" in w for w in words):
        return False
    caught = int(re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[0], 16)
    return bool(caught >> signal.SIGUSR1 - 1 & 1)


def read_until(stream: IO[str], pattern: str) -> str:
    """The output up to a line."""
    read = ""
    for line in stream:
        read += line
        if re.search(pattern, line):
            break
    return read


def signals(folder: Path) -> Tally:
    """A signal at every moment, to every process; the run must save, end, and leave nobody."""
    data, good, number = make_data(folder), 0, 0
    cases = [("none", "rank 0"), *((one, to) for one in ("torchrun", "deepspeed") for to in _TARGETS)]
    for moment in MOMENTS:
        for launcher, target in cases:
            name = ("USR1", "TERM")[number % 2]
            number += 1
            try:
                told = _signalled(folder / f"signal_{number}", data, moment, launcher, target, name)
            except AssertionError as error:
                told = str(error)
            good += not told
            if told:
                print(f"  signals: SIG{name} in {moment} to {target} of {launcher}: {told}", flush=True)
    return good, number


_TARGETS = ("rank 0", "rank 1", "the launcher")


def _signalled(folder: Path, data: dict[str, str], moment: str, launcher: str, target: str, name: str) -> str:
    """What was wrong; "" if nothing."""
    pattern, sections = MOMENTS[moment]
    ranks = 1 if launcher == "none" else 2
    folder.mkdir()
    run, file = folder / "run", folder / "run.yaml"
    training = {"steps": STEPS if moment == "last step" else 1_000_000}
    logging = {"interval": 1, "tensorboard": False, "solver_interval": 0}
    sections = {"checkpoint": {"interval": 4}, "training": training, "logging": logging} | sections
    file.write_text(config_to_yaml(tiny_config(data, run, **sections)))
    with launched(launcher, file, ranks) as process:
        assert process.stdout is not None
        victim = rank_process(process, file, 0 if target == "the launcher" else int(target[-1]), ranks).pid
        said = read_until(process.stdout, pattern) if pattern else ""
        os.kill(process.pid if target == "the launcher" else victim, getattr(signal, f"SIG{name}"))
        try:
            said += process.communicate(timeout=_PATIENCE_SECONDS)[0]
        except subprocess.TimeoutExpired:
            return "did not end"
        time.sleep(_ORPHAN_SECONDS)
        if left := processes_of(file):
            return f"{len(left)} processes are left"
    if (run / "run.lock").exists():
        return "its lock is left"
    # Launchers end with statuses of their own.
    expected = (0, REQUEUE) if moment == "last step" else (REQUEUE,)
    if launcher == "none" and process.returncode not in expected:
        return f"exit status {process.returncode}: {said[-300:]}"
    steps = read_log(run) if (run / "log.jsonl").exists() else {}
    if not steps:
        return "" if moment == "start-up" else "nothing is logged"
    taken = max(steps)
    saved = checkpoint.latest_tag(run)
    return "" if saved == checkpoint.tag_of(taken) else f"took {taken} steps, saved {saved}: {said[-300:]}"


def hangs(folder: Path) -> Tally:
    """A rank that is stopped by SIGSTOP under every launcher, by a bound that is given and by the learned
    one: it must be named, with the stacks of the others on disk, within three bounds."""
    data, good, number = make_data(folder), 0, 0
    cases = [(launcher, rank, 10.0) for launcher in ("torchrun", "deepspeed") for rank in (0, 1)]
    for launcher, rank, bound in [*cases, ("torchrun", 1, None)]:
        number += 1
        told = _stopped(folder / f"hang_{number}", data, launcher, rank, bound)
        good += not told
        if told:
            print(f"  hangs: rank {rank} of {launcher}, bound {bound}: {told}", flush=True)
    return good, number


def _stopped(folder: Path, data: dict[str, str], launcher: str, rank: int, given: float | None) -> str:
    folder.mkdir()
    run, file = folder / "run", folder / "run.yaml"
    config = tiny_config(
        data,
        run,
        training={"steps": 1_000_000},
        checkpoint={"interval": 0},
        logging={"interval": 1, "tensorboard": False, "solver_interval": 0},
        parallel={"timeouts": {} if given is None else {"step": given}},
    )
    file.write_text(config_to_yaml(config))
    with launched(launcher, file, 2) as process:
        assert process.stdout is not None
        victim = rank_process(process, file, rank, 2)
        read_until(process.stdout, r"step +5/")
        victim.suspend()
        began = time.monotonic()
        said = process.communicate(timeout=600)[0]
        seconds, left = time.monotonic() - began, processes_of(file)
    named = re.search(
        rf"rank {rank} \(process {victim.pid} on \S+\) gave no sign of life for \d+ s.*bound is (\S+) s", said
    )
    if not named:
        return f"not named: {said[-500:]}"
    print(f"  hangs: rank {rank} of {launcher}: {seconds:.1f} s, bound {named[1]} s", flush=True)
    if seconds > 3 * float(named[1]):
        return f"after {seconds:.0f} s, bound {named[1]}"
    if process.returncode == 0:
        return "exit status 0"
    if [path.name for path in run.glob("hangs/*/*")] != [f"rank_{1 - rank:05d}.txt"]:
        return "no stacks on disk"
    return f"{len(left)} processes are left" if left else ""
