"""Builds the extension for this GPU from source, reads what its kernels take, and asks the doctor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cuda_check

from gpu_checks.base import Figure, NeedsGpuError, RefusedError, Setting

ROOT = Path(__file__).resolve().parents[2]
TOY_TARGET = "90"


def check(setting: Setting) -> Iterator[Figure]:
    """Registers and spills of every kernel; seconds of the build; the doctor's verdict."""
    if shutil.which("nvcc") is None:
        if setting.device == "cpu":
            raise NeedsGpuError("the build of the CUDA kernels, or at least nvcc to compile them")
        raise RefusedError("there is no nvcc; put a CUDA toolkit's bin folder on PATH")
    if setting.device == "cuda":
        yield from _build()
    yield from _resources(setting)
    yield _doctor()


def _target() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _build() -> Iterator[Figure]:
    target = _target()
    environ = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{target[:-1]}.{target[-1]}", "MEGATRON_IIET_CUDA": "1"}
    start = time.monotonic()
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environ, check=True)
    seconds = time.monotonic() - start
    code = "from megatron_iiet.ops import resolve_backend; print(resolve_backend('auto', 'cuda'))"
    chosen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    print(chosen.stdout, chosen.stderr)
    fused = float(chosen.stdout.startswith("('cuda'"))
    note = (chosen.stdout.strip() or chosen.stderr.strip())[-120:]
    yield Figure("build from source", seconds, "s", f"CPU and CUDA kernels, sm_{target}, in place")
    yield Figure("the CUDA kernels load and are chosen", fused, "", "their self-check", "== 1", note)


def _resources(setting: Setting) -> Iterator[Figure]:
    """Compiled once more by themselves: ``ptxas -v`` tells what each kernel takes."""
    target = _target() if setting.device == "cuda" else TOY_TARGET
    cuda_check.BUILD.mkdir(parents=True, exist_ok=True)
    for storage in cuda_check.STORAGE_TYPES if not setting.toy else cuda_check.STORAGE_TYPES[:1]:
        start = time.monotonic()
        unit = cuda_check.compile_unit(storage, target, None)
        if unit.error:
            raise RuntimeError(f"{storage} does not compile for sm_{target}: {unit.error[-500:]}")
        where = f"{storage}, sm_{target}, {len(unit.kernels)} kernels"
        most, spilled = max(k.registers for k in unit.kernels), sum(k.local_bytes for k in unit.kernels)
        spilling = ", ".join(k.name for k in unit.kernels if k.local_bytes)[:100]
        yield Figure(f"registers of a thread at most ({where})", most, "", "255", "<= 255")
        yield Figure(f"bytes of stack and spills ({where})", spilled, "bytes", "none", "== 0", spilling)
        yield Figure(f"compiling it alone ({where})", time.monotonic() - start, "s")


def _doctor() -> Figure:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_iiet.doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    print(done.stdout, done.stderr)
    wrong = [line for line in done.stdout.splitlines() if line.strip().startswith("!!")]
    note = "; ".join(wrong)[:300]
    return Figure("doctor: what training needs and is not there", len(wrong), note=note)
