"""The tests of corpora behind urls with a real client of S3 and a server of this machine (moto).

    python tests/data/remote.py                          # make test-remote
    python tests/data/remote.py --environment FOLDER     # made there, if it is not there yet, and kept

Both go into an environment of their own (160 MB, removed again), which takes all else from the one this
runs in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import fsspec

ROOT = Path(__file__).resolve().parents[2]
ASKED = (f"s3fs=={fsspec.__version__}", "moto[server]==5.2.5")
"""s3fs is of the same release as fsspec."""


def prepare(folder: Path) -> Path:
    """Its Python, with everything installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (own / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *ASKED], check=True, stdout=sys.stderr)
    return python


def main() -> int:
    """Run the tests; none of them may be skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, help="folder of the environment, which is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="remote-") as name:
        python = prepare(options.environment or Path(name))
        subprocess.run([python, "-c", "import s3fs, moto.server"], check=True)
        return subprocess.call(
            [python, "-m", "pytest", "-rs", "-n0", "--show-capture=no", "tests/data/test_stores.py"], cwd=ROOT
        )


if __name__ == "__main__":
    sys.exit(main())
