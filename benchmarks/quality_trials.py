"""What benchmarks/quality.py trains: systems, phases, and the shape that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BASE: dict[str, Any] = {
    "model": {
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_layers": 8,
        "num_attention_heads": 1,
        "vocab_size": 2048,
        "max_position_embeddings": 256,
        "embedding_scale": "unit",
    },
    "data": {"sequence_length": 256},
    "training": {"global_batch_size": 16, "micro_batch_size": 16, "precision": "bf16"},
    "evaluation": {"samples": 512},
    "checkpoint": {"keep": 1},
    "logging": {"interval": 20, "tensorboard": False, "peak_tflops": 0.1},
}
"""What no trial changes: 0.53 M parameters, 4,096 tokens a step. 10.5 M tokens are 20 a parameter."""
TOKENS_A_STEP = 16 * 256
FULL = 2560
"""Steps of a trial of the main table: 10.5 M tokens."""
SHORT = 640
"""Steps of a trial of a learning-rate sweep and of an ablation: 2.6 M tokens."""
BRIEF = 160
"""Steps of a trial of the comparison of optimizers: 0.66 M tokens, which a busy machine has the time for."""
SEEDS = (1234, 1235, 1236)

PAPER = {"kind": "iiet", "variant": "paper", "history_norm": "none", "coefficient_init": "identity"}
RELEASED = {"kind": "iiet", "variant": "released"}
RMS = {**PAPER, "history_norm": "rms", "coefficient_init": "average"}
READINGS = {
    "paper": ("paper, increments as they are", PAPER),
    "released": ("released", RELEASED),
    "rms": ("paper, history at rms 1, average init", RMS),
}
"""Readings of IIET in full: what the tables call them, and their solver."""


@dataclass(frozen=True)
class System:
    """A row of the tables."""

    label: str
    solver: dict[str, Any]
    """Keys of the configuration's solver section."""
    sections: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    """Other sections' keys."""


def _scaled(scale: float) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    return (("model", (("embedding_scale", scale),)),)


def _guided(budget: float) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    return (("guidance", (("interval", 128), ("budget", budget))),)


def _muon(ratio: float) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    return (("optimizer", (("kind", "muon"), ("matrix_lr_ratio", ratio))),)


def _two_stage(solver: dict[str, Any]) -> dict[str, Any]:
    return {**solver, "iterations": 3, "schedule": [[0.75, 0], [0.25, 3]]}


