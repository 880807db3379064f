"""Ways to solve the corrector's equation z = g(z) of one layer, counted in evaluations of F.

    variant paper       z = y_{n+1},  g(y) = base + α F(y)
    variant released    z = L_n,      g(L) = LN(h + F(h)) with h = base + W[n,n] L

A method is a generator of (evaluations of F spent, iterate), the predictor's first. What mixes iterates does
so token by token: one least-squares problem a sequence would let later tokens decide about earlier ones. For
the same reason GMRES, whose inner products run over the tokens that attention couples, is here to show what
Newton could reach, and no model can use it.

Shapes: B batch, T sequence, D hidden, M differences that Anderson remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_iiet.config.solvers import IIET
from megatron_iiet.models import Transformer
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers import IncrementFn, ReleasedImplicitEuler, Solver

Iterates = Iterator[tuple[int, Tensor]]
ANDERSON_RIDGE = 1e-8  # share of the Gram matrix' trace


@dataclass(frozen=True)
class Problem:
    """One layer's z = g(z)."""

    map: Callable[[Tensor], Tensor]
    """g, one evaluation of F; [B, T, D]."""
    start: Tensor
    """z^0, for which the predictor spent one evaluation."""
    before: Tensor | None
    """A point with map(before) = start, if there is one."""
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]
    """What the layer returns if z is its solution: the input of the next layer and the increment to keep."""


Method = Callable[[Problem], Iterates]


def problem_of(solver: Solver, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> Problem:
    """The equation that ``solver`` iterates on; the predictor's evaluation is done here.

    Raises:
        ValueError: it has no corrector, or its predictor is not the merged one.
    """
    if isinstance(solver, ReleasedImplicitEuler):
        return _released(solver, y_BTD, increment_fn, history)
    declared = solver.declared
    if not (isinstance(declared, IIET) and declared.merge and declared.predictor == "merged"):
        raise ValueError(
            f"the model's solver is {type(solver).__name__}, which has no fixed point to study; give a "
            "model of solver.kind iiet, with solver.predictor merged"
        )
    (base,) = history.merge(y_BTD, (solver.coefficients,), solver.merged_entries)
    own = solver.coefficients[-1]

    def corrector(y: Tensor) -> Tensor:
        return base + own * increment_fn(y, None, 0)

    def finish(y: Tensor) -> tuple[Tensor, Tensor]:
        return y, solver.kept((y - base) / own)

    return Problem(corrector, corrector(y_BTD), y_BTD, finish)


def _released(
    solver: ReleasedImplicitEuler, y_BTD: Tensor, increment_fn: IncrementFn, history: History
) -> Problem:
    n, readout = (
        solver.merged_entries,
        solver.coefficients if solver.shares_row else solver.readout_coefficients,
    )
    base, readout_base = history.merge(None, (solver.coefficients, readout), n)
    start = solver.predictor_norm(y_BTD + increment_fn(y_BTD, None, 0))

    def corrector(output: Tensor) -> Tensor:
        h = base + solver.coefficients[n] * output
        return solver.corrector_norm(h + increment_fn(h, None, 0))

    return Problem(corrector, start, None, lambda output: (readout_base + readout[n] * output, output))


def picard(problem: Problem) -> Iterates:
    """The plain iteration, z ← g(z)."""
    return damped(problem, 1.0)


def damped(problem: Problem, omega: float) -> Iterates:
    """z ← (1 − ω) z + ω g(z)."""
    z, spent = problem.start, 1
    while True:
        yield spent, z
        z, spent = torch.lerp(z, problem.map(z), omega), spent + 1


def anderson(problem: Problem, memory: int) -> Iterates:
    """Anderson acceleration (type II, no damping): of the last ``memory`` differences the combination that
    makes the residual smallest, token by token. Where the predictor was an evaluation of g, it counts."""
    z, spent = problem.start, 1
    points = [] if problem.before is None else [problem.before]
    images = [] if problem.before is None else [problem.start]
    while True:
        yield spent, z
        points.append(z)
        images.append(problem.map(z))
        spent += 1
        del points[: -memory - 1], images[: -memory - 1]
        z = images[-1]
        if len(points) > 1:
            residuals = torch.stack([image - point for image, point in zip(images, points, strict=True)], -2)
            stacked = torch.stack(images, -2)
            by = residuals[..., -1:, :] - residuals[..., :-1, :]  # [B, T, M, D]
            gram = (by @ by.mT).double()
            ridge = ANDERSON_RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-30
            gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=torch.float64)
            right = (by @ residuals[..., -1:, :].mT).double()
            weights = torch.linalg.solve(gram, right).to(z.dtype)
            z = z - ((stacked[..., -1:, :] - stacked[..., :-1, :]) * weights).sum(-2)


