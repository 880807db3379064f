"""The optional Triton kernels: their cases in the interpreter, and ahead-of-time compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_iiet.installed import version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
ROOT = Path(__file__).parents[2]


def python(*arguments: str, cache: Path) -> str:
    """What a Python process prints. Other test files have imported triton here, and not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(
    version("triton").startswith("3.6."),
    reason="Triton 3.6's interpreter makes scalars of arrays with one number, which NumPy 2.4 refuses",
)
def test_cases(tmp_path: Path) -> None:
    python("-m", "pytest", "-p", "no:cacheprovider", "tests/ops/triton_cases.py", cache=tmp_path)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_iiet.ops import triton_kernels as kernels

h = 4096
shape = kernels._shape(h)
constants = {"h": h, "BLOCK": shape["BLOCK"], "TENSORS": 128, "ROWS": 32}
types = {"table": "*i64", "coefficients": "*fp32", "rstd": "*fp32", "total": "*fp32", "eps": "fp32"}


def type_of(parameter):
    name = parameter.name
    if name in types or "partials" in name:
        return types.get(name, "*fp32")
    if parameter.do_not_specialize:
        return "i32"
    return "u1" if name.startswith(("has_", "store_")) else "*bf16"


for kernel in (
    kernels._merge_norm_kernel, kernels._backward_kernel, kernels._transposed_kernel, kernels._sum_kernel
):
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(p) for p in kernel.params}
    values = {p.name: constants.get(p.name, True) for p in kernel.params if p.is_constexpr}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(kernel.params)
        if signature[p.name].startswith("*") and not p.do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, signature, values, aligned)
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        compiled = compile(source, target=target, options={"num_warps": shape["num_warps"]})
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        wide = "_load_dwordx4" in text or "ld.global.v4" in text
        narrow = any(name in text for name in ("_load_ushort", "ld.global.b16"))
        print(kernel.__name__, target.arch, "cubin" in compiled.asm or "hsaco" in compiled.asm, wide, narrow)
"""


def test_compiles_ahead_of_time_for_nvidia_and_amd(tmp_path: Path) -> None:
    """For GPUs that are not here; rows are read 16 bytes at a time."""
    lines = python("-c", COMPILE, cache=tmp_path).splitlines()
    for line in lines:
        kernel, _, *rest = line.split()
        assert rest == ["True", str(kernel != "_sum_kernel"), "False"], line
    assert len(lines) == 12
