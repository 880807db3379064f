"""The command-line tools as a user runs them, in this process: to start torch and transformers in another one
takes ten seconds, and longer than all the rest."""

from __future__ import annotations

import io
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Ended:
    """What a user sees of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        assert self.code == 2
        assert "wrote" not in self.out
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


def run_here(script: str, *arguments: str, typed: str = "") -> Ended:
    """Run ``script``, a path below the repository, with command-line ``arguments``; it reads ``typed``."""
    path, out, err = ROOT / script, io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        with (
            patch.object(sys, "argv", [str(path), *arguments]),
            patch.object(sys, "stdin", io.StringIO(typed)),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(code, out.getvalue(), err.getvalue())
