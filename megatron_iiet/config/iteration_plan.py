"""How many corrector iterations each layer gets: the record of a decision, as a file and in checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from megatron_iiet import durable

Influence = Mapping[tuple[int, int], float]
"""Influence of iterations by (layer, iterate), see :mod:`megatron_iiet.models.diagnostics`."""
Ranking = Literal["cosine", "loss"]
"""What iterations are ranked by: their influence, or what the loss rises by without them."""

SUFFIX = ".json"
"""How the name of a plan's file ends."""
VERSION = 2
"""Of the plain form of a plan."""
_READABLE = (1, 2)  # 1 had no threshold, ranking, loss_increase and measured_on


@dataclass(frozen=True)
class IterationPlan:
    """Corrector iterations r_n of every layer, and where they come from.

    Raises:
        ValueError: the values are not a plan.
    """

    iterations: tuple[int, ...]
    """r_n of every layer."""
    full: int
    """Iterations that every layer had when influence was measured, the most that a layer can get."""
    method: str
    """How the plan was made, in a word: ``budget`` and ``flops-ratio`` for
    :func:`megatron_iiet.models.iterations.most_influential`, ``threshold`` for its ``above_threshold``,
    ``lower-bound`` for no iterations at all."""
    step: int | None = None
    """Optimizer steps after which it was made."""
    budget: float | None = None
    """Share of the evaluations of full iterations that was allowed."""
    influence: dict[tuple[int, int], float] | None = None
    """What was measured, by (layer, iterate)."""
    threshold: float | None = None
    """Influence that an iteration needed to stay."""
    ranking: Ranking = "cosine"
    """What decided which iterations stay."""
    loss_increase: dict[tuple[int, int], float] | None = None
    """What the loss rises by, in nats per token, where a layer ends with the iterate before, by (layer,
    iterate)."""
    measured_on: dict[str, str | int] | None = None
    """The model and the text that it was measured on, and how much of that."""

    def __post_init__(self) -> None:
        if not self.iterations:
            raise ValueError("iterations is empty; give one number a layer")
        if min(self.iterations) < 0 or max(self.iterations) > self.full:
            raise ValueError(
                f"iterations is {list(self.iterations)}, but must lie between 0 and full = {self.full}"
            )
        for name in ("influence", "loss_increase"):
            for layer, iterate in getattr(self, name) or ():
                if not (0 <= layer < len(self.iterations) and 0 <= iterate <= self.full):
                    raise ValueError(
                        f"{name} names iterate {iterate} of layer {layer}, but the plan has "
                        f"{len(self.iterations)} layers and full = {self.full}"
                    )

    @property
    def evaluations(self) -> int:
        """Evaluations of F over all layers."""
        return sum(self.iterations) + len(self.iterations)

    @property
    def full_evaluations(self) -> int:
        """The same with full iterations in every layer."""
        return (self.full + 1) * len(self.iterations)

    def to_data(self) -> dict[str, Any]:
        """Plain data that JSON and :meth:`from_data` read back unchanged."""
        plain = {"version": VERSION} | {each.name: getattr(self, each.name) for each in fields(self)}
        triples = {name: _triples(plain[name]) for name in ("influence", "loss_increase")}
        return {**plain, **triples, "iterations": list(self.iterations)}

    @classmethod
    def from_data(cls, data: Any, *, layers: int | None = None, source: str) -> IterationPlan:
        """Read :meth:`to_data`'s form of a plan for a model of ``layers`` layers (None: of any number); what
        has a default may be absent. ``source`` is how messages name it.

        Raises:
            ValueError: it is no plan, one of another version, or for another depth.
        """
        if not isinstance(data, Mapping) or "version" not in data:
            raise ValueError(f"{source} is not an iteration plan: it holds no 'version'")
        if data["version"] not in _READABLE:
            raise ValueError(
                f"{source} is an iteration plan of version {data['version']}, but versions up to {VERSION} "
                "are read here; use the release that wrote it"
            )
        unknown = sorted(set(data) - {"version", *_READERS})
        missing = [key for key in _REQUIRED if data.get(key) is None]
        if unknown or missing:
            what = f"has the unknown key '{unknown[0]}'" if unknown else f"lacks '{missing[0]}'"
            raise ValueError(f"{source} {what}; an iteration plan has version, {', '.join(_READERS)}")
        try:
            values = {key: read(data[key]) for key, read in _READERS.items() if data.get(key) is not None}
            if layers is None or len(values["iterations"]) in (0, layers):
                return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source} is not a usable iteration plan: {error}") from None
        raise ValueError(depth_sentence(source, len(values["iterations"]), layers))

    def write(self, path: str | Path) -> None:
        """Write the plan's file, whole or not at all."""
        durable.write_text(Path(path), json.dumps(self.to_data(), indent=2) + "\n")

    @classmethod
    def read(cls, path: str | Path, *, layers: int | None = None) -> IterationPlan:
        """Read a file that :meth:`write` wrote.

        Raises:
            ValueError: as :meth:`from_data`, or there is no such file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"cannot read the iteration plan {path}: {error.strerror}; tools/iteration_influence.py "
                "makes one"
            ) from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not an iteration plan: it is not a UTF-8 text") from None
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError(f"{path} is not an iteration plan: it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not an iteration plan: it is not JSON ({error.msg} in line {error.lineno})"
            ) from None
        return cls.from_data(data, layers=layers, source=str(path))


def depth_sentence(source: str, of_plan: int, of_model: int) -> str:
    """What to say of a plan for another depth."""
    return (
        f"{source} is an iteration plan for {of_plan} layers, but the model has {of_model}; use a plan made "
        "for this model"
    )


def _triples(values: Influence | None) -> list[list[float]] | None:
    return None if values is None else [[*key, value] for key, value in values.items()]


def _of_type(value: Any, kind: type | tuple[type, ...], described: str) -> Any:
    """``value``, if it is of this type; a bool is no number, an empty text no text."""
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise ValueError(f"{value!r} stands where {described} must be")
    return value


def _number(value: Any) -> float:
    number = float(_of_type(value, (int, float), "a number"))
    if not math.isfinite(number):
        raise ValueError(f"{value!r} stands where a number must be")
    return number


_integer = partial(_of_type, kind=int, described="a whole number")
_list = partial(_of_type, kind=list, described="a list")
_text = partial(_of_type, kind=str, described="a text")


def _values(value: Any, key: str) -> dict[tuple[int, int], float]:
    rows = [_list(row) for row in _list(value)]
    if any(len(row) != 3 for row in rows):
        raise ValueError(f"{key} must list [layer, iterate, value] triples")
    return {(_integer(layer), _integer(iterate)): _number(number) for layer, iterate, number in rows}


def _ranking(value: Any) -> Ranking:
    if value not in get_args(Ranking):
        raise ValueError(f"ranking is {value!r}, but must be one of {', '.join(get_args(Ranking))}")
    return cast(Ranking, value)


def _facts(value: Any) -> dict[str, str | int]:
    facts = _of_type(value, dict, "a mapping")
    return {key: fact if isinstance(fact, str) else _integer(fact) for key, fact in facts.items()}


_READERS: dict[str, Callable[[Any], Any]] = {
    "iterations": lambda value: tuple(map(_integer, _list(value))),
    "full": _integer,
    "method": _text,
    "step": _integer,
    "budget": _number,
    "influence": lambda value: _values(value, "influence"),
    "threshold": _number,
    "ranking": _ranking,
    "loss_increase": lambda value: _values(value, "loss_increase"),
    "measured_on": _facts,
}
_REQUIRED = ("iterations", "full", "method")
