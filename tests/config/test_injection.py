"""How faults are asked for."""

from __future__ import annotations

import pytest

from megatron_iiet.config import ConfigError
from megatron_iiet.config.injection import Injection
from tests.tiny import tiny_config


def test_what_is_asked_for() -> None:
    assert Injection.read("kill@step=7,rank=1") == Injection("kill", 7, 1, 1.0)
    assert Injection.read("raise@step=7") == Injection("raise", 7, 0, 1.0)
    assert Injection.read("slow_disk") == Injection("slow_disk", None, 0, 1.0)
    assert Injection.read("slow_disk@seconds=0.5,rank=2") == Injection("slow_disk", None, 2, 0.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("burn@step=1", "debug.inject has 'burn@step=1', whose kind is none of kill, stop, raise, nan,"),
        ("kill", "debug.inject has 'kill', which names no step; write KIND@step=N,rank=R"),
        ("kill@rank=1", "which names no step"),
        ("kill@step=x", "where 'step=x' is not one of step=NUMBER, rank=NUMBER; write KIND@step=N,rank=R"),
        ("kill@step=-1", "where 'step=-1' is not one of step=NUMBER"),
        ("kill@step=1,seconds=2", "where 'seconds=2' is not one of step=NUMBER, rank=NUMBER"),
        ("", "whose kind is none of"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_configuration(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config({}, "runs/x", debug={"inject": [text]})  # type: ignore[arg-type]
    assert complaint in str(caught.value)
