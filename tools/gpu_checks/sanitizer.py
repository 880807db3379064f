"""The kernels under compute-sanitizer: accesses out of bounds, and threads that race for shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_checks.base import Figure, NeedsGpuError, RefusedError, Setting

TOOLS = Path(__file__).resolve().parents[1]
CALLS = """
import random, sys, torch
sys.path[:0] = [{root!r}, {tools!r}]
from gpu_checks.kernels import draw_call, results, transposed
from megatron_iiet.ops.backends import get_backend
rng, generator = random.Random(0), torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for _ in range(6):
        call = draw_call(rng, generator, dtype, "cuda")
        results(call, "cuda")
        if len(call.increments) > 2:
            transposed(get_backend("cuda"), call)
torch.cuda.synchronize()
print("all calls ran")
"""


def errors_in(output: str) -> int | None:
    """What the tool counted; None if it did not get that far."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return sum(int(a or b) for a, b in counts) if counts else None


def check(setting: Setting) -> Iterator[Figure]:
    """memcheck and racecheck over a dozen calls."""
    if setting.device == "cpu":
        raise NeedsGpuError("memcheck and racecheck of the CUDA kernels (make cuda-check has an emulator's)")
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RefusedError("there is no compute-sanitizer; it comes with a CUDA toolkit")
    code = CALLS.format(root=str(TOOLS.parent), tools=str(TOOLS))
    for tool in ("memcheck", "racecheck"):
        seconds = max(setting.left - 2, 1)
        try:
            done = subprocess.run([program, "--tool", tool, sys.executable, "-c", code], timeout=seconds,
                                  capture_output=True, text=True, encoding="utf-8")  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{tool} did not end within {seconds:.0f} s") from None
        output = done.stdout + done.stderr
        print(output)
        if "Device not supported" in output or "all calls ran" not in output:
            said = next((line for line in output.splitlines() if "rror" in line), output[-200:])
            raise RefusedError(f"{tool} could not run the calls here: {said.strip()}")
        counted = errors_in(output)
        yield Figure(f"{tool}: errors", counted, "", "12 calls, forward and backward", "== 0")
