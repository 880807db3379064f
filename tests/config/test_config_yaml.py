"""The strict YAML dialect."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.strict_yaml import dump, parse_document, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("+2", 2), ("010", 10),
        ("1_000", "1_000"), ("0x1f", "0x1f"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"),
        ("off", "off"), ("yes", "yes"), ("n", "n"), ("True", True), ("false", False),
        ("null", None), ("~", None), ("", None), ("'3'", "3"), ("-.inf", -math.inf), ("[1, [2e1]]", [1, [20.0]]),
        ("e5", "e5"), ("1e", "1e"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_keys() -> None:
    data, lines = parse_document("a: 1\n\nb:\n  # words\n  c: {d: 1}\n", "x")
    assert data == {"a": 1, "b": {"c": {"d": 1}}}
    assert lines == {"a": 1, "b": 3, "b.c": 5}


def test_anchors_and_merge_keys() -> None:
    data = parse_document("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n", "x")[0]
    assert data["b"] == {"p": 1, "q": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "cannot read x (line 3, column 1): the key 'a' appears twice"),
        ("a: {b: 1, b: 2}\n", "cannot read x (line 1, column 11): the key 'b' appears twice"),
        ("a: b: c\n", "cannot read x (line 1, column 5): mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", "cannot read x (line 2, column 1): but found another document"),
        (
            "a: !!python/name:os.system\n",
            "cannot read x (line 1, column 4): could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("? [1]\n: 2\n", "cannot read x (line 1, column 3): found unhashable key"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "x")
    assert str(caught.value) == message


def test_control_characters_are_one_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document("a: \x00", "x")
    assert str(caught.value).startswith("cannot read x")
    assert "\n" not in str(caught.value)


def test_dump_quotes_what_would_change() -> None:
    for value in ("1e5", "off", "3", "null", "", "010", "1:30"):
        assert parse_value(dump({"k": value})) == {"k": value}
