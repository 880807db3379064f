"""Which variants of a test run in ``make test``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parameter, or tuples of several; all but ``kept`` are for ``make test-long`` alone."""
    parts = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [v if v in kept else pytest.param(*each, marks=pytest.mark.long) for v, each in parts]
