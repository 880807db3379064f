"""Solvers: how a layer's increment function F is integrated from y_n to y_{n+1}. One file a family; their
keys are declared in :mod:`megatron_iiet.config.solvers`."""

from __future__ import annotations

from typing import Any

from megatron_iiet.config import RunConfig, solvers
from megatron_iiet.models.solvers.base import IncrementFn, Place, Solver
from megatron_iiet.models.solvers.euler import Euler, WeightSharing
from megatron_iiet.models.solvers.implicit_euler import DLCL, ImplicitEuler
from megatron_iiet.models.solvers.pcformer import PCformer
from megatron_iiet.models.solvers.released import ReleasedImplicitEuler
from megatron_iiet.models.solvers.runge_kutta import RungeKutta

__all__ = ["IncrementFn", "ReleasedImplicitEuler", "Solver", "build_solver"]

_MODULES: dict[type[solvers.SolverConfig], type[Solver[Any]]] = {
    solvers.Euler: Euler,
    solvers.DLCL: DLCL,
    solvers.WeightSharing: WeightSharing,
    solvers.RungeKutta2: RungeKutta,
    solvers.RungeKutta4: RungeKutta,
    solvers.PCformer: PCformer,
    solvers.IIET: ImplicitEuler,
    solvers.ReleasedIIET: ReleasedImplicitEuler,
}


def build_solver(config: RunConfig, layer: int, backend: str) -> Solver[Any]:
    """The solver of layer ``layer`` (0-based) that ``config.solver`` declares."""
    model = config.model
    place = Place(layer, model.num_layers, model.hidden_size, backend)
    return _MODULES[type(config.solver)](config.solver, place)
