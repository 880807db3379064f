"""The object ``solver`` of an exported ``config.json``: of our solver section what belongs to its kind, with
nothing left to resolve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import RunConfig, config_to_dict, iterations_per_layer
from megatron_iiet.config.schema import SolverConfig

_KEYS: dict[str, tuple[str, ...]] = {
    "euler": ("output_norm",),
    "dlcl": ("coefficient_init", "history_norm"),
    "weight-sharing": ("repeats", "key_values"),
    "rk2": ("stage_coefficients", "key_values"),
    "rk4": ("stage_coefficients", "key_values"),
    "pcformer": ("predictor_order", "coefficient_init", "key_values"),
    "paper": (
        "variant",
        "iterations",
        "predictor",
        "coefficient_init",
        "history_norm",
        "damping",
        "key_values",
    ),
    "released": ("variant", "iterations", "coefficient_init", "readout", "key_values"),
}
"""By kind, iiet by variant: what it reads of the section."""
_ALL = ("kind", *dict.fromkeys(key for keys in _KEYS.values() for key in keys))


def solver_to_fields(config: RunConfig) -> dict[str, Any]:
    """``config.solver`` for ``config.json``; ``iterations`` always lists a number for every layer."""
    solver = replace(
        config.solver,
        iterations=iterations_per_layer(config),
        coefficient_init=config.solver.resolved_coefficient_init,
    )
    section = config_to_dict(RunConfig(model=config.model, solver=solver))["solver"]
    keys = _KEYS[solver.variant if solver.kind == "iiet" else solver.kind]
    return {key: section[key] for key in ("kind", *keys)}


def solver_from_fields(fields: Any, layers: int, path: Path) -> dict[str, Any]:
    """The solver section that :func:`solver_to_fields` wrote to ``path`` for a model of ``layers`` layers.

    What is as it would be anyway is left to its default.

    Raises:
        ValueError: it is no such object; values are left to the configuration's own checks.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'{path}: solver is {fields!r}, but must be an object such as {{"kind": "euler"}}')
    if unknown := sorted(set(fields) - set(_ALL)):
        raise ValueError(f"{path}: solver has the unknown key '{unknown[0]}'; known are {', '.join(_ALL)}")
    needed = ["kind", *(["iterations"] if fields.get("kind") == "iiet" else [])]
    if missing := [key for key in needed if fields.get(key) is None]:
        raise ValueError(f"{path}: solver has no '{missing[0]}'; export the model again")
    section = {key: value for key, value in fields.items() if value is not None}
    iterations = section.get("iterations")
    if section["kind"] != "iiet":
        section.pop("iterations", None)  # says nothing where there is no corrector
    elif isinstance(iterations, list) and iterations == iterations[:1] * layers:
        section["iterations"] = iterations[0]
    default = SolverConfig(kind=section["kind"], variant=section.get("variant", "paper"))
    if section.get("coefficient_init") == default.resolved_coefficient_init:
        del section["coefficient_init"]
    return section
