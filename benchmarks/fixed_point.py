#!/usr/bin/env python
"""Can the corrector's fixed point z = g(z) be reached with fewer evaluations of F, and would it help?

For a trained IIET and held-out text, plain iteration against damped, Anderson-accelerated and Newton ones:

    layers    every layer on the inputs that the model gives it: relative residual ‖g(z) − z‖ / ‖z‖ and
              distance to the fixed point by evaluations of F, the predictor's counted; how fast g contracts
              at z^0: spectral radius and largest singular value of its Jacobian, by power iteration
    loss      of the model when all layers solve with the method, trained as it was
    stopping  evaluations saved and loss changed when iteration stops at a relative change

Products with the Jacobian are counted as two evaluations. Methods marked * mix tokens across the sequence:
no model can use them, so they have no loss.

    python benchmarks/fixed_point.py MODEL_FOLDER CORPUS_PREFIX [--sequences 128] [--solves 16] [--json FILE]

MODEL_FOLDER is what tools/convert_checkpoint.py writes, CORPUS_PREFIX what tools/preprocess_data.py does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fixed_point_methods import (
    ANALYSIS_ONLY,
    METHODS,
    NEWTON_STEP,
    Problem,
    Solve,
    StopEarly,
    damped,
    jvp,
    picard,
    problem_of,
    relative,
    steps_replaced,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_iiet import models
from megatron_iiet.data.loader.inputs import Inputs, inputs_of
from megatron_iiet.data.loader.samples import build_splits
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.models import Transformer
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers import IncrementFn, Solver

MOST = 8  # evaluations of F
SETTLED = 1e-4  # relative residual of a solution in fp32
PATIENCE = 100  # evaluations to find it
POWER_STEPS = 12
PARTS = ("loss", "stopping", "layers")
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


@dataclass
class LayerStudy:
    """What one layer's solves showed; sums over micro-batches of means over tokens."""

    residual: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * MOST))
    distance: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * MOST))
    settled: float = 0.0
    """Share of the tokens that a solution was found for; distances are theirs."""
    radius: float = 0.0
    singular: float = 0.0
    calls: int = 0

    def means(self) -> dict[str, Any]:
        def each(table: dict[str, list[float]]) -> dict[str, list[float | None]]:
            return {name: [v / self.calls if v else None for v in row] for name, row in table.items()}

        return {
            "residual": each(self.residual),
            "distance": each(self.distance),
            **{name: getattr(self, name) / self.calls for name in ("settled", "radius", "singular")},
        }


