"""``model.rope_scaling``: how rotary positions reach beyond the length a model was first trained on. Names
and definitions are those of transformers; the arithmetic is in :mod:`megatron_iiet.models.rope`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from megatron_iiet.config.errors import ConfigError

KEY = "model.rope_scaling"


@dataclass(frozen=True)
class RopeScaling:
    """One kind; its keys are its fields."""

    kind: ClassVar[str]

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in a configuration: its kind, and the keys that are not at their default."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return {"kind": self.kind, **given}


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions divided by a factor."""

    kind = "linear"
    factor: float


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Low frequencies divided by a factor, high ones left, those between in between (LLaMA 3.1)."""

    kind = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): as llama3 with a linear ramp, and cosines and sines times a factor."""

    kind = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Null: from factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.kind: scaling for scaling in (LinearScaling, Llama3Scaling, YarnScaling)
}


def read_rope_scaling(
    value: Mapping[str, Any] | None, where: str = KEY, kind_key: str = "kind"
) -> RopeScaling | None:
    """The scaling that an object describes; None for null and for kind ``none``.

    ``where``: how messages name the object; ``kind_key``: what it calls its kind.

    Raises:
        ConfigError: the kind is unknown, a key is missing, unknown, or has a value that it cannot have.
    """
    if value is None:
        return None
    given = dict(value)
    kind = given.pop(kind_key, None)
    if kind == "none" and not given:
        return None
    if kind not in ROPE_SCALINGS:
        shown = "missing" if kind is None else repr(kind)
        raise ConfigError(
            f"{where}.{kind_key} is {shown}; supported are {', '.join(map(repr, ROPE_SCALINGS))}"
        )
    declared = ROPE_SCALINGS[kind]
    known = {f.name: f for f in fields(declared)}
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(
            f"{where} has the key '{unknown[0]}', which {kind_key} {kind} does not have; its keys are "
            f"{', '.join(known)}"
        )
    given = {name: number for name, number in given.items() if number is not None}
    missing = [name for name, f in known.items() if f.default is MISSING and name not in given]
    if missing:
        raise ConfigError(f"{where} has no '{missing[0]}', which {kind_key} {kind} needs; give it")
    for name, number in given.items():
        given[name] = _checked(f"{where}.{name}", number, known[name].type)
    _check_order(given, where)
    return declared(**given)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if hint == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, but must be true or false")
        return value
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not (number and math.isfinite(value) and value > 0 and (hint != "int" or value == int(value))):
        wanted = "a whole number" if hint == "int" else "a number"
        raise ConfigError(f"{name} is {value!r}, but must be {wanted} greater than 0")
    return int(value) if hint == "int" else float(value)


def _check_order(given: Mapping[str, Any], where: str) -> None:
    """Between two bounds there must be room for what lies in between."""
    bounds = (("low_freq_factor", None, "high_freq_factor", None), ("beta_slow", 1.0, "beta_fast", 32.0))
    for low, low_default, high, high_default in bounds:
        if low not in given and high not in given:
            continue
        one, other = given.get(low, low_default), given.get(high, high_default)
        if one >= other:
            raise ConfigError(f"{where}.{low} is {one:g}, but must be less than {high} = {other:g}")
