"""The dotted names of all configuration keys, their types in words, and the closest name to a typo."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from megatron_iiet.config.changes import Change, change_of_field
from megatron_iiet.config.schema import KINDS, RunConfig

SIMILARITY_CUTOFF = 0.6
"""difflib ratio below which a suggestion would puzzle more than it helps."""
TIE_MARGIN = 0.05
"""Candidates this close to the best one are all named (``interval`` exists in three sections)."""
MAX_SUGGESTIONS = 3


@cache
def _leaves() -> dict[str, tuple[Any, Field[Any]]]:
    """Type and field of every leaf key, by dotted name, in the order of the schema."""
    found: dict[str, tuple[Any, Field[Any]]] = {}
    hints = typing.get_type_hints(RunConfig)
    for name, own in RunConfig.__dataclass_fields__.items():
        if name in KINDS:
            kinds = KINDS[name]
            found |= {f"{name}.{leaf}": (hint, kinds.fields[leaf]) for leaf, hint in kinds.types.items()}
        elif name in section_names():
            types = typing.get_type_hints(hints[name])
            found |= {f"{name}.{leaf.name}": (types[leaf.name], leaf) for leaf in fields(hints[name])}
        else:
            found[name] = hints[name], own
    return found


@cache
def key_types() -> dict[str, Any]:
    """Type of every leaf key, by dotted name, in the order of the schema."""
    return {key: hint for key, (hint, _) in _leaves().items()}


@cache
def key_changes() -> dict[str, Change]:
    """What a change of every leaf key means to a run that has checkpoints, by dotted name.

    Raises:
        TypeError: a key was declared without.
    """
    return {key: change_of_field(leaf) for key, (_, leaf) in _leaves().items()}


@cache
def section_types() -> dict[str, Any]:
    """The sections, the fields of :class:`RunConfig` that are dataclasses themselves, by name."""
    return {name: hint for name, hint in typing.get_type_hints(RunConfig).items() if is_dataclass(hint)}


def section_names() -> tuple[str, ...]:
    """Their names."""
    return tuple(section_types())


def _similarity(word: str, candidate: str) -> float:
    full = difflib.SequenceMatcher(None, word, candidate).ratio()
    # A right key in the wrong section (or in none) must be found too: compare the last parts, at a
    # discount so that a match of the whole name wins.
    leaf = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return max(full, 0.95 * leaf)


def did_you_mean(
    word: str, candidates: Iterable[str], prefix: str = "", cutoff: float = SIMILARITY_CUTOFF
) -> str:
    """The tail of an error message: ``; did you mean 'a' or 'b'?``, of up to three candidates that are like
    ``word``, the best first, or empty when nothing is; dotted names also match by their last part."""
    scores = {candidate: _similarity(word, candidate) for candidate in candidates}
    best = max(scores.values(), default=0.0)
    if best < cutoff:
        return ""
    near = [candidate for candidate, score in scores.items() if score >= best - TIE_MARGIN]
    near = sorted(near, key=lambda candidate: -scores[candidate])[:MAX_SUGGESTIONS]
    return f"; did you mean {join_words([repr(prefix + name) for name in near])}?"


def join_words(words: list[str], last: str = "or") -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def describe_type(hint: Any, plural: bool = False) -> str:
    """A type in a user's words: ``an integer or a list of integers``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or origin in (Union, types.UnionType):
        return join_words(list(dict.fromkeys(_alternatives(hint, plural))))
    if origin is list:
        return f"{'lists' if plural else 'a list'} of {describe_type(arguments[0], plural=True)}"
    if origin is dict:
        key, value = (describe_type(argument, plural=True) for argument in arguments)
        return f"{'mappings' if plural else 'a mapping'} of {key} to {value}"
    if origin is tuple:
        parts = ", ".join(describe_type(argument).split(" ", 1)[-1] for argument in arguments)
        return f"[{parts}] pairs" if plural else f"a pair [{parts}]"
    singular, several = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
        str: ("a text", "texts"),
        type(None): ("null", "null"),
    }[hint]
    return several if plural else singular


def _alternatives(hint: Any, plural: bool) -> list[str]:
    if get_origin(hint) is Literal:
        return [f"'{value}'" if isinstance(value, str) else str(value) for value in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return [words for argument in get_args(hint) for words in _alternatives(argument, plural)]
    return [describe_type(hint, plural)]


def literal_choices(hint: Any) -> list[str]:
    """The texts a type allows literally, also inside a union; empty for open types."""
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if isinstance(value, str)]
    if get_origin(hint) in (Union, types.UnionType):
        return [choice for argument in get_args(hint) for choice in literal_choices(argument)]
    return []


def allows_null(hint: Any) -> bool:
    """Whether null is a value of this type."""
    return hint is type(None) or type(None) in get_args(hint)
