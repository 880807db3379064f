"""Kills a piece of work at each of its steps, deterministically."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tests.processes import die_with_parent

_KILLED = 9
_STEPS = ("open", "os.", "shutil.")  # audit events of everything that changes names in a file system


def run_until_killed(work: Callable[[], object], step: int) -> bool:
    """Run ``work`` in a child process that dies, without any clean-up, before file operation ``step``.

    Returns whether the work was finished before that.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(_STEPS):
                left -= 1
                if left < 0:
                    os._exit(_KILLED)

        try:
            sys.addaudithook(count)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), f"the work failed instead of being killed: exit code {code}"
    return code == 0
