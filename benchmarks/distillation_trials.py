"""What benchmarks/distillation_quality.py trains: teachers, and what becomes of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_trials import FULL, Trial

TEACHER_STEPS = FULL
STUDENT_STEPS = FULL // 3
"""A third of the teacher's tokens, as in the paper."""
KEPT = 0.5
"""Of the teacher's layer evaluations, by the plan of influence."""
PLAN = "plan"
"""Stands for the iterations that the plan keeps."""
OTHER_TEXT = 1000
"""Added to a teacher's seed for its students: batches it has not seen in this order."""


@dataclass(frozen=True)
class Model:
    """A row of the table: what a teacher's weights become in :data:`STUDENT_STEPS` more steps."""

    label: str
    start: str
    """The system whose weights it starts from: ``iiet`` (the teacher), ``euler`` or ``pcformer``."""
    iterations: int | str
    """Corrector iterations of every layer, or :data:`PLAN`."""
    taught: bool
    """Whether the model it starts from is its teacher too."""
    kind: str | None = None
    """Its solver, where it is not the one it starts from."""
    alpha: float = 0.01
    """Weight of the hidden-state loss, where there is a teacher."""


MODELS = {
    "e-iiet": Model("E-IIET", "iiet", PLAN, taught=True),
    "e-iiet-alpha1": Model("E-IIET, alpha 1", "iiet", PLAN, taught=True, alpha=1.0),
    "e-iiet-alpha0.1": Model("E-IIET, alpha 0.1", "iiet", PLAN, taught=True, alpha=0.1),
    "e-iiet-alpha0": Model("E-IIET, alpha 0", "iiet", PLAN, taught=True, alpha=0.0),
    "e-iiet-continued": Model("E-IIET's iterations, no teacher", "iiet", PLAN, taught=False),
    "lower-bound": Model("Lower Bound (r = 0)", "iiet", 0, taught=True),
    "lower-bound-alpha1": Model("Lower Bound (r = 0), alpha 1", "iiet", 0, taught=True, alpha=1.0),
    "lower-bound-continued": Model("r = 0, no teacher", "iiet", 0, taught=False),
    "euler-continued": Model("Transformer++, went on", "euler", 0, taught=False),
    "iiet-continued": Model("full IIET, went on", "iiet", 3, taught=False),
    "distil-pcformer": Model("Distil PCformer", "pcformer", 0, taught=True, kind="euler"),
    "distil-pcformer-alpha1": Model(
        "Distil PCformer, alpha 1", "pcformer", 0, taught=True, kind="euler", alpha=1.0
    ),
}


@dataclass(frozen=True)
class Student:
    """One run."""

    model: str
    teacher: Trial
    """The trial it starts from."""
    lr: float
    output: Path
    """Folder of all runs and plans."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model}.lr{self.lr:g}.of.{self.teacher.name}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return STUDENT_STEPS

    @property
    def script(self) -> str:
        """That trains it."""
        return "distill_iiet.py" if MODELS[self.model].taught else "pretrain_iiet.py"

    @property
    def judge(self) -> None:
        """None is given up."""

    def config(self, data: dict[str, Any], output_dir: str) -> dict[str, Any]:
        """The configuration as plain data; ``data``: keys of the data section."""
        model = MODELS[self.model]
        sections = self.teacher.config(data, output_dir)
        if model.kind is not None:
            sections["solver"] = {"kind": model.kind}
        elif model.start == "iiet":
            sections["solver"].pop("schedule", None)
            plan = str(plan_file(self.output, self.teacher))
            sections["solver"]["iterations"] = plan if model.iterations == PLAN else model.iterations
        eighth = max(1, self.steps // 8)
        sections["optimizer"]["lr"] = self.lr
        sections["training"] |= {"steps": self.steps, "seed": self.teacher.seed + OTHER_TEXT}
        sections["evaluation"]["interval"] = sections["checkpoint"]["interval"] = eighth
        sections["logging"]["solver_interval"] = eighth
        start = str(self.output / "trials" / self.teacher.name)
        if model.taught:
            sections["distillation"] = {"teacher": start, "alpha": model.alpha}
        else:
            sections["training"]["initial_weights"] = start
        return sections


def plan_file(output: Path, teacher: Trial) -> Path:
    """Where the plan for a teacher's E-IIET is."""
    return output / "influence" / teacher.name / "plan.json"
