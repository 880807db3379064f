"""The object ``solver`` of an exported ``config.json``: of our solver section what says something of the
trained model, with nothing left to resolve."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.config.kinds import own_keys
from megatron_iiet.config.solvers import SOLVERS, Iterating, Merging, SolverConfig


def exported_fields(solver: type[SolverConfig]) -> dict[str, Any]:
    """What an export says of a solver, with defaults: its names, and all keys but those about training."""
    exported = [f for f in fields_of(solver) if f.metadata.get("exported", True)]
    return {f.name: f.default for f in exported}


def solver_to_fields(config: RunConfig) -> dict[str, Any]:
    """``config.solver`` for ``config.json``; ``iterations`` always lists a number for every layer."""
    solver = config.solver
    if isinstance(solver, Merging):
        solver = replace(solver, coefficient_init=solver.resolved_coefficient_init)
    if isinstance(solver, Iterating):
        solver = replace(solver, iterations=iterations_per_layer(config))
    return {name: getattr(solver, name) for name in exported_fields(type(solver))}


def solver_from_fields(fields: Any, layers: int, path: Path) -> dict[str, Any]:
    """The solver section that :func:`solver_to_fields` wrote to ``path`` for a model of ``layers`` layers.

    What is as it would be anyway is left to its default. A key of the kind's other variant that has its
    default, as older versions wrote it, is left out with a warning.

    Raises:
        ValueError: it is no such object; values are left to the configuration's own checks.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'{path}: solver is {fields!r}, but must be an object such as {{"kind": "euler"}}')
    known = [name for name in SOLVERS.types if name != "schedule"]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{path}: solver has the unknown key '{unknown[0]}'; known are {', '.join(known)}")
    section = {key: value for key, value in fields.items() if value is not None}
    if "kind" not in section:
        raise ValueError(f"{path}: solver has no 'kind'; export the model again")
    declared = SOLVERS.find(section["kind"], section.get("variant"))
    if declared is None:
        return section  # for the configuration's own checks to name
    if "iterations" in own_keys(declared) and "iterations" not in section:
        raise ValueError(f"{path}: solver has no 'iterations'; export the model again")
    variants = [exported_fields(solver) for solver in SOLVERS if solver().kind == section["kind"]]
    for key in [key for key in section if key not in exported_fields(declared)]:
        if any(defaults.get(key) == section[key] for defaults in variants):
            what = f"{path}: solver.{key} is {section.pop(key)!r}"
            warnings.warn(f"{what}, which {declared().system} does not have; it is left out", stacklevel=2)
    iterations = section.get("iterations")
    if isinstance(iterations, list) and iterations == iterations[:1] * layers:
        section["iterations"] = iterations[0]
    if issubclass(declared, Merging) and section.get("coefficient_init") == declared.default_init:
        del section["coefficient_init"]
    return section
