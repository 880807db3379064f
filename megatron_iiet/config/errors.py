"""The one error type of the config room, and how a script shows it to a person."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from typing import Any, NoReturn

from megatron_iiet import signals

_PATIENCE_SECONDS = 10.0
_show_others = warnings.showwarning


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence meant for the user."""


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all ranks.

    Reads what a launcher left in the environment (RANK; SLURM_PROCID under a bare ``srun``), because
    configuration errors appear before any process group exists. Without a launcher the answer is yes.
    """
    return _rank() == "0"


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def exit_with_error(message: str) -> NoReturn:
    """Print ``error: message`` to stderr, once for all ranks, and exit with status 2 on every rank.

    The other ranks wait a little: launchers kill all ranks when the first one ends, and that must not be
    before the first rank has spoken. One that is still alive after that failed alone, or on another host.
    """
    signals.forget()
    if "No usable temporary directory" in message:  # Python's, of whatever library asked for one
        message += "; set TMPDIR to a folder that can be written"
    if is_first_rank():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_SECONDS)
        print(f"error on rank {_rank()}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class ConfigWarning(UserWarning):
    """Something to know of a configuration that is used all the same; one sentence meant for the user."""


class ArgumentParser(argparse.ArgumentParser):
    """Of a tool: a wrong flag is shown as every other error is, and a :class:`ConfigWarning` without the line
    of source that gave it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        warnings.showwarning = _show_warning

    def error(self, message: str) -> NoReturn:
        exit_with_error(message)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
    if issubclass(category, ConfigWarning):
        print(f"warning: {message}", file=sys.stderr, flush=True)
    else:
        _show_others(message, category, *rest, **options)
