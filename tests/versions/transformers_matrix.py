"""Exports of every solver in other releases of transformers: the same figures in each.

    python tests/versions/transformers_matrix.py                    # one release of each minor version
    python tests/versions/transformers_matrix.py 5.24.0 4.57.6 --exports iiet-plan euler

Each release goes with the packages it asks for into a folder of its own before torch and the others of this
environment on the path. Models, and what is expected of them, are made here once. One line a release, how
many exports passed each check of loads.py; the exit status is 1 if one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.versions import exports
from tests.versions.loads import CHECKS

ROOT = Path(__file__).resolve().parents[2]
RELEASES = [
    *("4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0"),
    *("5.10.4", "5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0"),
    *("5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"),
]


def install(version: str, folder: Path) -> None:
    """The release and what it asks for."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), f"transformers=={version}"], check=True)


def verdicts(environment: Path, models: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """What loads.py says of each export.

    Raises:
        RuntimeError: it ended otherwise, with its last lines.
    """
    environ = {**os.environ, "PYTHONPATH": f"{environment}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/versions/loads.py", str(models), *names]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError("\n".join(ended.stderr.strip().splitlines()[-5:]))
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    return found["exports"]


def line(version: str, seen: dict[str, dict[str, str]]) -> tuple[str, list[str]]:
    """A row of the table, and what is not right."""
    cells, wrong = [], []
    for check in (check.__name__ for check in CHECKS):
        of_check = {name: verdict[check] for name, verdict in seen.items() if verdict[check][0] != "-"}
        right = sum(verdict == "ok" for verdict in of_check.values())
        cells.append(f"{right} of {len(of_check)}" if of_check else "–")
        wrong += [f"{version} {name}, {check}: {v}" for name, v in of_check.items() if v != "ok"]
    return f"| {version} | {' | '.join(cells)} |", wrong


def main() -> int:
    """Check one release after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", default=RELEASES)
    parser.add_argument("--exports", nargs="+", metavar="NAME", choices=exports.NAMES, default=exports.NAMES)
    options = parser.parse_args()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="transformers-") as name:
        models = Path(name, "models")
        models.mkdir()
        with torch.no_grad():
            exports.write(models, options.exports)
        names = [check.__name__ for check in CHECKS]
        print(f"| transformers | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}", flush=True)
        for version in options.versions:
            environment = Path(name, version)
            try:
                install(version, environment)
                row, wrong = line(version, verdicts(environment, models, options.exports))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                row, wrong = f"| {version} | FAILED |", [f"{version}: {error}"]
            print(row, flush=True)
            failures += wrong
            shutil.rmtree(environment, ignore_errors=True)
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
