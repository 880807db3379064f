"""How many corrector iterations each layer gets: the rules that decide it, and the record of a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Influence = Mapping[tuple[int, int], float]
"""Influence of iterations by (layer, iterate), see :mod:`megatron_iiet.models.diagnostics`."""

VERSION = 1
"""Of the plain form of a plan."""
_KEYS = ("iterations", "full", "method", "step", "budget", "influence")


def most_influential(influence: Influence, layers: int, evaluations: int) -> list[int]:
    """Iterations of every layer within ``evaluations`` evaluations of F over all layers (E-IIET, IIET paper,
    section 4, under a budget instead of a threshold).

    Every layer has its first evaluation; the others go to the iterations (iterates from 1 on) of largest
    influence. A layer gets as many as it has among them: weights are shared, so which ones does not matter.
    Of equal influences the earlier iterate comes first, then the lower layer.

    Raises:
        ValueError: fewer evaluations than layers, an unknown layer, or an influence that is not finite.
    """
    if evaluations < layers:
        raise ValueError(f"{evaluations} evaluations for {layers} layers; give at least one a layer")
    iterations = {key: value for key, value in influence.items() if key[1] >= 1}
    for (layer, iterate), value in iterations.items():
        if not 0 <= layer < layers:
            raise ValueError(f"influence of layer {layer} is given, but there are {layers} layers, from 0 on")
        if not math.isfinite(value):
            raise ValueError(f"influence of iteration {iterate} of layer {layer} is {value}, not a number")
    ranked = sorted(iterations, key=lambda key: (-iterations[key], key[1], key[0]))
    counts = [0] * layers
    for layer, _ in ranked[: evaluations - layers]:
        counts[layer] += 1
    return counts


def even_iterations(layers: int, evaluations: int) -> list[int]:
    """Iterations as equal as ``evaluations`` over all layers allow, those left over spread over the depth.

    What to do while nothing is known: it favours neither end of the model, and keeps pipeline stages level.
    """
    extra = evaluations - layers
    return [(n + 1) * extra // layers - n * extra // layers for n in range(layers)]


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
    """How the plan was made, in a word: ``budget`` for :func:`most_influential`."""
    step: int | None = None
    """Optimizer steps after which it was made."""
    budget: float | None = None
    """Share of the evaluations of full iterations that was allowed."""
    influence: dict[tuple[int, int], float] | None = None
    """What was measured, by (layer, iterate)."""

    def __post_init__(self) -> None:
        if not self.iterations:
            raise ValueError("iterations is empty; give one number a layer")
        if min(self.iterations) < 0 or max(self.iterations) > self.full:
            raise ValueError(
                f"iterations is {list(self.iterations)}, but must lie between 0 and full = {self.full}"
            )
        for layer, iterate in self.influence or ():
            if not (0 <= layer < len(self.iterations) and 0 <= iterate <= self.full):
                raise ValueError(
                    f"influence names iterate {iterate} of layer {layer}, but the plan has "
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
        influence = self.influence
        return {
            "version": VERSION,
            "iterations": list(self.iterations),
            "full": self.full,
            "method": self.method,
            "step": self.step,
            "budget": self.budget,
            "influence": None if influence is None else [[*key, value] for key, value in influence.items()],
        }

    @classmethod
    def from_data(cls, data: Any, *, layers: int, source: str) -> IterationPlan:
        """Read :meth:`to_data`'s form of a plan for a model of ``layers`` layers; ``step``, ``budget`` and
        ``influence`` may be absent. ``source`` is how messages name it.

        Raises:
            ValueError: it is no plan, one of another version, or for another depth.
        """
        if not isinstance(data, Mapping) or "version" not in data:
            raise ValueError(f"{source} is not an iteration plan: it holds no 'version'")
        if data["version"] != VERSION:
            raise ValueError(
                f"{source} is an iteration plan of version {data['version']}, but version {VERSION} is read "
                "here; use the release that wrote it"
            )
        unknown = sorted(set(data) - {"version", *_KEYS})
        missing = [key for key in _KEYS[:3] if data.get(key) is None]
        if unknown or missing:
            what = f"has the unknown key '{unknown[0]}'" if unknown else f"lacks '{missing[0]}'"
            raise ValueError(f"{source} {what}; an iteration plan has version, {', '.join(_KEYS)}")
        try:
            values = {key: _READERS[key](data[key]) for key in _KEYS if data.get(key) is not None}
            if len(values["iterations"]) in (0, layers):
                return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source} is not a usable iteration plan: {error}") from None
        raise ValueError(
            f"{source} is an iteration plan for {len(values['iterations'])} layers, but the model has "
            f"{layers}; use a plan made for this model"
        )


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} stands where a whole number must be")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} stands where a number must be")
    return float(value)


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} stands where a list must be")
    return value


def _text(value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{value!r} stands where a text must be")
    return value


def _influence(value: Any) -> dict[tuple[int, int], float]:
    rows = [_list(row) for row in _list(value)]
    if any(len(row) != 3 for row in rows):
        raise ValueError("influence must list [layer, iterate, value] triples")
    return {(_whole(layer), _whole(iterate)): _number(number) for layer, iterate, number in rows}


_READERS: dict[str, Callable[[Any], Any]] = {
    "iterations": lambda value: tuple(map(_whole, _list(value))),
    "full": _whole,
    "method": _text,
    "step": _whole,
    "budget": _number,
    "influence": _influence,
}
