"""tests/examples/test_cleaning.py with datatrove: beside the locked packages, in an environment of its own.

    python tests/cleaning/check.py                             # make test-cleaning
    python tests/cleaning/check.py --environment FOLDER        # made there, if it is not there yet, and kept

The environment sees what is installed here and adds what the extra `cleaning` asks for besides (some 200 MB,
removed again); pip must not want another version of anything that is here. Exit status: pytest's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare(environment: Path) -> Path:
    """The environment's Python; made if it is not there."""
    python = environment / "bin" / "python"
    if not python.exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        wanted = project["optional-dependencies"]["cleaning"]
        print(f"installing {', '.join(wanted)} in {environment}", file=sys.stderr, flush=True)
        venv.create(environment, with_pip=True)
        site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        here = sysconfig.get_path("purelib")
        (site / "locked.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", "--no-compile", *wanted], check=True, stdout=sys.stderr)
    return python


def main() -> int:
    """Run the tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, help="folder of the environment, which is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cleaning-") as folder:
        python = prepare(options.environment or Path(folder))
        tests = ["-m", "pytest", "-n", "0", "-v", "tests/examples/test_cleaning.py"]
        return subprocess.call([python, *tests], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
