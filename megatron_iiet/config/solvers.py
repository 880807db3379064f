"""The solvers, each declared once; whatever else knows of solvers is derived from here. Only
``hf/modeling_iiet.py``, which travels alone, has a table of its own, which a test compares with this one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_iiet.config.changes import FRACTION, POSITIVE, Change, key
from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.kinds import Declaration, Kinds, name_of_kind

FUNCTION, COURSE = Change.FUNCTION, Change.COURSE

SUM_TOLERANCE = 1e-6
"""How far shares that must sum to 1 may be off."""


@dataclass
class SolverConfig(Declaration):
    """How a decoder layer is integrated from y_n to y_{n+1}."""

    corrects: ClassVar[bool] = False
    """Whether its iterates approach something: a predictor, then corrections."""

    @property
    def shares_first_keys(self) -> bool:
        """Whether all evaluations of a layer attend to the keys and values of its first."""
        return False

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.kind

    def iterations_per_layer(self, layers: int) -> list[int]:
        """Corrector iterations r_n of every layer at the end of training; zeros where there are none."""
        return [0] * layers

    def evaluations(self, iterations: int) -> int:
        """Evaluations of F in a layer with ``iterations`` corrector iterations."""
        return 1

    def describe(self, iterations: Sequence[int]) -> str:
        """The solver in a few words, with the iterations in force in every layer."""
        return self.kind

    def starts_as_llama(self, layers: int) -> bool:
        """Whether layers are LLaMA's as long as the solver's own parameters have their initial values."""
        return False

    def check(self, layers: int) -> None:
        """Refuse values that do not fit together or the model.

        Raises:
            ConfigError: one sentence.
        """


@dataclass
class Merging(SolverConfig):
    """Merges increments of earlier layers with learned coefficients."""

    coefficient_init: Literal["identity", "average"] | None = key(None, COURSE)
    """Initial merge coefficients: identity (own increment 1, others 0) or average (all the same, summing to
    1). null: average for variant released, identity elsewhere."""

    default_init: ClassVar[Literal["identity", "average"]] = "identity"

    @property
    def resolved_coefficient_init(self) -> Literal["identity", "average"]:
        """Initial merge coefficients, null resolved."""
        return self.coefficient_init or self.default_init


@dataclass
class SeveralEvaluations(SolverConfig):
    """Evaluates F several times a layer."""

    key_values: Literal["every", "first"] = key("every", FUNCTION)
    """Keys and values of attention: every evaluation of a layer computes its own, or all attend, with queries
    of their own, to those of its first. A token then takes one K/V set a layer when decoding, not one an
    evaluation; it is another function, to be trained as such."""

    @property
    def shares_first_keys(self) -> bool:
        return self.key_values == "first"


@dataclass
class Iterating(Merging, SeveralEvaluations):
    """Predicts, then corrects r times by fixed-point iteration: what both readings of IIET share."""

    iterations: int | list[int] = key(3, FUNCTION)
    """Corrector iterations r: one number, one number per layer, or the file of a plan (.json) that
    tools/iteration_influence.py wrote."""
    schedule: list[tuple[float, int | list[int]]] | None = key(None, FUNCTION, exported=False)
    """Training in stages: (fraction of steps, r) pairs, e.g. [[0.75, 0], [0.25, 3]]; r is one number or one
    per layer. A stage with r = 0 in all layers is plain Transformer++ (no merge). The last r must equal
    `iterations`. null: one stage."""

    kind: str = name_of_kind("iiet")
    variant: str = name_of_kind("")

    corrects: ClassVar[bool] = True

    @property
    def system(self) -> str:
        return f"kind {self.kind}, variant {self.variant}"

    @property
    def label(self) -> str:
        counts = self.iterations if isinstance(self.iterations, list) else [self.iterations]
        r = f"r = {counts[0]}"
        if len(set(counts)) > 1:
            r = f"{sum(counts)} iterations in {len(counts)} layers"
        return f"IIET {self.variant}, {r}"

    @property
    def merges_without_iterations(self) -> bool:
        """Whether a layer with r = 0 still merges."""
        return True

    def describe(self, iterations: Sequence[int]) -> str:
        r = iterations[0] if len(set(iterations)) == 1 else list(iterations)
        return f"{self.kind}, variant {self.variant}, r = {r}"

    def iterations_per_layer(self, layers: int) -> list[int]:
        return one_per_layer(self.iterations, layers)

    def evaluations(self, iterations: int) -> int:
        return iterations + 1

    def check(self, layers: int) -> None:
        counts = self.iterations_per_layer(layers)
        if len(counts) != layers:
            raise ConfigError(
                f"solver.iterations lists {len(counts)} numbers, but model.num_layers is {layers}; give one "
                "number per layer, or a single number for all"
            )
        if min(counts) < 0:
            raise ConfigError(
                f"solver.iterations is {self.iterations}, but iteration counts must be 0 or greater"
            )
        if self.schedule is not None:
            _check_schedule(self.schedule, self.iterations, layers)


@dataclass
class Euler(SolverConfig):
    """Explicit Euler, y + F(y): the plain Transformer++."""

    kind: str = name_of_kind("euler")
    output_norm: Literal["none", "layer"] = key("none", FUNCTION)
    """LayerNorm of every layer's output, what variant released of kind iiet does to its history. A
    control."""

    @property
    def label(self) -> str:
        return "Transformer++"

    def describe(self, iterations: Sequence[int]) -> str:
        return self.kind + (" (plain Transformer++)" if self.is_llama else ", LayerNorm of the output")

    @property
    def is_llama(self) -> bool:
        """Whether the layers are LLaMA's."""
        return self.output_norm == "none"

    def starts_as_llama(self, layers: int) -> bool:
        return self.is_llama


