"""Runs checks one after another in processes of their own, within a budget; keeps the report up to date."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gpu_checks import CHECKS
from gpu_checks.base import FAILED, LATE, OUTCOME, SO_FAR, Outcome, descendants, verdict, versions
from gpu_checks.report import summary, write_report

GRACE = 10.0
"""Seconds a check gets to write down what it has after its time is over."""
ENTRY = Path(__file__).resolve().parents[1] / "gpu_acceptance.py"


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    output: Path
    seconds: float
    only: Sequence[str]
    device: str
    toy: bool
    shard: str | None
    tokenizer: str | None


def run_checks(options: Options) -> int:
    """Run them, write the report after each one, print the summary last; the exit status."""
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": options.device,
        "sizes": "toy: no figure of speed means anything" if options.toy else "full",
        "command": " ".join(sys.argv),
        **versions(),
    }
    outcomes: dict[str, Outcome] = {}
    chosen = [name for name in CHECKS if name in options.only]
    for i, name in enumerate(chosen):
        left = options.seconds - (time.monotonic() - started)
        later = sum(CHECKS[other].seconds for other in chosen[i + 1 :])
        scale = options.seconds / sum(CHECKS[other].seconds for other in chosen)
        share = left - scale * later  # its own, and what the ones before did not use
        print(f"{name}: {CHECKS[name].title} (up to {max(share, 0):.0f} s)", flush=True)
        outcomes[name] = _run(name, options, share) if share > 1 else Outcome(LATE, "no time was left for it")
        print(f"    {outcomes[name].status}  {outcomes[name].reason}"[:200], flush=True)
        write_report(options.output, about, outcomes)
    print(summary(about, outcomes, options.output))
    return 1 if any(outcome.status == FAILED for outcome in outcomes.values()) else 0


def _run(name: str, options: Options, seconds: float) -> Outcome:
    folder = options.output / name
    shutil.rmtree(folder, ignore_errors=True)  # runs in there would be resumed, and say what they said before
    folder.mkdir()
    command = [sys.executable, str(ENTRY), "--check", name, "--output", str(options.output)]
    command += ["--device", options.device, "--seconds", f"{seconds:.0f}"]
    command += ["--toy"] * options.toy
    if options.shard and options.tokenizer:
        command += ["--shard", options.shard, "--tokenizer", options.tokenizer]
    start = time.monotonic()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, cwd=ENTRY.parents[1], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        late = False
        try:
            child.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # With whatever it started, also what a launcher put into sessions of their own.
            for pid in descendants(child.pid) if late else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    took = time.monotonic() - start
    if (folder / OUTCOME).exists():
        return Outcome.from_dict(json.loads((folder / OUTCOME).read_text(encoding="utf-8")))
    known = folder / SO_FAR
    figures = (
        Outcome.from_dict(json.loads(known.read_text(encoding="utf-8"))).figures if known.exists() else []
    )
    if late:
        return verdict(LATE, [f"it did not end within {seconds:.0f} s; see {name}/log.txt"], figures, took)
    printed = (folder / "log.txt").read_text(errors="replace", encoding="utf-8").strip().splitlines()
    last = printed[-1] if printed else "nothing was printed"
    return verdict(FAILED, [f"it ended with status {child.returncode}: {last}"], figures, took)
