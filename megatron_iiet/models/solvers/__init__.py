"""Solvers: how a layer's increment function F is integrated from y_n to y_{n+1}. One file a family."""

from __future__ import annotations

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.models.solvers.base import IncrementFn, Solver
from megatron_iiet.models.solvers.euler import Euler
from megatron_iiet.models.solvers.implicit_euler import DLCL, ImplicitEuler
from megatron_iiet.models.solvers.pcformer import PCformer
from megatron_iiet.models.solvers.released import ReleasedImplicitEuler
from megatron_iiet.models.solvers.runge_kutta import RungeKutta
from megatron_iiet.models.solvers.weight_sharing import WeightSharing

__all__ = [
    "DLCL",
    "Euler",
    "ImplicitEuler",
    "IncrementFn",
    "PCformer",
    "ReleasedImplicitEuler",
    "RungeKutta",
    "Solver",
    "WeightSharing",
    "build_solver",
]


def build_solver(config: RunConfig, layer: int, backend: str) -> Solver:
    """The solver of layer ``layer`` (0-based) that ``config.solver`` describes."""
    solver = config.solver
    if solver.kind == "euler":
        return Euler(config.model.hidden_size, solver.output_norm)
    if solver.kind == "weight-sharing":
        return WeightSharing(solver.repeats, backend=backend)
    if solver.kind in ("rk2", "rk4"):
        return RungeKutta(
            int(solver.kind[-1]),
            stage_coefficients=solver.stage_coefficients,
            width=config.model.hidden_size,
            backend=backend,
        )
    init = solver.resolved_coefficient_init
    if solver.kind == "pcformer":
        return PCformer(layer, order=solver.predictor_order, coefficient_init=init, backend=backend)
    if solver.kind == "dlcl":
        return DLCL(layer, coefficient_init=init, history_norm=solver.history_norm, backend=backend)
    r = iterations_per_layer(config)[layer]
    if solver.variant == "released":
        return ReleasedImplicitEuler(
            layer,
            config.model.num_layers,
            width=config.model.hidden_size,
            iterations=r,
            coefficient_init=init,
            readout=solver.readout,
            backend=backend,
        )
    return ImplicitEuler(
        layer,
        iterations=r,
        predictor=solver.predictor,
        damping=solver.damping,
        coefficient_init=init,
        history_norm=solver.history_norm,
        backend=backend,
    )
