"""pyproject.toml, the lock files and setup.py agree, and a build for another torch is refused."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_iiet import installed
from megatron_iiet.training.engine import deepspeed_internals
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, pretrain_rank
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


LOCKS = ("requirements-cpu.lock", "requirements-cuda.lock")


def pins(file: str = "requirements.in") -> dict[str, str]:
    """Name → version."""
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(each.name): each for each in map(Requirement, texts)}


ASKED = requirements(
    [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
)


@pytest.mark.parametrize("name", ASKED)
def test_the_lock_pins_a_version_within_the_bounds(name: str) -> None:
    assert ASKED[name].specifier.contains(pins()[name]), f"{ASKED[name]}, but the lock has {pins()[name]}"


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_has_every_version_and_hashes(file: str) -> None:
    """And nothing else but what the CUDA build of torch brings, which pip would not add by itself."""
    text, locked = (ROOT / file).read_text(), pins(file)
    assert {
        name: version.removesuffix("+cpu") for name, version in locked.items() if name in pins()
    } == pins()
    more = sorted(locked.keys() - pins().keys())
    assert [n for n in more if not re.match("nvidia-|cuda-|triton$", n)] == []
    assert bool(more) is (file == LOCKS[1])
    assert locked["torch"].endswith("+cpu") is not bool(more)
    entries = re.split(r"\n(?=\S)", text.strip())[1:]
    assert len(entries) == len(locked)
    assert all(re.fullmatch(r"\S+( \\\n +--hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)


def test_the_locks_have_what_is_installed() -> None:
    locked = pins(LOCKS["+cpu" not in installed.version("torch")])
    assert {n: installed.version(n) for n in ("torch", "deepspeed", "numpy")}.items() <= locked.items()


def test_the_extension_is_built_for_a_torch_that_the_package_takes() -> None:
    build = requirements(PROJECT["build-system"]["requires"])
    assert build["torch"].specifier == ASKED["torch"].specifier
    assert build["ninja"].specifier.contains(pins()["ninja"])
    assert build["setuptools"].specifier.contains(pins()["setuptools"])


def test_bounds_hold_the_versions_that_were_run() -> None:
    ran = re.search(r"TORCH \?= (.*)", (ROOT / "Makefile").read_text())
    assert ran is not None
    assert all(ASKED["torch"].specifier.contains(version) for version in ran[1].split())
    assert not ASKED["transformers"].specifier.contains("5.24.0")
    assert str(ASKED["deepspeed"].specifier) == f"=={deepspeed_internals.TESTED}"


def test_what_nothing_includes_is_not_asked_for() -> None:
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    includes = any(re.search(r"pybind11|torch/extension\.h", path.read_text()) for path in sources)
    assert includes is ("pybind11" in ASKED)


def test_versions_outside_the_bounds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {installed.PACKAGE: "0.1.0", "torch": "2.15.0+cu130", "deepspeed": "0.19.8", "numpy": "2.0"}
    asked = [*PROJECT["project"]["dependencies"], "lm-eval==0.4.13; extra == 'eval'"]
    monkeypatch.setattr(installed.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(installed, "version", lambda name: found.get(name, ""))
    assert installed.outside_bounds() == ["torch 2.15.0+cu130 (tested: <2.15,>=2.11)"]
    found["torch"] = "2.14.1+cpu"
    assert installed.outside_bounds() == []
    found["torch"] = "2.11.0rc1"
    assert installed.outside_bounds() == ["torch 2.11.0rc1 (tested: <2.15,>=2.11)"]
    found[installed.PACKAGE] = ""
    assert installed.bounds() == {}


def build(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """``setup.py`` as pip's isolated build runs it, which puts its own packages before the environment's."""
    brought = tmp_path / "torch-9.9.0.dist-info"
    brought.mkdir()
    (brought / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.0\n")
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environ},
        capture_output=True,
        text=True,
    )


def test_an_extension_for_another_torch_is_not_built(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the extension would be built for torch 9.9.0, which an isolated build brought, but this "
        f"environment has torch {metadata.version('torch')}; run pip install --no-build-isolation -e ."
    )


def test_without_the_extension_any_torch_will_do(tmp_path: Path) -> None:
    done = build(tmp_path, MEGATRON_IIET_EXTENSION="0")
    assert done.returncode == 0, done.stderr


def start_with_another_torch(config: dict[str, Any]) -> str:
    """What the start of a run says where torch is one that was not tried."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(installed.metadata, "requires", lambda name: ["torch<2.15,>=2.11"])
        patch.setattr(installed, "version", lambda name: "2.16.0")
        pretrain_rank(config, None)
    return said.getvalue()


@pytest.mark.slow
def test_a_start_names_what_was_not_tried(tmp_path: Path) -> None:
    config = tiny_config(make_data(tmp_path), tmp_path / "run", training={"steps": 1})
    [said] = run_ranks(start_with_another_torch, 1, as_data(config))
    assert "\nwarning: torch 2.16.0 (tested: <2.15,>=2.11)\n" in said
