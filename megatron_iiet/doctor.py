"""What is built and installed here, what is missing and what that costs. Changes nothing, needs no network.

Marks: ok; -- absent or unfit, but training runs; !! training needs it, or it is wrong; exit code 1 if any.
"""

from __future__ import annotations

import argparse
import ctypes.util
import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

from megatron_iiet import installed
from megatron_iiet.installed import version

NEEDED = [
    "jsonargparse",
    "numpy",
    "packaging",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "tqdm",
]
REBUILD = "pip install --no-build-isolation -e ."
DRIVER = Path("/proc/driver/nvidia/version")
Check = dict[str, str]  # mark, subject, finding, need: what its want costs and how to get it


def line(subject: str, finding: str, need: str = "", mark: str = "--", good: bool | None = None) -> Check:
    """Marked ``ok`` and without need if it is good; by default it is if something was found."""
    if finding if good is None else good:
        mark, need = "ok", ""
    return {"mark": mark, "subject": subject, "finding": finding or "not found", "need": need}


def packages(torch: Any, torch_is: str) -> Iterator[Check]:
    """Python, torch, DeepSpeed, and what the installed package requires."""
    python = f"{sys.version.split()[0]}, {sys.executable}"
    yield line("python", python, "3.11 or newer is needed", "!!", sys.version_info >= (3, 11))
    yield line("torch", torch_is, "nothing runs without it; make setup", "!!", bool(torch))
    deepspeed = version("deepspeed") if find_spec("deepspeed") else ""
    yield line("deepspeed", deepspeed, "nothing trains without it; make setup", "!!")
    lack = ", ".join(name for name in NEEDED if not version(name))
    yield line("other packages", lack or "all there", "training needs it; make setup", "!!", not lack)
    yield tested_versions()


def merge_norm(torch: Any, torch_is: str) -> Iterator[Check]:
    """The extension: is it there, for what was it built, does it compute the right numbers."""
    from megatron_iiet.ops import backends

    status, has_gpu = backends.load_extension(), torch.cuda.is_available()
    build, limit = status.build, os.environ.get("ATEN_CPU_CAPABILITY")
    made = "built for torch {torch} with Python {python}".format(**build) if build else "not built"
    bad = "!!" if build.get("torch") == torch.__version__ else "--"  # built for this torch, it must load
    need = "until then merge_norm runs on plain torch, slower"
    yield line("extension", made if status.loaded else status.reason, need, bad, status.loaded)
    used = torch.backends.cpu.get_cpu_capability().lower()
    finding = f"{', '.join(build.get('cpu', ['none built']))}; this CPU runs {used}"
    finding += f", with ATEN_CPU_CAPABILITY={limit}" if limit else ""
    need = "" if not limit else "unset it for all it has" if limit == used else "torch ignores that value"
    yield line("instruction sets", finding, need, good=bool(build) and not limit)
    if build:
        targets = " ".join(build["cuda_targets"])
        finding = f"{targets}, with CUDA {build['cuda']}" if targets else f"none: {build['no_cuda_because']}"
        need = f"slower on GPUs; mend that and {REBUILD}" if has_gpu else "only GPUs need them"
        yield line("CUDA targets", finding, need, good=bool(targets))
        for number in sorted({number for _, number, _ in gpus_of(torch)}) if targets else []:
            major, minor = number.split(".")  # code for 8.0 runs on every 8.x
            fits = "+PTX" in targets or bool(re.search(rf"\b{major}\.([0-{minor}]\b|{minor}[af])", targets))
            finding = f"compute capability {number}, {'' if fits else 'not '}among the targets"
            need = f"no kernel runs on it; TORCH_CUDA_ARCH_LIST={number} {REBUILD}"
            yield line("this GPU", finding, need, good=fits)
    for device in ["cpu", "cuda"] if has_gpu else ["cpu"]:
        name, reason = backends.resolve_backend("auto", device)
        fused, wrong = name == device, name != device and backends.unavailable(device) is None
        finding = f"{name}: {reason}{', self-check passed' if fused else ''}"
        need = f"do not trust its kernels here; {REBUILD} anew" if wrong else ""
        yield line(f"auto on {device}", finding, need, "!!" if wrong else "--", fused)


def gpus(torch: Any, torch_is: str) -> Iterator[Check]:
    """The GPUs that torch can use, or why there are none."""
    release = (
        re.search(r"\b\d{3,}\.\d[\d.]*", DRIVER.read_text(encoding="utf-8")) if DRIVER.exists() else None
    )
    driver = f"NVIDIA driver {release[0]}" if release else "no NVIDIA driver"
    if not torch.cuda.is_available():
        why = f"{driver}; torch {torch_is}; CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        need = f"training takes the CPU{'; does torch fit this driver?' if release else ''}"
        yield line("GPUs", f"none to use: {why}", need, good=False)
        return
    for (name, number, memory), count in Counter(gpus_of(torch)).items():
        yield line("GPUs", f"{count} x {name}, {memory} GiB, compute capability {number}")
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ["missing"]
    yield line("driver, runtime", f"{driver}; torch {torch_is}; NCCL {'.'.join(map(str, nccl))}")
    torch.ones(2, device="cuda").sum().item()  # fails where this torch has no kernels for this GPU


