#!/usr/bin/env python
"""The wheels that a machine with little more than torch wants for ``gpu_acceptance.py``, in one folder.

    python tools/gpu_bundle.py --python 3.12 --output gpu-bundle                 # here, with a package index
    python3 -m pip install --no-index --no-deps --target site gpu-bundle/*.whl   # there, without network
    PYTHONPATH=site python3 tools/gpu_acceptance.py

What is taken: the packages that this one requires and what those require, at the versions installed here, for
another Python on Linux x86-64. Left out: torch and all it requires, which must be there, and what only
preparing data needs. A package without a wheel (DeepSpeed) is built here; only one in pure Python can be.

Exit status: 0 complete, 1 a package cannot be had or the folder is too large.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "megatron-iiet"
THERE = ("torch", "numpy")
LEFT_OUT = {
    "datasets": "texts of the Hugging Face hub",
    "pyarrow": "texts in parquet and arrow",
    "gigatoken": "fast tokenizing in preprocessing",
    "hf-xet": "downloads of the hub",
    "matplotlib": "pictures; figures are in report.json too",
    "pillow": "pictures in TensorBoard",
    "tensorboard-data-server": "looking at TensorBoard",
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + [
    "manylinux2014_x86_64",
    "linux_x86_64",
]


def closure(names: list[str], environment: dict[str, str], without: set[str]) -> set[str]:
    """The packages and all they require there, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in without:
            continue
        required = metadata.requires(name) or []
        found.add(name)
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                waiting.append(canonicalize_name(requirement.name))
    return found


def wanted(python: str) -> dict[str, str]:
    """Name and version of every package of the bundle."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    there = closure(list(THERE), environment, set())
    names = closure([PACKAGE], environment, there | set(LEFT_OUT)) - {PACKAGE}
    return {name: metadata.version(name) for name in sorted(names)}


def fetch(name: str, version: str, python: str, folder: Path) -> str:
    """Download the wheel, or build it; an error message, or an empty one."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    for each in PLATFORMS:
        target += ["--platform", each]
    pinned = f"{name}=={version}"
    got = subprocess.run(
        [*pip, "download", "--no-deps", *target, "-d", folder, pinned],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if got.returncode == 0:
        return ""
    before = set(folder.glob("*.whl"))
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, pinned]
    made = subprocess.run(built, capture_output=True, text=True, encoding="utf-8")
    wheels = set(folder.glob("*.whl")) - before
    if made.returncode:
        return f"{pinned} has no wheel for Python {python} and cannot be built: {made.stderr.strip()[-300:]}"
    if not all(wheel.name.endswith("-none-any.whl") for wheel in wheels):
        for wheel in wheels:
            wheel.unlink()
        return f"{pinned} has no wheel for Python {python}, and the one built here is for Python " + (
            platform.python_version()
        )
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--python", default="3.12", metavar="X.Y", help="its version there")
    add("--output", type=Path, default=Path("gpu-bundle"), metavar="FOLDER", help="must be empty or new")
    add("--most-megabytes", type=float, default=60.0, metavar="MB", help="more is an error")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        print(f"error: {arguments.output} is not empty; empty it, or name another --output", file=sys.stderr)
        return 1
    try:
        packages = wanted(arguments.python)
    except metadata.PackageNotFoundError as missing:
        print(
            f"error: {missing.name} is required there and not installed here; install it first",
            file=sys.stderr,
        )
        return 1
    errors = [e for n, v in packages.items() if (e := fetch(n, v, arguments.python, arguments.output))]
    megabytes = sum(wheel.stat().st_size for wheel in arguments.output.glob("*.whl")) / 1e6
    if megabytes > arguments.most_megabytes:
        errors.append(
            f"the wheels are {megabytes:.1f} MB, more than --most-megabytes {arguments.most_megabytes:g}"
        )
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    left_out = ", ".join(f"{name} ({what})" for name, what in LEFT_OUT.items())
    print(f"{len(packages)} packages, {megabytes:.1f} MB, in {arguments.output}; left out: {left_out}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