def newton_neumann(problem: Problem, terms: int) -> Iterates:
    """Newton's step (I − J) δ = g(z) − z by ``terms`` of the series I + J + J² + …, which keeps every token's
    step a function of its past. A product with J is two evaluations."""
    z, spent = problem.start, 1
    while True:
        yield spent, z
        step = residual = problem.map(z) - z
        for _ in range(terms):
            step = residual + jvp(problem.map, z, step)
        z, spent = z + step, spent + 1 + 2 * terms


def newton_gmres(problem: Problem, size: int) -> Iterates:
    """Newton's step by GMRES: the best of a Krylov space of ``size`` for each sequence. Not causal."""
    z, spent = problem.start, 1
    while True:
        yield spent, z
        residual = problem.map(z) - z
        basis, images = [residual], []
        for _ in range(size):
            direction = basis[-1] / basis[-1].flatten(1).norm(dim=1)[:, None, None]
            basis[-1] = direction
            images.append(direction - jvp(problem.map, z, direction))
            basis.append(images[-1])
        matrix = torch.stack([image.flatten(1) for image in images], -1)  # [B, T D, size]
        weights = torch.linalg.lstsq(matrix, residual.flatten(1).unsqueeze(-1)).solution
        z = z + (torch.stack(basis[:-1], -1).flatten(1, 2) @ weights).view_as(z)
        spent += 1 + 2 * size


def jvp(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    """The derivative of ``function`` in a direction."""
    return torch.func.jvp(function, (at,), (direction,))[1]  # type: ignore[no-any-return]


METHODS: dict[str, Method] = {
    "Picard": picard,
    "damped 0.75": partial(damped, omega=0.75),
    "damped 0.5": partial(damped, omega=0.5),
    "damped 0.25": partial(damped, omega=0.25),
    "Anderson 1": partial(anderson, memory=1),
    "Anderson 2": partial(anderson, memory=2),
    "Anderson 3": partial(anderson, memory=3),
    "Newton, Neumann 1": partial(newton_neumann, terms=1),
    "Newton, Neumann 3": partial(newton_neumann, terms=3),
}
"""What a model could use."""
NEWTON_STEP = {"Newton, Neumann 1": 3, "Newton, Neumann 3": 7}
"""Evaluations of one step, where it is more than one."""
ANALYSIS_ONLY: dict[str, Method] = {
    "Newton, GMRES 1": partial(newton_gmres, size=1),
    "Newton, GMRES 3": partial(newton_gmres, size=3),
}
"""What looks ahead."""


def relative(difference: Tensor, whole: Tensor) -> Tensor:
    """‖difference‖ / ‖whole‖ of every token, [B, T]."""
    return difference.norm(dim=-1) / whole.norm(dim=-1)


@dataclass
class Solve:
    """Solves a layer by a method within a number of evaluations; stands in for :meth:`Solver.step`."""

    solver: Solver
    method: Method
    evaluations: int

    def __call__(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        problem = problem_of(self.solver, y_BTD, increment_fn, history)
        z = problem.start
        for spent, iterate in self.method(problem):
            if spent > self.evaluations:
                break
            z = iterate
            if spent == self.evaluations:
                break
        return problem.finish(z)


@dataclass
class StopEarly:
    """The plain iteration until an iterate changes by less than ``tolerance``, at most ``evaluations``.

    ``by`` "token": every token stops for itself (its keys and values stay those of its last evaluation);
    "batch": all stop when the mean over the micro-batch is below. Counts evaluations in ``used``.
    """

    solver: Solver
    evaluations: int
    tolerance: float
    by: str
    used: float = 0.0
    calls: int = 0

    def __call__(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        problem = problem_of(self.solver, y_BTD, increment_fn, history)
        z = problem.start
        running = torch.ones(z.shape[:-1])
        used = 1.0
        for _ in range(self.evaluations - 1):
            used += running.mean().item()
            new = torch.where(running.bool().unsqueeze(-1), problem.map(z), z)
            change, z = relative(new - z, new), new
            if self.by == "batch":
                change = change.mean().expand_as(running)
            running = running * (change >= self.tolerance)
            if not running.any():
                break
        self.used += used
        self.calls += 1
        return problem.finish(z)


@contextmanager
def steps_replaced(
    model: Transformer, make: Callable[[Solver], Callable[..., tuple[Tensor, Tensor]]]
) -> Iterator[list[Callable]]:  # type: ignore[type-arg]
    """Every layer takes the step that ``make`` makes for its solver; yields those steps."""
    steps = [make(solver) for solver in model.solvers.values()]
    for solver, step in zip(model.solvers.values(), steps, strict=True):
        solver.step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        for solver in model.solvers.values():
            del solver.step
