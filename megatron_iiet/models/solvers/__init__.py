"""Solvers: how a layer's increment function F is integrated from y_n to y_{n+1}. One file a family."""

from __future__ import annotations

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.models.solvers.base import IncrementFn, Solver
from megatron_iiet.models.solvers.euler import Euler
from megatron_iiet.models.solvers.implicit_euler import DLCL, ImplicitEuler
from megatron_iiet.models.solvers.released import ReleasedImplicitEuler

__all__ = ["DLCL", "Euler", "ImplicitEuler", "IncrementFn", "ReleasedImplicitEuler", "Solver", "build_solver"]


def build_solver(config: RunConfig, layer: int, backend: str) -> Solver:
    """The solver of layer ``layer`` (0-based) that ``config.solver`` describes."""
    solver = config.solver
    if solver.kind == "euler":
        return Euler()
    init = solver.resolved_coefficient_init
    if solver.kind == "dlcl":
        return DLCL(layer, coefficient_init=init, backend=backend)
    r = iterations_per_layer(config)[layer]
    if solver.variant == "released":
        return ReleasedImplicitEuler(
            layer,
            config.model.num_layers,
            width=config.model.hidden_size,
            iterations=r,
            coefficient_init=init,
            backend=backend,
        )
    return ImplicitEuler(
        layer, iterations=r, predictor=solver.predictor, coefficient_init=init, backend=backend
    )
