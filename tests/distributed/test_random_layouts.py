"""Layouts nobody thought of: ``make test-layouts`` draws them at random."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.parity import AXES, Case
from tests.distributed.test_parity import check
from tests.tiny import write_shard

pytestmark = [pytest.mark.slow, pytest.mark.layouts]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    axes = {field.name: AXES[field.name] for field in fields(Case) if field.name in AXES}
    values: dict[str, Any] = {name: draw(st.sampled_from(choices)) for name, choices in axes.items()}
    return Case(**values)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases().filter(lambda case: case.is_legal))
def test_any_layout_is_one_process(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("layout")
    write_shard(folder / "shard")
    check([case], {"prefix": str(folder / "shard")}, folder)
