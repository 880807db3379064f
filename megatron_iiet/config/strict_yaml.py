"""YAML as a person reads it: the scalar rules of YAML 1.2, no duplicate keys, line numbers for messages.

PyYAML follows YAML 1.1, where ``3e-4`` is a text, ``off`` is false, ``010`` is eight and the second of two
equal keys silently wins. Each of these has spoilt a training run somewhere.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_iiet.config.errors import ConfigError

# Tag, pattern of the whole scalar, and its possible first characters (PyYAML's index).
_SCALARS: list[tuple[str, str, list[str]]] = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),  # PyYAML files the empty scalar under ""
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    problem = f"the key '{key_node.value}' appears twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes a text where this module or a YAML 1.1 reader would take it for something else (``'off'``)."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)
_StrictDumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_document(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Parse one YAML document: the plain Python value, and the line (from 1) of each key of the first two
    levels, by dotted name.

    Raises:
        ConfigError: the text is no YAML or repeats a key; names ``source``, line and column.
    """
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"cannot read {source}{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    return data, _key_lines(node)


def _key_lines(node: yaml.Node | None, prefix: str = "", depth: int = 2) -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode) and depth:
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                lines[prefix + key_node.value] = key_node.start_mark.line + 1
                lines.update(_key_lines(value_node, f"{prefix}{key_node.value}.", depth - 1))
    return lines


def parse_value(text: str) -> Any:
    """Parse one value as it is written behind a command-line flag; what is no YAML stays a text."""
    try:
        return parse_document(text, "value")[0]
    except ConfigError:
        return text


def dump(data: Any) -> str:
    """Write plain data as YAML that :func:`parse_document` reads back unchanged."""
    return yaml.dump(data, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100)
