"""Settings of every test."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import hypothesis
import pytest

from tests.processes import Session, die_with_parent

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell starts background jobs with SIGINT ignored; so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
    die_with_parent()

# Before any test module is imported, since some take a copy of the environment.
_processes = Session() if sys.platform == "linux" else None


def pytest_collection_finish() -> None:
    """No collection of garbage looks through torch and the tests themselves, which takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """No process that a test started outlives it."""
    with _processes.end_of_test() if _processes is not None else nullcontext():
        return (yield)
