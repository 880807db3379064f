"""tests/examples/test_cleaning.py with datatrove: beside the locked packages, in an environment of its own.

    python -m tests.cleaning.check                             # make test-cleaning
    python -m tests.cleaning.check --environment FOLDER        # made there, if it is not there yet, and kept

The environment sees what is installed here and adds what the extra `cleaning` asks for besides (some 200 MB,
removed again). Exit status: pytest's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.environments import add_environment, environment

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_environment(parser)
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"]["cleaning"]
    with environment(options.environment, wanted, beside=True) as python:
        tests = ["-m", "pytest", "-n", "0", "-v", "tests/examples/test_cleaning.py"]
        return subprocess.call([python, *tests], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
