"""The package with other releases of torch or transformers than the locked ones, each in its own environment.

    python tests/versions/check.py 2.11.0 2.14.1                  # releases of torch
    python tests/versions/check.py --of transformers 5.19.0

An environment (about 7 GB with a CUDA build of torch) has requirements.in but for that one package, and the
extension built in it from a copy of this checkout; it is removed before the next. The losses of the fp32 run
are compared with those of the environment that this runs in. One line a version on standard output, progress
on the other; exit status 1 if any is not right. MEGATRON_IIET_CUDA=0 spares the build of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path("environment", "bin", "python")
TOLERANCE = 1e-5
"""Of the fp32 losses, relative; what layouts may differ by."""
SELECTION = [
    *("tests/training/test_deepspeed_internals.py", "tests/distributed/test_golden.py"),
    *("tests/distributed/test_collectives.py", "tests/distributed/test_parity.py::test_smoke"),
    *("tests/hf/test_export.py", "tests/hf/test_modeling_cache.py", "tests/ops"),
]


class StepFailedError(RuntimeError):
    """A step that ended with another status than 0; the message is what it was and its last lines."""


def run(folder: Path, name: str, *command: str | Path) -> str:
    """What a step prints, from the copy of the checkout with the environment's programs first on PATH."""
    source = folder / "source"
    path = f"{(folder / PYTHON).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    log = folder / f"{name}.log"
    print(f"{folder.name}: {name}, see {log}", file=sys.stderr, flush=True)
    with log.open("w") as output:
        status = subprocess.call(command, cwd=source, env=environ, stdout=output, stderr=subprocess.STDOUT)
    if status:
        last = "\n".join(log.read_text().strip().splitlines()[-25:])
        raise StepFailedError(f"{name} failed with status {status}:\n{last}")
    return log.read_text().strip()


def prepare(folder: Path, package: str, version: str) -> Path:
    """Its Python, with everything installed and the extension built."""
    venv.create(folder / "environment", with_pip=True)
    (folder / "source").mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    there = b"\0".join(
        name for name in listed.stdout.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists()
    )
    pack = ["tar", "--null", "-cf", "-", "-T", "-"]
    packed = subprocess.run(pack, cwd=ROOT, input=there, capture_output=True, check=True)
    subprocess.run(["tar", "-xf", "-"], cwd=folder / "source", input=packed.stdout, check=True)
    python = folder / PYTHON
    lock = (ROOT / "requirements.in").read_text().splitlines()
    free = (f"{package}==", "setuptools==")  # torch 2.11 takes no setuptools above 81, which the lock has
    asked = [*(line for line in lock if not line.startswith(free)), f"{package}=={version}", "setuptools>=77"]
    (folder / "requirements.txt").write_text("\n".join(asked) + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(folder, "installing", *pip, "--no-compile", "-r", folder / "requirements.txt")
    run(folder, "building", *pip, "--no-deps", "--no-build-isolation", "-e", ".")
    return python


def check(package: str, version: str, reference: dict[str, list[float]]) -> str:
    """What was seen, in one line.

    Raises:
        StepFailedError: something was not right.
    """
    with tempfile.TemporaryDirectory(prefix=f"{package}-{version}-") as name:
        folder = Path(name)
        python = prepare(folder, package, version)
        doctor = run(folder, "doctor", python, "-m", "megatron_iiet.doctor").splitlines()[-1]
        run(folder, "training", python, "-m", "tests.versions.tiny_runs", folder)
        found = json.loads((folder / "found.json").read_text())
        tests = run(folder, "tests", python, "-m", "pytest", "-p", "no:cacheprovider", *SELECTION)
    difference = max(
        abs(here - there) / there
        for name, losses in reference.items()
        if name.endswith("fp32")
        for here, there in zip(found["losses"][name], losses, strict=True)
    )
    seen = (
        f"{package} {version} (torch {found['torch']}): {doctor} fp32 losses differ by {difference:.1e}, "
        f"logits of the export by {found['export']:.1e}; {tests.splitlines()[-1]}"
    )
    if not difference <= TOLERANCE or not found["export"] <= TOLERANCE:
        raise StepFailedError(f"{seen}; more than {TOLERANCE:g} is too much")
    return seen


def main() -> int:
    """Check one version after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--of", default="torch", choices=["torch", "transformers"], help="which package")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny_runs = [sys.executable, "-m", "tests.versions.tiny_runs", folder]
        subprocess.run(tiny_runs, cwd=ROOT, check=True, capture_output=True)
        reference = json.loads(Path(folder, "found.json").read_text())
    failed = 0
    for version in options.versions:
        try:
            print("ok    ", check(options.of, version, reference["losses"]), flush=True)
        except StepFailedError as error:
            failed += 1
            print("FAILED", f"{options.of} {version}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