@dataclass
class Studied:
    """The solver's own step, and on its inputs everything that :class:`LayerStudy` holds."""

    solver: Solver
    study: LayerStudy

    def __call__(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        problem = problem_of(self.solver, y_BTD, increment_fn, history)
        study = self.study
        study.calls += 1
        solution, settled_BT = settle(problem)
        study.settled += settled_BT.float().mean().item()
        study.radius += spectral_radius(problem)
        study.singular += largest_singular_value(problem)
        for name, method in (METHODS | ANALYSIS_ONLY).items():
            for spent, z in method(problem):
                if spent > MOST:
                    break
                study.residual[name][spent - 1] += relative(problem.map(z) - z, z).mean().item()
                if settled_BT.any():
                    far_BT = relative(z - solution, solution)[settled_BT]
                    study.distance[name][spent - 1] += far_BT.mean().item()
        return type(self.solver).step(self.solver, y_BTD, increment_fn, history)


def settle(problem: Problem) -> tuple[Tensor, Tensor]:
    """(z, which tokens' residual is below SETTLED there), from plain or half damped iteration: whichever has
    more of them."""
    found = []
    for method in (picard, partial(damped, omega=0.5)):
        for spent, z in method(problem):  # noqa: B007
            if spent >= PATIENCE:
                break
        settled_BT = relative(problem.map(z) - z, z) < SETTLED
        found.append((z, settled_BT))
        if settled_BT.all():
            break
    return max(found, key=lambda pair: int(pair[1].sum()))


def _random_like(z: Tensor) -> Tensor:
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return direction / direction.norm()


def spectral_radius(problem: Problem) -> float:
    """Of g's Jacobian at z^0: growth of a random direction, geometric mean over the last half of the steps.

    An estimate: eigenvalues may be complex, and the slowest token decides in the end."""
    direction, growth = _random_like(problem.start), 1.0
    for step in range(POWER_STEPS):
        direction = jvp(problem.map, problem.start, direction)
        norm = direction.norm()
        direction = direction / norm
        growth *= norm.item() if step >= POWER_STEPS // 2 else 1.0
    return growth ** (1 / (POWER_STEPS - POWER_STEPS // 2))


def largest_singular_value(problem: Problem) -> float:
    """‖J‖ of the same Jacobian, the local Lipschitz constant of g over a micro-batch."""
    direction, norm = _random_like(problem.start), torch.zeros(())
    _, transposed = torch.func.vjp(problem.map, problem.start)
    for _ in range(POWER_STEPS):
        direction = transposed(jvp(problem.map, problem.start, direction))[0]
        norm = direction.norm()
        direction = direction / norm
    return norm.sqrt().item()


Step = Callable[..., tuple[Tensor, Tensor]]


def loss_with(
    model: Transformer, batches: list[Inputs], make: Callable[[Solver], Step]
) -> tuple[float, list[Any]]:
    """Nats per token with other steps, and those steps."""
    with steps_replaced(model, make) as steps:
        total = sum(model(*inputs).item() for inputs in batches)
    return total / sum(int(inputs.counted) for inputs in batches), steps


def study_layers(model: Transformer, batches: list[Inputs]) -> list[dict[str, Any]]:
    studies = [LayerStudy() for _ in model.solvers]
    waiting = iter(studies)
    with steps_replaced(model, lambda solver: Studied(solver, next(waiting))):
        for inputs in batches:
            model(inputs.tokens)
    return [study.means() for study in studies]


def study_losses(model: Transformer, batches: list[Inputs]) -> dict[str, list[float]]:
    table: dict[str, list[float]] = {}
    print("\nvalidation loss by evaluations of F a layer")
    for name, method in METHODS.items():
        row = table[name] = []
        every = NEWTON_STEP.get(name, 1)
        for evaluations in range(1, MOST + 1):
            if (evaluations - 1) % every == 0:  # else there is no new iterate
                make = partial(Solve, method=method, evaluations=evaluations)
                loss, _ = loss_with(model, batches, make)
            row.append(loss)
        print(f"{name:20}" + _cells(row), flush=True)
    return table


def study_stopping(model: Transformer, batches: list[Inputs], evaluations: int) -> list[dict[str, Any]]:
    print("\nstopping early: by, tolerance, evaluations, loss against not stopping")
    whole, _ = loss_with(model, batches, partial(Solve, method=picard, evaluations=evaluations))
    rows = []
    for by in ("token", "batch"):
        for tolerance in TOLERANCES:
            make = partial(StopEarly, evaluations=evaluations, tolerance=tolerance, by=by)
            loss, steps = loss_with(model, batches, make)
            used = sum(step.used for step in steps) / sum(step.calls for step in steps)
            rows.append({"by": by, "tolerance": tolerance, "evaluations": used, "loss": loss - whole})
            print(f"{by:6} {tolerance:9.0e} {used:9.2f} of {evaluations} {loss - whole:+10.4f}", flush=True)
    return rows


def _cells(values: list[float | None]) -> str:
    return "".join(" " * 9 if value is None else f"{value:9.4f}" for value in values)


def print_layers(layers: list[dict[str, Any]]) -> None:
    header = "evaluations of F    " + "".join(f"{e:9}" for e in range(1, MOST + 1))
    for what in ("residual", "distance"):
        print(f"\nrelative {what}, mean over layers and tokens\n{header}")
        for name in METHODS | ANALYSIS_ONLY:
            rows = [layer[what][name] for layer in layers if name in layer[what]]
            columns = [[row[e] for row in rows if row[e] is not None] for e in range(MOST)]
            means = [sum(column) / len(column) if column else None for column in columns]
            print(f"{name + ' *' * (name in ANALYSIS_ONLY):20}{_cells(means)}")
    print("\nlayer   radius     ‖J‖  settled   plain iteration's residual\n" + header)
    for n, layer in enumerate(layers):
        numbers = f"{n:4}{layer['radius']:9.3f}{layer['singular']:8.2f}{layer['settled']:8.1%} "
        print(numbers + _cells(layer["residual"]["Picard"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("corpus", metavar="CORPUS_PREFIX", help="held-out text")
    parser.add_argument("--sequences", type=int, default=128, help="for the losses")
    parser.add_argument("--solves", type=int, default=16, help="sequences for the study of single layers")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--stop-of", type=int, help="evaluations that stopping may save from (r + 1)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    try:
        model = models.load(arguments.model)
        length = model.config.data.sequence_length
        held_out = build_splits(
            arguments.corpus, length, [0.0, 1.0, 0.0], vocab_size=model.config.model.vocab_size
        ).validation
        batches = [
            inputs_of(batch)
            for batch in ValidationBatches(
                [held_out],
                samples=arguments.sequences,
                micro_batch_size=arguments.micro_batch,
                dp_rank=0,
                dp_size=1,
            )
        ]
        solver = model.config.solver
        print(f"{arguments.model}: kind {solver.kind}, variant {solver.variant}, r = {solver.iterations}")
        most = max(solver.evaluations for solver in model.solvers.values())
        results: dict[str, Any] = {"model": arguments.model}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            if "loss" in arguments.parts:
                results["loss"] = study_losses(model, batches)
            if "stopping" in arguments.parts:
                results["stopping"] = study_stopping(model, batches, arguments.stop_of or most)
            if "layers" in arguments.parts:
                few = batches[: max(1, arguments.solves // arguments.micro_batch)]
                results["layers"] = study_layers(model, few)
                print_layers(results["layers"])
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
