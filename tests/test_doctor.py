"""``python -m megatron_iiet.doctor`` on this machine and on simulated ones."""

# ruff: noqa: E501  (a line of the report is easier to compare on one line)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_iiet import doctor, installed
from megatron_iiet.ops import backends
from megatron_iiet.ops.extension import ExtensionStatus, load_extension

ROOT = Path(__file__).parents[1]
BUILD: dict[str, Any] = {
    "torch": torch.__version__,
    "python": "3.11.7",
    "cpu": ["default", "avx2"],
    "cuda": None,
    "cuda_targets": [],
    "no_cuda_because": "no nvcc",
}
CUDA_BUILD = BUILD | {"cuda": "13.0", "cuda_targets": ["8.0", "9.0"]}


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("CXX", raising=False)


def use_extension(monkeypatch: pytest.MonkeyPatch, status: ExtensionStatus, wrong: str | None = None) -> None:
    """Simulate an extension and what its self-check says."""
    load_extension()  # whatever runs first: its operators are looked up
    monkeypatch.setattr(backends, "load_extension", lambda: status)
    monkeypatch.setattr(backends, "self_check", lambda name, kind: None if name == "reference" else wrong)


def use_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """Simulate two GPUs, on which nothing computes."""
    gpu = SimpleNamespace(name="Fake GPU", major=major, minor=minor, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))


