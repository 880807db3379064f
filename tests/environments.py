"""Environments of their own, for tests of packages that the locked ones do not have."""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def add_environment(parser: argparse.ArgumentParser) -> None:
    """The option of every check that needs one."""
    parser.add_argument("--environment", type=Path, help="folder of the environment, which is kept")


@contextmanager
def environment(
    folder: Path | None, packages: Sequence[str], *, beside: bool, without: Sequence[str] = ()
) -> Iterator[Path]:
    """The Python of an environment in which packages are installed.

    Args:
        folder: where it is, or is made, and kept; None: in a temporary folder.
        beside: it sees what is installed here as well, and pip must want no other version of that.
        without: packages that pip brings along and that are removed again.
    """
    with tempfile.TemporaryDirectory(prefix="environment-") as temporary:
        folder = folder or Path(temporary)
        python, made_of = folder / "bin" / "python", folder / "made_of"
        if not made_of.exists() or made_of.read_text(encoding="utf-8").splitlines() != [*packages]:
            print(f"installing {', '.join(packages)} in {folder}", file=sys.stderr, flush=True)
            venv.create(folder, with_pip=True)
            if beside:
                here, site = sysconfig.get_path("purelib"), f"python{sysconfig.get_python_version()}"
                link = folder / "lib" / site / "site-packages" / "beside.pth"
                link.write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
            pip(python, "install", "--no-compile", *packages)
            if without:
                pip(python, "uninstall", "--yes", *without)
            made_of.write_text("\n".join(packages), encoding="utf-8")
        yield python


def pip(python: Path, *arguments: str | Path) -> None:
    """Run the pip of an environment; what it has to say goes to standard error."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
