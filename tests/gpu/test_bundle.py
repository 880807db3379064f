"""The bundle of wheels: with what is in it, and torch, everything that the checks import is there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import gpu_bundle  # noqa: E402

# As on a machine where nothing else is installed.
IMPORTS = """
import json, sys
from importlib.machinery import PathFinder
left_out = set(json.loads(sys.argv[1]))
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in left_out else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
sys.path[:0] = sys.argv[2:]
from gpu_checks import CHECKS
for check in CHECKS.values():
    check.load()
import megatron_iiet.training.pretrain
import torch.utils.tensorboard
from transformers import LlamaForCausalLM
from pathlib import Path
import inference_report
from gpu_checks import training
inference_report.draw([], "no title", Path("picture.png"))
training._draw(Path("picture.png"), {})
"""


def test_what_is_in_it() -> None:
    packages = gpu_bundle.wanted("3.12")
    assert {"deepspeed", "transformers", "jsonargparse", "ninja", "tensorboard", "tokenizers"} <= set(
        packages
    )
    assert packages["transformers"] == metadata.version("transformers")
    assert not {"torch", "numpy", "triton", "sympy", "datasets", "pyarrow", "pytest"} & set(packages)
    assert "exceptiongroup" not in packages  # for Pythons before 3.11
    assert "typing-extensions" not in packages  # comes with torch


@pytest.mark.slow
def test_nothing_is_missing_from_it() -> None:
    there = gpu_bundle.closure(list(gpu_bundle.THERE), {"python_version": "3.12", "extra": ""}, set())
    allowed = {*there, *gpu_bundle.wanted("3.12"), gpu_bundle.PACKAGE}
    left_out = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if not allowed & {name.lower().replace("_", "-").replace(".", "-") for name in distributions}
    ]
    assert {"datasets", "matplotlib", "pytest", "mypy"} <= set(left_out)
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, json.dumps(left_out), str(ROOT)]
    done = subprocess.run(
        [*command, str(ROOT / "tools"), str(ROOT / "benchmarks")], capture_output=True, text=True
    )
    # Pictures are not worth their megabytes.
    assert done.stdout.splitlines()[-2:] == ["no picture: matplotlib is not installed"] * 2, done.stderr
