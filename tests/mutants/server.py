"""Runs pytest again and again in one folder, each time in a fork of a process that has imported what is slow.

Reads lines of JSON from standard input: ``{"arguments": [...], "log": PATH, "seconds": N}``, and answers each
with pytest's exit status, or ``null`` if the time was over. Nothing of ours is imported before the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time

SLOW_IMPORTS = ("numpy", "torch", "deepspeed", "hypothesis", "transformers", "safetensors.torch", "lm_eval")


def run_pytest(arguments: list[str], log: str) -> int:
    """pytest's exit status; called in a fork."""
    import pytest

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    return int(pytest.main(arguments))


def wait_for(child: int, seconds: float) -> int | None:
    """Exit status of a child, or None after it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is imported may print
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                os._exit(run_pytest(asked["arguments"], asked["log"]))
            finally:
                os._exit(70)  # pytest itself failed
        print(json.dumps(wait_for(child, asked["seconds"])), file=answers)


if __name__ == "__main__":
    main()