SYSTEMS: dict[str, System] = {
    "euler": System("Transformer++", {"kind": "euler"}),
    "euler-norm": System("Transformer++, LayerNorm-ed outputs", {"kind": "euler", "output_norm": "layer"}),
    "ws4": System("Trans WS, 4x", {"kind": "weight-sharing", "repeats": 4}),
    "rk2-learned": System("ODE Transformer RK2, learned", {"kind": "rk2", "stage_coefficients": "learned"}),
    "rk2-gated": System("ODE Transformer RK2, gated", {"kind": "rk2", "stage_coefficients": "gated"}),
    "rk2-fixed": System("ODE Transformer RK2, fixed", {"kind": "rk2", "stage_coefficients": "fixed"}),
    "rk4-fixed": System("ODE Transformer RK4, fixed", {"kind": "rk4", "stage_coefficients": "fixed"}),
    "pcformer": System("PCformer, RK2 predictor", {"kind": "pcformer"}),
    **{
        f"{reading}-r{r}": System(f"IIET r = {r}, {label}", {**solver, "iterations": r})
        for reading, (label, solver) in READINGS.items()
        for r in range(4)
    },
    **{
        f"{reading}-r3-damped": System(
            f"IIET r = 3, {READINGS[reading][0]}, damped 1/2",
            {**READINGS[reading][1], "iterations": 3, "damping": 0.5},
        )
        for reading in ("paper", "rms")
    },
    **{
        f"{reading}-two-stage": System(f"IIET r = 3, {label}, two-stage", _two_stage(solver))
        for reading, (label, solver) in READINGS.items()
    },
    "rms-two-stage-identity": System(
        "IIET r = 3, paper, history at rms 1, identity init, two-stage",
        _two_stage({**RMS, "coefficient_init": "identity"}),
    ),
    **{
        f"{reading}-guided": System(
            f"IIET r <= 3, {label}, guided, 1/2 of the FLOPs", {**solver, "iterations": 3}, _guided(0.5)
        )
        for reading, (label, solver) in READINGS.items()
    },
    "paper-r1-euler-predictor": System(
        f"IIET r = 1, {READINGS['paper'][0]}, predictor euler",
        {**PAPER, "iterations": 1, "predictor": "euler"},
    ),
    **{
        f"paper-r{r}-average": System(
            f"IIET r = {r}, {READINGS['paper'][0]}, average init",
            {**PAPER, "iterations": r, "coefficient_init": "average"},
        )
        for r in (0, 1)
    },
    **{
        f"rms-r{r}-identity": System(
            f"IIET r = {r}, paper, history at rms 1, identity init",
            {**RMS, "iterations": r, "coefficient_init": "identity"},
        )
        for r in (0, 1)
    },
    "rms-r1-first-keys": System(
        "IIET r = 1, paper, history at rms 1, keys of the first evaluation",
        {**RMS, "iterations": 1, "key_values": "first"},
    ),
    **{
        f"{name}-{layers}-layers": System(
            f"{label}, {layers} layers", solver, (("model", (("num_layers", layers),)),)
        )
        for layers in (4, 16)
        for name, label, solver in (
            ("euler", "Transformer++", {"kind": "euler"}),
            *((f"rms-r{r}", f"IIET r = {r}, {READINGS['rms'][0]}", {**RMS, "iterations": r}) for r in (0, 1)),
        )
    },
    "euler-scale1": System("Transformer++, embedding as it is", {"kind": "euler"}, _scaled(1)),
    "paper-r1-scale1": System(
        f"IIET r = 1, {READINGS['paper'][0]}, embedding as it is", {**PAPER, "iterations": 1}, _scaled(1)
    ),
    **{
        f"released-r{r}-scale1": System(
            f"IIET r = {r}, released, embedding as it is", {**RELEASED, "iterations": r}, _scaled(1)
        )
        for r in (0, 1)
    },
    **{
        f"released-r{r}-identity": System(
            f"IIET r = {r}, released, embedding as it is, identity init",
            {**RELEASED, "iterations": r, "coefficient_init": "identity"},
            _scaled(1),
        )
        for r in (0, 1)
    },
    "released-r1-shared": System(
        "IIET r = 1, released, embedding as it is, one row",
        {**RELEASED, "iterations": 1, "readout": "shared"},
        _scaled(1),
    ),
    **{
        f"{name}-muon{'' if ratio == 1 else f'-x{ratio:g}'}": System(
            f"{label}, Muon{'' if ratio == 1 else f', matrices at {ratio:g} x the rate'}",
            solver,
            _muon(ratio),
        )
        for name, label, solver in (
            ("euler", "Transformer++", {"kind": "euler"}),
            ("rms-r1", f"IIET r = 1, {READINGS['rms'][0]}", {**RMS, "iterations": 1}),
        )
        for ratio in (0.25, 0.5, 1, 2, 4)
    },
}


@dataclass(frozen=True)
class Trial:
    """One run."""

    system: str
    lr: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.system}.lr{self.lr:g}.seed{self.seed}.{self.steps}"

    @property
    def script(self) -> str:
        """That trains it."""
        return "pretrain_iiet.py"

    @property
    def judge(self) -> Trial | None:
        """Transformer++ under the same conditions."""
        return None if self.system == "euler" else replace(self, system="euler")

    def config(self, data: dict[str, Any], output_dir: str) -> dict[str, Any]:
        """The configuration as plain data; ``data``: keys of the data section."""
        sections: dict[str, dict[str, Any]] = {name: dict(keys) for name, keys in BASE.items()}
        system = SYSTEMS[self.system]
        for name, keys in system.sections:
            sections[name] = {**sections.get(name, {}), **dict(keys)}
        sections["solver"] = dict(system.solver)
        sections["data"] |= data
        sections["optimizer"] = {**sections.get("optimizer", {}), "lr": self.lr}
        sections["training"] |= {"steps": self.steps, "seed": self.seed}
        interval = self.steps // (4 if self.steps == BRIEF else 8)
        sections["evaluation"]["interval"] = sections["checkpoint"]["interval"] = interval
        sections["logging"]["solver_interval"] = interval
        return {"output_dir": output_dir, **sections}


SWEPT = (
    *("euler", "pcformer", "paper-r0", "paper-r1", "paper-r3", "released-r0", "released-r1", "released-r3"),
    *("paper-r3-damped", "euler-scale1", "released-r0-scale1", "released-r1-scale1", "paper-r1-scale1"),
    *("rms-r0", "rms-r1", "rms-r3", "euler-norm", "rk2-learned", "euler-muon", "rms-r1-muon"),
)
RATES = (8e-3, 4e-3, 1.6e-2)
"""Where every system's sweep begins; it goes on by factors of 2 while the best rate is at an edge."""