def diagnose(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, lines by subject, verdict."""
    capsys.readouterr()
    code = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    lines = [check for checks in report["groups"].values() for check in checks]
    assert report["ok"] == (code == 0) == all(check["mark"] != "!!" for check in lines)
    return code, {check["subject"]: check for check in lines}, report["verdict"]


@pytest.mark.slow
def test_here_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "megatron_iiet.doctor"]
    here = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert here.returncode == 0, here.stdout
    assert "| megatron_iiet" in here.stderr
    assert " deepspeed\n" not in here.stderr, "its import takes seconds"
    lines, words = here.stdout.splitlines(), " ".join(here.stdout.split())
    assert f"this CPU runs {torch.backends.cpu.get_cpu_capability().lower()}" in words

    code = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["ok"], report["verdict"]) == (0, True, lines[-1])
    assert report["verdict"].startswith("Ready to train; ops.backend auto on c")
    for title, checks in report["groups"].items():
        assert title in lines
        for check in checks:
            line = f"{check['mark']} {check['subject']} {check['finding']} {check['need']}"
            assert " ".join(line.replace(";", "").split()) in words.replace(";", "")
    assert {"extension", "instruction sets", "auto on cpu"} <= {
        check["subject"] for check in report["groups"]["merge_norm"]
    }


def test_a_torch_that_does_not_import_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    found = subprocess.run(
        [sys.executable, "-m", "megatron_iiet.doctor"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stderr
    assert "!!  torch             does not import: OSError('libcudart.so.13: cannot open')" in found.stdout
    assert "--  merge_norm        not examined without torch" in found.stdout
    assert "C++ compiler" in found.stdout
    assert found.stdout.splitlines()[-1] == "Not ready; see to torch."


def test_a_torch_that_ends_the_process_says_where(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos.abort()\n")
    found = subprocess.run(
        [sys.executable, "-m", "megatron_iiet.doctor"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode < 0
    assert "Fatal Python error: Aborted" in found.stderr
    assert f'File "{tmp_path}/torch.py", line 2 in <module>' in found.stderr


def test_a_good_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", BUILD))
    code, lines, verdict = diagnose(capsys)
    assert code == 0
    assert lines["extension"]["finding"] == f"built for torch {torch.__version__} with Python 3.11.7"
    assert lines["instruction sets"]["finding"].startswith("default, avx2; this CPU runs ")
    assert lines["CUDA targets"]["finding"] == "none: no nvcc"
    assert lines["auto on cpu"]["finding"].endswith("self-check passed")
    assert verdict.startswith("Ready to train; ops.backend auto on cpu is cpu: compiled extension")


@pytest.mark.parametrize(
    "status",
    [
        ExtensionStatus(False, "the extension is not built (this builds it)"),
        ExtensionStatus(False, "the extension was built for torch 2.0", BUILD | {"torch": "2.0"}),
    ],
    ids=["missing", "of another torch"],
)
def test_without_a_fitting_extension_training_runs_on_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: ExtensionStatus
) -> None:
    use_extension(monkeypatch, status)
    code, lines, verdict = diagnose(capsys)
    assert code == 0
    assert lines["extension"]["mark"] == "--"
    assert lines["extension"]["finding"] == status.reason
    assert "slower" in lines["extension"]["need"]
    assert lines["auto on cpu"]["mark"] == "--"
    reason = status.reason.partition(" (")[0]
    assert verdict == f"Ready to train; ops.backend auto on cpu is reference: plain torch; {reason}."


def test_an_extension_for_this_torch_must_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_extension(monkeypatch, ExtensionStatus(False, "it does not load: undefined symbol", BUILD))
    code, lines, verdict = diagnose(capsys)
    assert (code, lines["extension"]["mark"]) == (1, "!!")
    assert verdict == "Not ready; see to extension."


def test_a_failing_self_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "it is 3.0e-01 away from plain torch on this device"
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", BUILD), wrong)
    code, lines, verdict = diagnose(capsys)
    assert code == 1
    assert lines["auto on cpu"]["mark"] == "!!"
    assert wrong in lines["auto on cpu"]["finding"]
    assert "do not trust its kernels" in lines["auto on cpu"]["need"]
    assert verdict == "Not ready; see to auto on cpu."


def test_a_check_that_raises_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> ExtensionStatus:
        raise KeyError("torch")

    monkeypatch.setattr(backends, "load_extension", load)
    code, lines, _ = diagnose(capsys)
    assert code == 1
    assert lines["merge_norm"]["finding"] == "KeyError('torch')"
    assert lines["gloo"]["mark"] == "ok"


@pytest.mark.parametrize(
    ("targets", "gpu", "fits"),
    [
        ("8.0;9.0", (7, 5), False),
        ("8.0;9.0", (8, 0), True),
        ("8.0;9.0", (8, 6), True),
        ("8.6;9.0", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("12.0", (2, 0), False),
        ("9.0+PTX", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
    ],
)
def test_gpus_and_the_targets(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    targets: str,
    gpu: tuple[int, int],
    fits: bool,
) -> None:
    build = CUDA_BUILD | {"cuda_targets": targets.split(";")}
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", build))
    use_gpu(monkeypatch, *gpu)
    _, lines, _ = diagnose(capsys)
    number = f"{gpu[0]}.{gpu[1]}"
    assert lines["this GPU"]["mark"] == ("ok" if fits else "--")
    assert number in lines["this GPU"]["finding"]
    if not fits:
        assert f"TORCH_CUDA_ARCH_LIST={number} pip install" in lines["this GPU"]["need"]


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "its self-check on this device failed: no kernel image is available"
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", CUDA_BUILD), wrong)
    use_gpu(monkeypatch, 7, 5)
    code, lines, verdict = diagnose(capsys)
    assert code == 1
    assert lines["this GPU"]["finding"] == "compute capability 7.5, not among the targets"
    assert lines["auto on cuda"]["mark"] == "!!"
    assert lines["GPUs"]["finding"] == "2 x Fake GPU, 80 GiB, compute capability 7.5"
    assert lines["driver, runtime"]["mark"] == "ok"
    assert lines["gpus"]["mark"] == "!!", "nothing computes on this GPU"
    assert "auto on cuda" in verdict


def test_a_gpu_and_an_extension_without_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", BUILD))
    use_gpu(monkeypatch, 9, 0)
    _, lines, _ = diagnose(capsys)
    assert lines["auto on cuda"]["mark"] == "--"
    assert lines["auto on cuda"]["finding"].startswith("reference: plain torch; ")
    assert "slower" in lines["CUDA targets"]["need"]


def test_a_driver_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, lines, _ = diagnose(capsys)
    assert "NVIDIA driver 570.86.15" in lines["GPUs"]["finding"]
    assert "CUDA_VISIBLE_DEVICES=''" in lines["GPUs"]["finding"]
    assert "does torch fit this driver?" in lines["GPUs"]["need"]


def test_no_build_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", BUILD))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    code, lines, _ = diagnose(capsys)
    assert code == 0, "training needs none of them"
    assert lines["C++ compiler"]["mark"] == "--"
    assert lines["C++ compiler"]["finding"] == "no g++ on PATH"
    assert lines["nvcc"]["finding"] == f"not in {tmp_path}/bin"
    assert {lines[name]["mark"] for name in ("ninja", "torchrun", "pdsh", "numactl")} == {"--"}


def test_an_old_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 'g++ (GCC) 8.5.0 20210514 (Red Hat)' || echo 8.5.0\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    _, lines, _ = diagnose(capsys)
    assert lines["C++ compiler"]["mark"] == "--"
    assert "8.5.0" in lines["C++ compiler"]["finding"]
    assert "GCC 10" in lines["C++ compiler"]["need"]


def test_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", BUILD))
    found = {"megatron-iiet": "0.1.0", "deepspeed": "0.1", "torch": "2.13.0+cu130", "transformers": "5.24.0"}
    asked = [
        "torch<2.15,>=2.11",
        "deepspeed==0.19.8",
        "transformers<5.24,>=5.19",
        "numpy",
        "x>1; extra == 'y'",
    ]
    monkeypatch.setattr(installed.metadata, "requires", lambda name: asked)
    for module in (doctor, installed):
        monkeypatch.setattr(module, "version", lambda name: found.get(name, "1.0" if name != "numpy" else ""))
    code, lines, _ = diagnose(capsys)
    assert lines["tested versions"]["mark"] == "--"
    outside = "deepspeed 0.1 (tested: ==0.19.8), transformers 5.24.0 (tested: <5.24,>=5.19)"
    assert lines["tested versions"]["finding"] == outside
    assert lines["tested versions"]["need"] == "may run, but was not tried; make setup"
    assert lines["other packages"] == {
        "mark": "!!", "subject": "other packages", "finding": "numpy", "need": "training needs it; make setup"
    }  # fmt: skip
    assert code == 1

    found.update(numpy="2.0", deepspeed="")
    code, lines, verdict = diagnose(capsys)
    assert (code, verdict) == (1, "Not ready; see to deepspeed.")

    found.update({"deepspeed": "0.19.8", "transformers": "5.23.0"})
    _, lines, _ = diagnose(capsys)
    within = "torch 2.13.0+cu130, deepspeed 0.19.8, transformers 5.23.0"
    assert lines["tested versions"] == doctor.line("tested versions", within)

    found["megatron-iiet"] = ""
    code, lines, _ = diagnose(capsys)
    assert code == 0
    assert lines["tested versions"]["finding"] == "unknown: not installed"


def test_a_limited_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for limit, need in ("avx2", "unset"), ("AVX2", "ignores"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
        _, lines, _ = diagnose(capsys)
        assert f"this CPU runs avx2, with ATEN_CPU_CAPABILITY={limit}" in lines["instruction sets"]["finding"]
        assert need in lines["instruction sets"]["need"]


WITH_NOTHING = """
packages | python | !! | 3.11 or newer is needed
packages | torch | ok |
packages | deepspeed | !! | nothing trains without it; make setup
packages | other packages | !! | training needs it; make setup
packages | tested versions | -- | pip install --no-build-isolation -e .
merge_norm | extension | -- | until then merge_norm runs on plain torch, slower
merge_norm | instruction sets | -- |
merge_norm | auto on cpu | -- |
gpus | GPUs | -- | training takes the CPU
building | C++ compiler | -- | builds the extension, in C++20; install GCC 10 or newer, or set CXX
building | ninja | -- | builds the extension; pip install ninja
building | nvcc | -- | builds CUDA kernels only, with a CUDA build of torch and toolkit 12.9
building | CUDA_HOME | -- | builds CUDA kernels only, with a CUDA build of torch and toolkit 12.9
optional | apex | -- | only optimizer.implementation: apex needs NVIDIA's, built from github.com/NVIDIA/apex; PyPI's is another project
optional | triton | -- | only ops.backend: triton needs it; pip install triton
optional | tensorboard | -- | draws the curves of runs; make setup
optional | numactl | -- | only deepspeed --bind_cores_to_rank needs it; install the system's numactl
optional | libaio | -- | only NVMe offload needs it, which this version refuses; install libaio-dev
launching | gloo | !! | CPUs need it
launching | nccl | -- | GPUs need it
launching | mpi | -- | no need, nor of mpi4py
launching | deepspeed | -- | starts the processes, as torchrun does; make setup
launching | torchrun | -- | starts the processes, as deepspeed does; make setup
launching | pdsh | -- | deepspeed's way to other machines; or its --no_ssh on each, torchrun, srun
launching | srun, sbatch | -- | no SLURM, or its module is not loaded; see examples/slurm
"""


def table(capsys: pytest.CaptureFixture[str], field: str) -> list[str]:
    """Group, subject, mark and a field of every line of a report."""
    doctor.main(["--json"])
    groups = json.loads(capsys.readouterr().out)["groups"]
    rows = [(name, check) for name, checks in groups.items() for check in checks]
    return [
        f"{name} | {check['subject']} | {check['mark']} | {check[field]}".rstrip() for name, check in rows
    ]


def test_where_nothing_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every line there is, in its order; what each want costs, and how to get it."""
    use_extension(monkeypatch, ExtensionStatus(False, "the extension is not built (this builds it)"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(doctor, "run", lambda *command: "")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    for name in ("gloo", "nccl", "mpi"):
        monkeypatch.setattr(torch.distributed, f"is_{name}_available", lambda: False)
    for module in (doctor, installed):
        monkeypatch.setattr(module, "version", lambda name: "")
    assert table(capsys, "need") == WITH_NOTHING.strip().splitlines()
    torch_is = f"torch {torch.__version__}, built for CUDA 12.9"
    findings = {line.split(" | ")[1]: line.split(" | ")[3] for line in table(capsys, "finding")}
    assert findings["GPUs"] == f"none to use: no NVIDIA driver; {torch_is}; CUDA_VISIBLE_DEVICES=''"
    assert findings["deepspeed"] == "not on PATH", "the launcher, not the package"
    assert findings["other packages"] == ", ".join(doctor.NEEDED)
    assert {findings[name] for name in ("apex", "triton", "tensorboard", "libaio", "srun, sbatch")} == {
        "not found"
    }
    assert {findings[name] for name in ("gloo", "nccl", "mpi")} == {"not in this torch"}
    assert {findings[name] for name in ("ninja", "numactl", "torchrun", "pdsh")} == {"not on PATH"}
    assert findings["nvcc"] == "not in /usr/local/cuda/bin"
    assert findings["CUDA_HOME"] == "not set; /usr/local/cuda is taken"
    assert findings["instruction sets"].startswith("none built; this CPU runs ")
    for name in ("torchrun", "ninja", "deepspeed"):
        (tmp_path / name).touch()
    needs = {
        line.split(" | ")[1]: line.split(" | ")[3] for line in table(capsys, "need")[16:] if line[-1] != "|"
    }
    assert needs["torchrun"] == f"but {tmp_path}/torchrun is there; activate that environment"
    assert needs["pdsh"].startswith("deepspeed's way")


def test_where_everything_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is needed, and each line says what was found."""
    use_extension(monkeypatch, ExtensionStatus(True, "built and loaded", CUDA_BUILD))
    use_gpu(monkeypatch, 9, 0)
    printed = {"-dumpfullversion": "10.1.0", "--version": "g++ (GCC) 10.1.0\nrelease 13.1, V13"}
    asked: list[str] = []

    def run(program: str, flag: str) -> str:
        asked.append(program)
        return printed[flag]

    class Ones:
        def __init__(self, count: int, device: str) -> None:
            asked.append(f"{count} on {device}")

        def sum(self) -> torch.Tensor:
            return torch.zeros(())

    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Kernel Module for x86_64  570.86.15  Release"
    )
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    monkeypatch.setenv("CXX", "clang")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "run", run)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.ctypes.util, "find_library", lambda name: f"lib{name}.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", Ones)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_mpi_available", lambda: True)
    monkeypatch.setattr(doctor, "version", lambda name: f"1.0 of {name}")
    lines = table(capsys, "need")
    assert {line.split(" | ", 2)[2] for line in lines if "instruction sets" not in line} == {"ok |"}
    found = dict(line.split(" | ok | ") for line in table(capsys, "finding") if " | ok | " in line)
    assert found["packages | deepspeed"] == "1.0 of deepspeed"
    assert found["packages | other packages"] == "all there"
    assert found["merge_norm | CUDA targets"] == "8.0 9.0, with CUDA 13.0"
    assert found["merge_norm | this GPU"] == "compute capability 9.0, among the targets"
    assert found["merge_norm | auto on cuda"].endswith(", self-check passed")
    assert found["gpus | GPUs"] == "2 x Fake GPU, 80 GiB, compute capability 9.0"
    torch_is = f"torch {torch.__version__}, built for CUDA 13.0"
    assert found["gpus | driver, runtime"] == f"NVIDIA driver 570.86.15; {torch_is}; NCCL 2.27.5"
    assert found["building | C++ compiler"] == "g++ (GCC) 10.1.0"
    assert found["building | nvcc"] == "13.1; torch's CUDA is 13.0"
    assert found["building | CUDA_HOME"] == "/opt/cuda"
    assert set(asked) == {"clang", "/opt/cuda/bin/nvcc", "2 on cuda"}
    assert found["optional | apex"] == "found"
    assert found["optional | triton"] == "1.0 of triton"
    assert found["optional | libaio"] == "libaio.so"
    assert found["launching | mpi"] == "available"
    assert found["launching | torchrun"] == "/bin/torchrun"
    assert found["launching | srun, sbatch"] == "/bin/srun, /bin/sbatch"


def test_long_lines_are_wrapped() -> None:
    words = " ".join(["word"] * 40)
    first, *rest = doctor.render(doctor.line("subject", words, "need")).splitlines()
    assert first.startswith("  ok  subject           word word")
    assert rest
    assert all(line.startswith(" " * 24 + "word") for line in rest)
    assert all(100 < len(line) <= 110 for line in [first, *rest][:-1])
    assert doctor.render(doctor.line("x", "", "get it")) == "  --  x                 not found; get it"


def test_what_a_program_prints(tmp_path: Path) -> None:
    """Nothing where it is missing, or fails."""
    assert doctor.run("echo", "a b") == "a b"
    assert doctor.run("false") == doctor.run(str(tmp_path / "none")) == ""
