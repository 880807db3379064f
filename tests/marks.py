"""Which variants of a test run in ``make test``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parameter, of which all but ``kept`` are for ``make test-long`` alone."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values]