def building(torch: Any, torch_is: str) -> Iterator[Check]:
    """What building the extension takes; training does without."""
    compiler, cuda = os.environ.get("CXX", "g++"), torch.version.cuda if torch else None
    found, gcc = run(compiler, "--version").split("\n")[0], run(compiler, "-dumpfullversion").split(".")[0]
    fits = bool(found) and not (gcc.isdigit() and int(gcc) < 10)
    need = "builds the extension, in C++20; install GCC 10 or newer, or set CXX"
    yield line("C++ compiler", found or f"no {compiler} on PATH", need, good=fits)
    yield program("ninja", "builds the extension; pip install ninja")
    home, on_path = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    where = home or (str(Path(on_path).parents[1]) if on_path else "/usr/local/cuda")  # as torch looks
    nvcc = re.search(r"release (\d+)(\.\d+)", run(f"{where}/bin/nvcc", "--version"))
    finding = f"{nvcc[1]}{nvcc[2]}; torch's CUDA is {cuda or 'none'}" if nvcc else f"not in {where}/bin"
    need = f"builds CUDA kernels only, with a CUDA build of torch and toolkit {cuda or 'of its version'}"
    yield line("nvcc", finding, need, good=bool(nvcc and cuda and cuda.split(".")[0] == nvcc[1]))
    yield line("CUDA_HOME", home or f"not set; {where} is taken", need, good=bool(nvcc))


def optional(torch: Any, torch_is: str) -> Iterator[Check]:
    """What training does without."""
    need = (
        "only optimizer.implementation: apex needs NVIDIA's, built from github.com/NVIDIA/apex; PyPI's is "
        "another project"
    )
    yield line("apex", "found" if find_spec("apex") else "", need)
    yield line("triton", version("triton"), "only ops.backend: triton needs it; pip install triton")
    yield line("tensorboard", version("tensorboard"), "draws the curves of runs; make setup")
    yield program("numactl", "only deepspeed --bind_cores_to_rank needs it; install the system's numactl")
    libaio = ctypes.util.find_library("aio") or ""
    yield line("libaio", libaio, "only NVMe offload needs it, which this version refuses; install libaio-dev")


def launching(torch: Any, torch_is: str) -> Iterator[Check]:
    """How processes find each other, and who starts them."""
    c10d, needed = torch.distributed, "nccl" if torch.cuda.is_available() else "gloo"
    for name, need in ("gloo", "CPUs need it"), ("nccl", "GPUs need it"), ("mpi", "no need, nor of mpi4py"):
        there = c10d.is_available() and getattr(c10d, f"is_{name}_available")()
        finding = "available" if there else "not in this torch"
        yield line(name, finding, need, "!!" if name == needed else "--", there)
    yield program("deepspeed", "starts the processes, as torchrun does; make setup")
    yield program("torchrun", "starts the processes, as deepspeed does; make setup")
    yield program("pdsh", "deepspeed's way to other machines; or its --no_ssh on each, torchrun, srun")
    slurm = ", ".join(filter(None, map(shutil.which, ("srun", "sbatch"))))
    yield line("srun, sbatch", slurm, "no SLURM, or its module is not loaded; see examples/slurm")


def tested_versions() -> Check:
    """Are what pyproject.toml bounds among the versions it names?"""
    bounded, outside = installed.bounds(), installed.outside_bounds()
    found = ", ".join(outside or [f"{name} {version(name)}" for name in bounded if version(name)])
    need = "may run, but was not tried; make setup" if outside else REBUILD
    good = bool(bounded) and not outside
    return line("tested versions", found or "unknown: not installed", need, good=good)


def run(*command: str) -> str:
    """What a program prints; "" if it is not there or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, encoding="utf-8"
        ).stdout.strip()
    return ""


def program(name: str, need: str) -> Check:
    """On PATH, or at least beside this Python?"""
    path, beside = shutil.which(name), Path(sys.executable).with_name(name)
    need = f"but {beside} is there; activate that environment" if beside.exists() else need
    return line(name, path or "not on PATH", need, good=bool(path))


def gpus_of(torch: Any) -> list[tuple[str, str, int]]:
    """Name, compute capability and GiB of every GPU."""
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory >> 30) for gpu in every]


def import_torch() -> tuple[Any, str]:
    """torch and what it is, or None and why."""
    try:
        import torch

        cuda = torch.version.cuda
        return torch, f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}"
    except Exception as error:  # whatever half an installation raises
        return None, shorten(f"does not import: {error!r}", 200)


def render(check: Check) -> str:
    """A line, or several if it is long."""
    text = f"  {check['mark']}  {check['subject']:<18}{check['finding']}; {check['need']}".removesuffix("; ")
    return fill(text, 110, subsequent_indent=" " * 24, break_long_words=False, break_on_hyphens=False)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if there is a ``!!``, else 0."""
    parser = argparse.ArgumentParser("python -m megatron_iiet.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    as_json, (torch, torch_is) = parser.parse_args(arguments).json, import_torch()
    report: dict[str, list[Check]] = {}
    for group in (packages, merge_norm, gpus, building, optional, launching):
        checks = report[group.__name__] = []
        if not as_json:
            print(group.__name__, flush=True)  # what crashes is below its title
        try:
            checks.extend(group(torch, torch_is))  # keeps what came before a failure
        except Exception as error:
            why = shorten(repr(error), 200) if torch else "not examined without torch"
            checks.append(line(group.__name__, why, mark="!!" if torch else "--", good=False))
        if not as_json:
            print(*map(render, checks), sep="\n", flush=True)
    broken = [check["subject"] for checks in report.values() for check in checks if check["mark"] == "!!"]
    auto = "ops.backend {subject} is {finding}".format(**report["merge_norm"][-1]).partition(" (")[0]
    verdict = f"Not ready; see to {', '.join(broken)}." if broken else f"Ready to train; {auto}."
    result = {"ok": not broken, "verdict": verdict, "groups": report}
    print(json.dumps(result, indent=2) if as_json else verdict)
    return 1 if broken else 0


if __name__ == "__main__":
    faulthandler.enable()  # a broken library may end this process
    sys.exit(main())