@dataclass
class MergingAll(Merging):
    """Merges the increments of all earlier layers."""

    history_norm: Literal["none", "rms"] = key("rms", FUNCTION)
    """What is merged of earlier layers: their increments brought to rms 1, which learns better
    (docs/research-notes.md), or ('none') as they are, the papers' DLCL and Algorithm 1 to the letter."""


@dataclass
class DLCL(MergingAll):
    """Learned merge of all earlier increments, no corrector (Wang et al. 2019)."""

    kind: str = name_of_kind("dlcl")

    def starts_as_llama(self, layers: int) -> bool:
        return self.resolved_coefficient_init == "identity"


@dataclass
class WeightSharing(SeveralEvaluations):
    """Every layer `repeats` times in a row."""

    kind: str = name_of_kind("weight-sharing")
    repeats: int = key(4, FUNCTION, POSITIVE)
    """Times that each layer runs."""

    @property
    def label(self) -> str:
        return "Trans WS"

    def evaluations(self, iterations: int) -> int:
        return self.repeats

    def describe(self, iterations: Sequence[int]) -> str:
        return f"{self.kind}, every layer {self.repeats} times"

    def starts_as_llama(self, layers: int) -> bool:
        return self.repeats == 1


@dataclass
class RungeKutta2(SeveralEvaluations):
    """Runge-Kutta of order 2 (ODE Transformer, Li et al. 2022)."""

    kind: str = name_of_kind("rk2")
    stage_coefficients: Literal["fixed", "learned", "full", "gated"] = key("learned", FUNCTION)
    """Weights of the stages: the classic ones, learned (order 2 from 1, 1, order 4 from the classic ones),
    learned in full (what a stage is evaluated at too, β_ij from the classic method: Eq. 4 of the IIET paper),
    or, order 2 only, a gate computed from the stages."""

    order: ClassVar[Literal[2, 4]] = 2

    def evaluations(self, iterations: int) -> int:
        return self.order

    def describe(self, iterations: Sequence[int]) -> str:
        return f"{self.kind}, {self.stage_coefficients} coefficients"


@dataclass
class RungeKutta4(RungeKutta2):
    """Runge-Kutta of order 4 (ODE Transformer, Li et al. 2022)."""

    kind: str = name_of_kind("rk4")
    stage_coefficients: Literal["fixed", "learned", "full"] = key("learned", FUNCTION)

    order: ClassVar[Literal[2, 4]] = 4


@dataclass
class PCformer(Merging, SeveralEvaluations):
    """Runge-Kutta predictor, multistep corrector (Li et al. 2024)."""

    kind: str = name_of_kind("pcformer")
    predictor_order: Literal[2, 4] = key(2, FUNCTION)
    """Order of the Runge-Kutta predictor."""

    corrects: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return "PCformer"

    def evaluations(self, iterations: int) -> int:
        return self.predictor_order + 1

    def describe(self, iterations: Sequence[int]) -> str:
        return f"{self.kind}, predictor of order {self.predictor_order}"


