"""What is freed stays with the process, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from megatron_iiet.training.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

asked = {asks}
told = keep_freed_memory() if asked else None
for _ in range(3):  # 64 MB, in a block of its own and in many
    torch.ones(1 << 24)
    [torch.ones(1 << 18) for _ in range(64)]
before = faults()
for _ in range(4):
    torch.ones(1 << 24)
    [torch.ones(1 << 18) for _ in range(64)]
print(told, faults() - before)
"""


def run(asks: bool, **environment: str) -> tuple[str, int]:
    """What the function said, and the page faults of four rounds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(asks=asks)],
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.slow
def test_memory_is_taken_again() -> None:
    told, faults = run(asks=True)
    assert told == "True"
    assert faults < 1000 < 10_000 < run(asks=False)[1]


@pytest.mark.slow
def test_a_users_settings_stay() -> None:
    told, faults = run(asks=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert told == "False"
    assert faults > 10_000
