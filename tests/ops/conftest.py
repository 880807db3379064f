"""Fixtures of the tests of ``merge_norm``."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_iiet.ops import extension


@pytest.fixture(scope="module")
def ops() -> Any:
    status = extension.load_extension()
    assert status.loaded, status.reason
    return torch.ops.megatron_iiet


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
