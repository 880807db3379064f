"""Check the CUDA side of the extension without a GPU: ``make cuda-check``.

* every kernel compiles for every target, and none spills registers or uses local memory;
* the kernels for aligned tensors read and write the history 16 bytes at a time, in the machine code;
* the torch binding compiles against the installed torch, whose CPU build has the headers too;
* the emulator's self-tests pass, with sanitizers as well, and notice the bugs that are injected.

Without nvcc it says what it could not check and succeeds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda-check"
TOOLS = ROOT / "build" / "cuda-tools"
TARGETS = ("80", "90", "100", "120")
STORAGE_TYPES = ("f32", "bf16", "f16")
DISASSEMBLER = "nvidia-cuda-nvdisasm"
# Coefficients, rstd and sums are single floats; a row of the history must not be.
MOST_FLOAT_ACCESSES = 4


@dataclass
class Kernel:
    """One instantiated kernel for one target."""

    name: str
    registers: int
    local_bytes: int
    """Stack and spills."""
    accesses: Counter[str] = field(default_factory=Counter)
    """Global loads and stores by instruction, e.g. LDG.E.128.CONSTANT; empty if not disassembled."""

    @property
    def problem(self) -> str | None:
        if self.local_bytes:
            return f"spills or uses local memory ({self.local_bytes} bytes)"
        if not self.accesses or "Access)0" not in self.name:  # narrow kernels serve what is not aligned
            return None
        wide = {k: v for k, v in self.accesses.items() if ".128" in k}
        other = {k: v for k, v in self.accesses.items() if ".128" not in k}
        halves = [k for k in other if re.search(r"\.(U8|S8|U16|S16|64)\b", k)]
        if halves or any(v > MOST_FLOAT_ACCESSES for v in other.values()):
            return f"accesses that are not 16 bytes wide: {other}"
        if not any(k.startswith("LDG") for k in wide) or not any(k.startswith("STG") for k in wide):
            return "no 16-byte loads or stores"
        return None


@dataclass
class Unit:
    """The kernels of one storage type for one target."""

    storage: str
    target: str
    kernels: list[Kernel] = field(default_factory=list)
    error: str = ""

    def problems(self) -> list[str]:
        where = f"{self.storage} sm_{self.target}"
        if self.error:
            return [f"{where} does not compile:\n{self.error}"]
        return [f"{where} {k.name}: {k.problem}" for k in self.kernels if k.problem]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="compute capabilities without the dot")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the binding and the emulator")
    return parser.parse_args()


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, check=False, encoding="utf-8"
    )


def disassembler() -> Path | None:
    """``nvdisasm`` of the toolkit, or from the package index into build/; None if it can't be had."""
    installed = shutil.which("nvdisasm")
    if installed:
        return Path(installed)
    if not list(TOOLS.rglob("nvdisasm")):
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", TOOLS, DISASSEMBLER)
    return next((path for path in TOOLS.rglob("nvdisasm") if path.is_file()), None)


def compile_unit(storage: str, target: str, nvdisasm: Path | None) -> Unit:
    unit = Unit(storage, target)
    binary = BUILD / f"{storage}_{target}.cubin"
    source = CSRC / "cuda" / f"instantiate_{storage}.cu"
    options = ("-std=c++17", "-O3", f"-arch=sm_{target}", f"-I{CSRC / 'include'}", "-Xptxas=-v")
    compiled = run("nvcc", "-cubin", *options, source, "-o", binary)
    if compiled.returncode != 0:
        unit.error = compiled.stderr
        return unit
    unit.kernels = parse_resources(demangled(compiled.stderr))
    if nvdisasm is not None:
        accesses = count_accesses(run(nvdisasm, "-c", binary).stdout)
        for kernel in unit.kernels:
            kernel.accesses = accesses[kernel.name]
    return unit


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


def short_name(demangled_name: str) -> str:
    """``forward_kernel<bf16, 8, 1, (Access)0>``."""
    name = demangled_name.removeprefix("void ").replace("merge_norm::", "")
    return re.sub(r"\(\w+Params.*\)$", "", name)


def parse_resources(log: str) -> list[Kernel]:
    """What ``ptxas -v`` says about every kernel."""
    kernels: list[Kernel] = []
    name, local_bytes = "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(.*)' for", line):
            name = short_name(match[1])
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            local_bytes = sum(int(n) for n in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernels.append(Kernel(name, int(match[1]), local_bytes))
    return kernels


def count_accesses(machine_code: str) -> dict[str, Counter[str]]:
    """Global loads and stores of every kernel."""
    result: dict[str, Counter[str]] = {}
    name = ""
    for line in machine_code.splitlines():
        if match := re.match(r"\.text\.(.*):$", line):
            name = short_name(demangled(match[1]).strip())
            result[name] = Counter()
        elif name and (match := re.search(r"\s((?:LDG|STG)\.\S+)\s", line)):
            result[name][match[1]] += 1
    return result


def check_binding() -> list[str]:
    """Compile, not link: the CPU build of torch has c10's CUDA headers, but not the library."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    include = Path(torch.origin).parent / "include"
    paths = [f"-I{path}" for path in (include, include / "torch/csrc/api/include", CSRC / "include")]
    options = ("-std=c++20", "-O0", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *paths)
    source = CSRC / "cuda" / "torch_cuda.cpp"
    compiled = run("nvcc", "-c", *options, source, "-o", BUILD / "torch_cuda.o")
    return [] if compiled.returncode == 0 else [f"torch_cuda.cpp does not compile:\n{compiled.stderr}"]


def check_emulator() -> list[str]:
    done = run(sys.executable, "-m", "pytest", "tests/ops/test_ops_emulator.py", "-k", "selftest")
    return [] if done.returncode == 0 else [f"the emulator's self-tests fail:\n{done.stdout}"]


def print_kernels(units: list[Unit]) -> None:
    print(f"{'type':6}{'target':8}{'kernels':>8}{'most registers':>16}{'local bytes':>13}  16-byte accesses")
    for unit in units:
        if unit.error:
            continue
        registers = max(k.registers for k in unit.kernels)
        local_bytes = sum(k.local_bytes for k in unit.kernels)
        wide = sum(n for k in unit.kernels for access, n in k.accesses.items() if ".128" in access)
        print(
            f"{unit.storage:6}sm_{unit.target:5}{len(unit.kernels):8}{registers:16}{local_bytes:13}"
            f"  {wide or 'not disassembled'}"
        )


def main() -> int:
    arguments = parse_arguments()
    if shutil.which("nvcc") is None:
        print("cuda-check: skipped, there is no nvcc: kernels, registers, machine code and the torch binding")
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    nvdisasm = disassembler()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        compilations = [
            pool.submit(compile_unit, storage, target, nvdisasm)
            for storage in STORAGE_TYPES
            for target in arguments.targets
        ]
        units = [c.result() for c in compilations]
    print_kernels(units)
    problems = [problem for unit in units for problem in unit.problems()]
    skipped = [] if nvdisasm else [f"machine code ({DISASSEMBLER} could not be installed)"]
    if not arguments.kernels_only:
        for what, check in (("torch binding", check_binding), ("emulator self-tests", check_emulator)):
            found = check()
            print(f"{what}: {'FAILED' if found else 'ok'}")
            problems += found
    for problem in problems:
        print(problem)
    verdict = f"FAILED, {len(problems)} problems" if problems else "ok"
    print(f"cuda-check: {verdict}, {len(skipped)} checks skipped{''.join(f': {s}' for s in skipped)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
