"""Sections whose keys depend on their kind: a dataclass declares each kind, and loading, validation,
``--help`` and what a resumed run may not change are derived from it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Generic, Literal, TypeVar, Union

from megatron_iiet.config.changes import Change, key


def name_of_kind(kind: str) -> Any:
    """The field that names a declaration; nobody sets it."""
    return field(default=kind, init=False, metadata=key(kind, Change.FUNCTION).metadata)


@dataclass
class Declaration:
    """One kind: its keys are its fields, its docstring says what it is."""

    kind: str = name_of_kind("")
    """What YAML files and exports call it."""

    @property
    def system(self) -> str:
        """What tells one declaration from another, in the words of the keys."""
        return f"kind {self.kind}"


D = TypeVar("D", bound=Declaration)


@dataclass(frozen=True, eq=False)
class Kinds(Generic[D]):
    """The declarations of a section, in the order of --help. Of two of a kind the first is meant where no
    variant is named."""

    section: str
    """Its name."""
    noun: str
    """What a declaration is one of, in messages: ``a solver``."""
    declarations: tuple[type[D], ...]
    default: type[D]
    """The one in force where a run names none."""
    flat: frozenset[str] = frozenset()
    """The keys that every kind had in the configurations which older versions wrote; those of other kinds
    there are nobody's mistake. Empty: there are no such files."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """What stood for a key there, before there was one."""

    def __iter__(self) -> Iterator[type[D]]:
        return iter(self.declarations)

    @cached_property
    def types(self) -> dict[str, Any]:
        """The type of every key of the section, of all declarations; those that name one come first."""
        found: dict[str, list[Any]] = {}
        named = [(name, Literal[value]) for declared in self for name, value in name_fields(declared).items()]
        own = [pair for declared in self for pair in own_keys(declared).items()]
        for name, hint in [*named, *own]:
            found.setdefault(name, []).append(hint)
        return {name: _union(hints) for name, hints in found.items()}

    @cached_property
    def fields(self) -> dict[str, Field[Any]]:
        """Every key of the section as one of the declarations has it, in the order of :attr:`types`."""
        found = {f.name: f for declared in self for f in fields(declared)}
        return {name: found[name] for name in self.types}

    def find(self, kind: str, variant: str | None = None) -> type[D] | None:
        """The declaration of a kind, and of a variant of it where it has several (None: the first)."""
        for declared in self:
            names = name_fields(declared)
            if names["kind"] == kind and (variant is None or names.get("variant", variant) == variant):
                return declared
        return None

    def systems_with(self, name: str) -> list[str]:
        """What has a key, in the words of the keys: ``kind rk2``, or ``kind iiet, variant paper`` where
        another variant of the kind has not."""
        found = []
        for kind in dict.fromkeys(name_fields(declared)["kind"] for declared in self):
            of_kind = [declared for declared in self if name_fields(declared)["kind"] == kind]
            having = [
                declared for declared in of_kind if name in (*own_keys(declared), *name_fields(declared))
            ]
            found += [f"kind {kind}"] if having == of_kind else [declared().system for declared in having]
        return found


def name_fields(declared: type[Declaration]) -> dict[str, str]:
    """What names a declaration: ``kind``, and ``variant`` where a kind has several."""
    return {f.name: str(f.default) for f in fields(declared) if not f.init}


@cache
def _type_hints(declared: Any) -> dict[str, Any]:
    return typing.get_type_hints(declared)


def own_keys(declared: type[Declaration]) -> dict[str, Any]:
    """The keys of a declaration, each with its type."""
    hints = _type_hints(declared)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    return {f.name: hints[f.name] for f in fields(declared) if f.init}


def _union(hints: Sequence[Any]) -> Any:
    if all(typing.get_origin(hint) is Literal for hint in hints):
        return Literal[tuple(dict.fromkeys(choice for hint in hints for choice in typing.get_args(hint)))]
    return Union[tuple(hints)]  # noqa: UP007
