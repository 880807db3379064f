"""The tests of corpora behind urls with a real client of S3 and a server of this machine (moto).

    python -m tests.data.remote                          # make test-remote
    python -m tests.data.remote --environment FOLDER     # made there, if it is not there yet, and kept

Both go into an environment of their own (160 MB, removed again), which takes all else from the one this
runs in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fsspec

from tests.environments import add_environment, environment

ROOT = Path(__file__).resolve().parents[2]
ASKED = (f"s3fs=={fsspec.__version__}", "moto[server]==5.2.5")
"""s3fs is of the same release as fsspec."""


def main() -> int:
    """Run the tests; none of them may be skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_environment(parser)
    with environment(parser.parse_args().environment, ASKED, beside=True) as python:
        subprocess.run([python, "-c", "import s3fs, moto.server"], check=True)
        return subprocess.call(
            [python, "-m", "pytest", "-rs", "-n0", "--show-capture=no", "tests/data/test_stores.py"], cwd=ROOT
        )


if __name__ == "__main__":
    sys.exit(main())