@dataclass
class IIET(Iterating, MergingAll):
    """Algorithm 1 of the IIET paper: predictor, then r fixed-point corrector iterations that merge the
    increments of earlier layers."""

    variant: str = name_of_kind("paper")
    merge: bool = key(True, FUNCTION)
    """Merge the increments of earlier layers (Algorithm 1), or iterate y^i = y_n + F(y^{i-1}) alone (Eq. 9 of
    the paper), which has no coefficients."""
    predictor: Literal["merged", "euler"] = key("merged", FUNCTION)
    """First iterate: with ('merged') or without ('euler') the merge."""
    damping: float = key(1.0, FUNCTION, POSITIVE, FRACTION)
    """Weight ω of an iteration's new increment, f^i = (1 − ω) f^{i−1} + ω F(y^{i−1}). 1 is the paper's plain
    iteration, which alternates where 0.5 converges."""

    @property
    def merges_without_iterations(self) -> bool:
        return self.predictor == "merged"

    def starts_as_llama(self, layers: int) -> bool:
        merges = self.merge and self.merges_without_iterations
        merges_others = merges and self.resolved_coefficient_init != "identity"
        return not any(self.iterations_per_layer(layers)) and not merges_others

    def check(self, layers: int) -> None:
        super().check(layers)
        plain = IIET()
        idle = [name for name in _OF_THE_MERGE if getattr(self, name) != getattr(plain, name)]
        if idle and not self.merge:
            raise ConfigError(
                f"solver.{idle[0]} is {getattr(self, idle[0])!r}, which has no effect with solver.merge "
                "false; leave it out, or set solver.merge to true"
            )


@dataclass
class ReleasedIIET(Iterating):
    """What the IIET authors' released code computes: it merges LayerNorm-ed layer outputs."""

    variant: str = name_of_kind("released")
    readout: Literal["separate", "shared"] = key("separate", FUNCTION)
    """A row of its own for the input of the next layer (as the authors have it), or the corrector's."""

    default_init: ClassVar[Literal["identity", "average"]] = "average"


_OF_THE_MERGE = ("predictor", "coefficient_init", "history_norm")

SOLVERS: Kinds[SolverConfig] = Kinds(
    "solver",
    "a solver",
    (Euler, DLCL, WeightSharing, RungeKutta2, RungeKutta4, PCformer, IIET, ReleasedIIET),
    default=IIET,
    flat=frozenset({"kind", "variant", "iterations", "predictor", "coefficient_init", "schedule"}),
    before={"history_norm": "none"},  # increments were merged as they are
)


def one_per_layer(iterations: int | list[int], layers: int) -> list[int]:
    """Iteration counts as they are written, one number or one per layer, as a number for each layer."""
    return list(iterations) if isinstance(iterations, list) else [iterations] * layers


def _check_schedule(
    schedule: list[tuple[float, int | list[int]]], iterations: int | list[int], layers: int
) -> None:
    shown = [list(stage) for stage in schedule]
    if not schedule:
        raise ConfigError("solver.schedule is an empty list; write null for training in one stage")
    fractions = [fraction for fraction, _ in schedule]
    counts = [one_per_layer(r, layers) for _, r in schedule]
    wrong = next((number for number, r in enumerate(counts) if len(r) != layers), None)
    if wrong is not None:
        raise ConfigError(
            f"solver.schedule lists {len(counts[wrong])} iteration counts in stage {wrong + 1}, but "
            f"model.num_layers is {layers}; give one number per layer, or a single number for all"
        )
    negative = any(min(r) < 0 for r in counts)
    if negative or not all(math.isfinite(fraction) and fraction > 0 for fraction in fractions):
        raise ConfigError(
            f"solver.schedule is {shown}, but each stage must be [fraction above 0, iterations 0 or greater]"
        )
    if abs(sum(fractions) - 1) > SUM_TOLERANCE:
        raise ConfigError(
            f"solver.schedule is {shown}, whose fractions sum to {sum(fractions):.6g}; they must sum to 1"
        )
    if counts[-1] != one_per_layer(iterations, layers):
        raise ConfigError(
            f"solver.schedule ends with {schedule[-1][1]} iterations, but solver.iterations is "
            f"{iterations}; make them equal"
        )