def sweep(
    losses: Mapping[tuple[str, float], float],
    systems: Iterable[str] = SWEPT,
    rates: Sequence[float] = RATES,
    steps: int | None = None,
) -> list[Trial]:
    """Learning rates, for both sides; ``losses``: of the trials there are, by system and rate. ``steps``:
    SHORT unless given."""
    systems = list(systems)
    wanted = [(system, rate) for rate in rates for system in systems]
    for system in systems:
        known = {rate: loss for (name, rate), loss in losses.items() if name == system}
        if set(rates) <= known.keys():
            best = min(known, key=lambda rate: known[rate])
            wanted += [(system, best * 2)] * (best == max(known)) + [(system, best / 2)] * (
                best == min(known)
            )
    return [Trial(system, rate, SEEDS[0], SHORT if steps is None else steps) for system, rate in wanted]


COMPARED = ("euler", "euler-muon", "rms-r1", "rms-r1-muon")
"""Of the comparison of optimizers, each of which finds its own rate."""
BRIEF_RATES = (1.6e-2, 8e-3, 3.2e-2)


def optimizers(losses: Mapping[tuple[str, float], float]) -> list[Trial]:
    """AdamW and Muon in BRIEF trials: rates as in :func:`sweep`; at the best, other seeds, and of Muon other
    rates for its matrices alone."""
    trials = sweep(losses, COMPARED, BRIEF_RATES, BRIEF)
    for system in COMPARED:
        known = {rate: loss for (name, rate), loss in losses.items() if name == system}
        if set(BRIEF_RATES) <= known.keys():
            best = min(known, key=lambda rate: known[rate])
            trials += [Trial(system, best, seed, BRIEF) for seed in SEEDS[1:]]
            if system.endswith("-muon"):
                trials += [Trial(f"{system}-x{ratio}", best, SEEDS[0], BRIEF) for ratio in (0.5, 2)]
    return trials


def main_table(lr: dict[str, float], best: str) -> list[Trial]:
    """Every system; three seeds for Transformer++, PCformer and r = 1, 3 of ``best``, the reading of IIET to
    put forward. The released variant has the embedding as it is, as its authors', where it learns better."""
    thrice = ("euler", "pcformer", f"{best}-r3", f"{best}-r1")
    once = (
        *(f"{best}-r0", "rms-two-stage-identity", f"{best}-two-stage", f"{best}-guided"),
        *("paper-r0", "released-r0-scale1", "paper-r1", "released-r1-scale1", "paper-r3"),
        *("rk2-learned", "rk2-gated", "ws4", f"{best}-r2", "rk4-fixed", "euler-muon", "rms-r1-muon"),
    )
    first = [Trial(s, rate_of(lr, s), SEEDS[0], FULL) for s in dict.fromkeys((*thrice, *once))]
    return first + [Trial(s, rate_of(lr, s), seed, FULL) for seed in SEEDS[1:] for s in thrice]


def ablations(lr: dict[str, float]) -> list[Trial]:
    """Between the two readings, always with the r = 0 of the same reading."""
    names = (
        *("euler", "euler-norm", "paper-r0", "paper-r1"),
        *("paper-r1-euler-predictor", "paper-r0-average", "paper-r1-average"),
        *("rms-r0", "rms-r1", "rms-r0-identity", "rms-r1-identity", "rms-r1-first-keys"),
        *("rms-r3", "rms-r3-damped"),
        *("euler-scale1", "paper-r1-scale1", "released-r0-scale1", "released-r1-scale1"),
        *("released-r0-identity", "released-r1-identity", "released-r1-shared"),
        *(f"{name}-{layers}-layers" for layers in (4, 16) for name in ("euler", "rms-r0", "rms-r1")),
    )
    return [Trial(name, rate_of(lr, name), SEEDS[0], SHORT) for name in names]


def rate_of(rates: dict[str, float], system: str) -> float:
    """A system's learning rate: its own best of the sweep, else that of the swept system it varies, else that
    of its family, with as many iterations as were swept, else Transformer++'s."""
    family = system.split("-")[0]
    for candidates in (
        [name for name in rates if name == system or system.startswith(f"{name}-")],
        [name for name in rates if name.startswith(f"{family}-") and name.count("-") == 1],
    ):
        if candidates:
            return rates[max(candidates, key=lambda name: (len(name), name))]
    return rates["euler"]


def named(trials: Iterable[Trial]) -> dict[str, Trial]:
    """By folder name, each once."""
    return {trial.name: trial for trial in trials}
