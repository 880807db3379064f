"""Builds the wheel: ``pip install megatron_iiet/hf/vllm_plugin`` (not ``-e``). Metadata is in pyproject.toml.

The wheel's ``vllm_iiet/modeling_iiet.py`` is the file that travels with exports, taken from the folder above:
the arithmetic of solvers is written once. Nothing is left in the source tree.
"""

import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ARITHMETIC = Path(__file__).resolve().parents[1] / "modeling_iiet.py"


class WithArithmetic(build_py):
    """Adds the file."""

    def run(self) -> None:
        super().run()
        self.copy_file(str(ARITHMETIC), str(Path(self.build_lib, "vllm_iiet", ARITHMETIC.name)))


with tempfile.TemporaryDirectory() as scratch:
    setup(
        cmdclass={"build_py": WithArithmetic},
        options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}},
    )
