"""Builds and installs the package: ``pip install --no-build-isolation -e .``. Metadata is in pyproject.toml.

The extension ``megatron_iiet/_extension`` has the CPU kernels, the packing of documents and, where nvcc and a
CUDA build of torch are found, the CUDA kernels. Environment variables:

    MEGATRON_IIET_EXTENSION=0    do not build it; merge_norm then runs on plain torch, packing in Python
    MEGATRON_IIET_CUDA=0|1       leave the CUDA kernels out, or fail without them (default: if possible)
    TORCH_CUDA_ARCH_LIST         targets of the CUDA kernels (default: 8.0;9.0;10.0;12.0)
    MAX_JOBS                     compilers at a time
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

CSRC = Path("csrc")
CUDA_TARGETS = "8.0;9.0;10.0;12.0"
FLAGS = ["-O3", "-std=c++20", "-g0", "-fopenmp", "-Wno-unknown-pragmas"]
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS: dict[str, list[str]] = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
ATTENTION_FLAGS: list[str] = []
if X86:
    # at::vec chooses its vectors by the macros, the compiler its instructions by the flags: both, or neither.
    common = ["-mfma", "-mf16c"]
    wide = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS["avx2"] = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", *common]
    ISA_FLAGS["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *wide, *common]
    ATTENTION_FLAGS = [*ISA_FLAGS["avx512"], "-mavx512bf16"]


def wanted(variable: str) -> bool | None:
    """0 → False, 1 → True, unset or anything else → None."""
    return {"0": False, "1": True}.get(os.environ.get(variable, ""))


def torch_of_the_environment() -> str:
    """The torch that is installed where the package will run, which an isolated build does not see; or ""."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ask = "from importlib import metadata; print(metadata.version('torch'))"
    asked = subprocess.run([sys.executable, "-c", ask], env=environ, cwd="/", capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def refuse_another_torch() -> None:
    """The extension runs with the torch it was built for only, and pip's isolated build may bring another."""
    there = torch_of_the_environment()
    try:
        built = metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit(
            "error: there is no torch to build the extension for; install torch first, or set "
            "MEGATRON_IIET_EXTENSION=0 to do without it"
        )
    if there not in ("", built):
        sys.exit(
            f"error: the extension would be built for torch {built}, which an isolated build brought, but "
            f"this environment has torch {there}; run pip install --no-build-isolation -e ."
        )


def cuda_or_reason() -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and why not."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if wanted("MEGATRON_IIET_CUDA") is False:
        reason = "MEGATRON_IIET_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        reason = "no nvcc (set CUDA_HOME to a CUDA toolkit)"
    else:
        return True, ""
    if wanted("MEGATRON_IIET_CUDA"):
        sys.exit(f"error: MEGATRON_IIET_CUDA=1 asks for the CUDA kernels, but they can't be built: {reason}")
    return False, reason


def extension_options() -> dict[str, Any]:
    """Arguments of ``setup`` that build the extension."""
    if wanted("MEGATRON_IIET_EXTENSION") is False:
        print("megatron_iiet: the extension is left out (MEGATRON_IIET_EXTENSION=0)", file=sys.stderr)
        return {}
    refuse_another_torch()
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        sys.exit(
            "error: no C++ compiler (g++, or the one CXX names) to build the extension with; install one, or "
            "set MEGATRON_IIET_EXTENSION=0 to do without it"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_TARGETS)
    cuda, reason = cuda_or_reason()
    print(
        f"megatron_iiet: building CPU {'and CUDA kernels' if cuda else f'kernels only: {reason}'}",
        file=sys.stderr,
    )

    class Build(BuildExtension):
        """Compiles the kernels once per instruction set, and notes what was built beside the library."""

        def build_extension(self, extension: Any) -> None:
            flags_of = {f"isa_{isa}": flags for isa, flags in ISA_FLAGS.items()}
            for name, flags in {**flags_of, "attention_bf16": ATTENTION_FLAGS}.items():
                extension.extra_objects += self.compiler.compile(
                    [str(CSRC / "cpu" / f"{name}.cpp")],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs={"cxx": [*FLAGS, "-fPIC", *flags]},
                )
            super().build_extension(extension)
            about = {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu": list(ISA_FLAGS),
                "cuda": torch.version.cuda if cuda else None,
                "cuda_targets": os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
                if cuda
                else [],
                "no_cuda_because": reason,
            }
            self.note = Path(self.get_ext_fullpath(extension.name)).with_name("_extension.json")
            self.note.write_text(json.dumps(about, indent=2) + "\n")

        def copy_extensions_to_source(self) -> None:
            """Editable installs build elsewhere, then copy."""
            super().copy_extensions_to_source()
            shutil.copy(self.note, "megatron_iiet")

    sources = [
        CSRC / "schema.cpp",
        *(
            CSRC / "cpu" / f"{name}.cpp"
            for name in ("torch_cpu", "pointwise", "cross_entropy", "attention", "packing")
        ),
    ]
    if cuda:
        sources += [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "torch_cuda.cpp"]
    kind = CUDAExtension if cuda else CppExtension
    return {
        "ext_modules": [
            kind(
                "megatron_iiet._extension",
                [str(source) for source in sources],
                include_dirs=[str(CSRC.resolve() / "include")],
                define_macros=[("MERGE_NORM_X86", None)] if X86 else [],
                extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "-std=c++17"]},
                extra_link_args=["-fopenmp", "-Wl,-s"],
                extra_objects=[],
            )
        ],
        "cmdclass": {"build_ext": Build},
    }


setup(packages=find_packages(include=["megatron_iiet", "megatron_iiet.*"]), **extension_options())
