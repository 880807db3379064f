"""Plans: the rules, what a user may ask for, the file, and a configuration that names it."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_from_file,
    config_to_yaml,
    load_config,
)
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.solvers import DLCL
from megatron_iiet.distillation.analysis import full_iterations
from megatron_iiet.distillation.influence import Ablation, Measurement, Values
from megatron_iiet.distillation.plans import PlanRequest, rank_correlation, within_flops
from megatron_iiet.evaluation.paper_results import FIGURE_5_FIRST, FIGURE_5_INITIAL, FIGURE_5_LATER
from megatron_iiet.models import Transformer
from megatron_iiet.models.iterations import above_threshold, auto_threshold
from megatron_iiet.storage.source import Source

# --- the rules ---

# Layer 1 has the weakest predictor, 0.1; layer 2 keeps its iterations 1 and 3.
INFLUENCE: Values = {
    (0, 0): 0.4, (0, 1): 0.30, (0, 2): 0.10, (0, 3): 0.01,
    (1, 0): 0.1, (1, 1): 0.05, (1, 2): 0.02, (1, 3): 0.00,
    (2, 0): 0.2, (2, 1): 0.20, (2, 2): 0.03, (2, 3): 0.15,
}  # fmt: skip
MEASURED = Measurement(INFLUENCE, [0.5, 0.2, 0.3], 4, 64, 2.0)
# Only the iterations of layer 1 are worth anything.
ABLATION = Ablation(
    2.0, {(n, i): 2.0 + (4 - i) * (0.1 if n == 1 else -0.1) for n in range(3) for i in (1, 2, 3)}
)


def small(layers: int = 3, full: int = 3) -> Transformer:
    config = RunConfig()
    config.model.num_layers, config.solver.iterations = layers, full
    return Transformer.on_meta(config)


def planned(request: PlanRequest) -> IterationPlan:
    return request.plan(MEASURED, ABLATION, small(), 64, {"model": "m", "sequences": 4})


def test_the_papers_threshold() -> None:
    plan = planned(PlanRequest(threshold="auto"))
    assert auto_threshold(INFLUENCE) == plan.threshold == 0.1
    assert plan.iterations == (2, 0, 2)
    assert (plan.method, plan.ranking, plan.full, plan.budget) == ("threshold", "cosine", 3, None)
    assert (plan.influence, plan.measured_on) == (INFLUENCE, {"model": "m", "sequences": 4})


def test_the_threshold_on_what_is_legible_of_figure_5() -> None:
    """How many cells stay does not depend on where they stand."""
    grid = {(n, 0): value for n, value in enumerate(FIGURE_5_INITIAL)}
    grid |= {(n, 1): value for n, value in enumerate(FIGURE_5_FIRST)}
    grid |= {(n % 24, 2 + n // 24): value for n, value in enumerate(FIGURE_5_LATER)}
    assert len(grid) == 22 + 24 + 39
    assert auto_threshold(grid) == 0.11
    assert sum(above_threshold(grid, 24, auto_threshold(grid))) == 7
    assert sum(above_threshold(grid, 24, 0.07)) == 16
    assert sum(above_threshold(grid, 24, 0.08)) == 10


@pytest.mark.parametrize(
    ("request_", "iterations", "budget"),
    [
        (PlanRequest(threshold=0.2), (1, 0, 1), None),
        (PlanRequest(threshold=0.0), (3, 3, 3), None),
        (PlanRequest(threshold=2.0), (0, 0, 0), None),
        (PlanRequest(budget=3), (1, 0, 2), 0.5),
        (PlanRequest(budget=0), (0, 0, 0), 0.25),
        (PlanRequest(budget=9), (3, 3, 3), 1.0),
        (PlanRequest(flops_ratio=0.45), (1, 0, 1), 0.45),  # 5 of 12 evaluations; 6 would be 0.5
        (PlanRequest(flops_ratio=0.5), (1, 0, 2), 0.5),
        (PlanRequest(flops_ratio=0.25), (0, 0, 0), 0.25),
        (PlanRequest(flops_ratio=1.0), (3, 3, 3), 1.0),
        (PlanRequest(lower_bound=True), (0, 0, 0), None),
        (PlanRequest(budget=2, ranking="loss"), (0, 2, 0), 5 / 12),
    ],
    ids=str,
)
def test_every_rule(request_: PlanRequest, iterations: tuple[int, ...], budget: float | None) -> None:
    plan = planned(request_)
    assert plan.iterations == iterations
    assert plan.budget == (budget if budget is None else pytest.approx(budget))
    assert plan.ranking == request_.ranking


@pytest.mark.parametrize(
    "request_",
    [
        PlanRequest(budget=0),
        PlanRequest(budget=9),
        PlanRequest(flops_ratio=0.25),
        PlanRequest(flops_ratio=1.0),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(request_: PlanRequest) -> None:
    request_.check(3, 3)


def test_what_an_iteration_is_worth() -> None:
    """The rises of a layer's iterations add up to what it loses with all of them."""
    found = Ablation(2.0, {(0, 1): 2.7, (0, 2): 2.2, (0, 3): 1.9}).increase
    assert found == pytest.approx({(0, 1): 0.5, (0, 2): 0.3, (0, 3): -0.1})


@given(
    st.lists(st.floats(0, 2), min_size=12, max_size=12),
    st.integers(1, 100).map(lambda hundredths: hundredths / 100),
)
@settings(max_examples=40)
def test_never_more_flops_than_asked_and_no_iteration_less(values: list[float], ratio: float) -> None:
    ratio = max(ratio, 1 / 3)
    whole = small(4, 2)
    influence = {(n, i): values[3 * n + i] for n in range(4) for i in range(3)}
    counts = within_flops(influence, whole, 64, ratio)
    full = whole.layer_flops(64)
    assert [solver.iterations for solver in whole.solvers.values()] == [2] * 4
    whole.set_iterations(counts)
    assert whole.layer_flops(64) <= ratio * full * (1 + 1e-9)
    assert sum(counts) + 4 == math.floor(ratio * 12 * (1 + 1e-9))


@given(st.lists(st.floats(0, 2), min_size=9, max_size=9), st.floats(0, 2))
def test_threshold_counts(values: list[float], threshold: float) -> None:
    influence = {(n, i): values[3 * n + i] for n in range(3) for i in range(3)}
    expected = [sum(influence[n, i] >= threshold for i in (1, 2)) for n in range(3)]
    assert above_threshold(influence, 3, threshold) == expected


# --- rank correlation ---


def test_rank_correlation() -> None:
    def of(*values: float) -> Values:
        return {(0, i + 1): value for i, value in enumerate(values)}

    assert rank_correlation(of(1, 2, 3), of(10, 20, 300)) == pytest.approx(1)
    assert rank_correlation(of(1, 2, 3), of(3, 2, -1)) == pytest.approx(-1)
    # Without ties 1 - 6 Σd² / (n (n² - 1)) with d = 1, 1, 0, 2, 2.
    assert rank_correlation(of(1, 2, 3, 4, 5), of(2, 1, 3, 6, 4)) == pytest.approx(1 - 6 * 4 / 120)
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / √(4.5 · 5).
    assert rank_correlation(of(1, 2, 2, 3), of(1, 2, 3, 4)) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(rank_correlation(of(1, 1), of(1, 2)))
    # Iterate 0 is no iteration: only those of the second are compared.
    assert rank_correlation({(0, 0): 9.0, **of(1, 2)}, of(1, 2)) == pytest.approx(1)


# --- what is refused ---


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (
            {},
            "no rule given for the plan; give exactly one of --threshold, --budget, --flops-ratio and --lower-bound",
        ),
        (
            {"budget": 3, "lower_bound": True},
            "--budget and --lower-bound given for the plan; give exactly one of --threshold, --budget, --flops-ratio and --lower-bound",
        ),
        (
            {"threshold": 2.5},
            "--threshold is 2.5, but influence lies between 0 and 2; give a number between them, or 'auto'",
        ),
        (
            {"threshold": -0.1},
            "--threshold is -0.1, but influence lies between 0 and 2; give a number between them, or 'auto'",
        ),
        (
            {"threshold": math.nan},
            "--threshold is nan, but influence lies between 0 and 2; give a number between them, or 'auto'",
        ),
        (
            {"threshold": 0.1, "ranking": "loss"},
            "--rank-by is 'loss', by which --threshold does not choose; give --budget or --flops-ratio",
        ),
        (
            {"budget": 10},
            "--budget is 10, but 3 layers of 3 iterations have 9 to keep; give a number from 0 to 9",
        ),
        (
            {"budget": -1},
            "--budget is -1, but 3 layers of 3 iterations have 9 to keep; give a number from 0 to 9",
        ),
        (
            {"flops_ratio": 0.2},
            "--flops-ratio is 0.2, but must lie between 0.25, which is one evaluation a layer of 4, and 1",
        ),
        (
            {"flops_ratio": 1.01},
            "--flops-ratio is 1.01, but must lie between 0.25, which is one evaluation a layer of 4, and 1",
        ),
    ],
    ids=str,
)
def test_requests_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PlanRequest(**given_).check(layers=3, full=3)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (
            {"kind": "pcformer"},
            "--model is there, whose solver is 'pcformer', which has no iterations; give a model of solver.kind iiet",
        ),
        (
            {"iterations": 0},
            "--model is there, whose layers have no iterations (r = 0); give one that iterates",
        ),
        (
            {"iterations": [3, 0, 1]},
            "--model is there, which has the iterations [3, 0, 1]: it is already reduced; give the full model it was made from",
        ),
        (
            {"iterations": [0, 0, 0], "teacher": "runs/full"},
            "--model is there, which was distilled from runs/full: it is already reduced; give the full model it was made from",
        ),
    ],
    ids=str,
)
def test_models_refused(solver: dict[str, Any], message: str) -> None:
    teacher = solver.pop("teacher", "")
    config = config_from_dict(
        {"model": {"num_layers": 3}, "solver": solver, "distillation": {"teacher": teacher}}
    )
    with pytest.raises(ValueError) as caught:
        full_iterations(Source("a model", config, None), "there")  # type: ignore[arg-type]  # never read
    assert str(caught.value) == message


# --- the file, and configurations that name it ---

PLAN = IterationPlan(
    (2, 0, 1),
    3,
    "threshold",
    influence=INFLUENCE,
    threshold=0.1,
    ranking="loss",
    loss_increase={(0, 1): -0.25},
    measured_on={"model": "run", "tokens": 64},
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan and a configuration in the working directory, so that messages name them briefly."""
    monkeypatch.chdir(tmp_path)
    PLAN.write("plan.json")
    Path("run.yaml").write_text(
        "model:\n  num_layers: 3\nsolver:\n  kind: iiet\n  iterations: plan.json\nlogging:\n  interval: 3\n"
    )
    return tmp_path


def test_a_plan_comes_back_from_its_file(folder: Path) -> None:
    assert IterationPlan.read("plan.json", layers=3) == PLAN
    assert [path.name for path in folder.glob("plan*")] == ["plan.json"]
    shorter = replace(PLAN, loss_increase=None, influence=None, measured_on=None, threshold=None)
    shorter.write("plan.json")
    assert IterationPlan.read("plan.json") == shorter


def test_version_1_is_read(folder: Path) -> None:
    old = {"version": 1, "iterations": [1, 0, 2], "full": 2, "method": "budget", "step": 4, "budget": 0.7,
           "influence": [[0, 1, 0.5]]}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(old))
    expected = IterationPlan((1, 0, 2), 2, "budget", step=4, budget=0.7, influence={(0, 1): 0.5})
    assert IterationPlan.read("plan.json", layers=3) == expected
    assert config_from_file("run.yaml").solver.iterations == [1, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the iteration plan plan.json: No such file or directory; tools/iteration_influence.py makes one"),
        (b"\xff", "plan.json is not an iteration plan: it is not a UTF-8 text"),
        (b"{\n1", "plan.json is not an iteration plan: it is not JSON (Expecting property name enclosed in double quotes in line 2)"),
        (b"{}", "plan.json is not an iteration plan: it holds no 'version'"),
        ({"version": 3}, "plan.json is an iteration plan of version 3, but versions up to 2 are read here; use the release that wrote it"),
        ({"ranking": "luck"}, "plan.json is not a usable iteration plan: ranking is 'luck', but must be one of cosine, loss"),
        ({"threshold": "x"}, "plan.json is not a usable iteration plan: 'x' stands where a number must be"),
        ({"threshold": float("nan")}, "plan.json is not a usable iteration plan: nan stands where a number must be"),
        ({"measured_on": [1]}, "plan.json is not a usable iteration plan: [1] stands where a mapping must be"),
        ({"loss_increase": [[0, 1]]}, "plan.json is not a usable iteration plan: loss_increase must list [layer, iterate, value] triples"),
        ({"loss_increase": [[0, 4, 0.1]]}, "plan.json is not a usable iteration plan: loss_increase names iterate 4 of layer 0, but the plan has 3 layers and full = 3"),
        ({"iterations": [4, 0, 0]}, "plan.json is not a usable iteration plan: iterations is [4, 0, 0], but must lie between 0 and full = 3"),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_that_is_none(content: Any, message: str, folder: Path) -> None:
    path = folder / "plan.json"
    if isinstance(content, dict):
        path.write_text(json.dumps(PLAN.to_data() | content))
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        IterationPlan.read("plan.json", layers=3)
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as refused:
        config_from_file("run.yaml")
    assert str(refused.value) == f"solver.iterations in run.yaml (line 5): {message}"


def test_a_configuration_takes_a_plan(folder: Path) -> None:
    """The resolved one has the list, and is that of a file which writes the list out."""
    (folder / "list.yaml").write_text((folder / "run.yaml").read_text().replace("plan.json", "[2, 0, 1]"))
    expected = config_from_file("list.yaml")
    assert expected.solver.iterations == [2, 0, 1]
    assert config_from_file("run.yaml") == expected
    assert config_to_yaml(config_from_file("run.yaml")) == config_to_yaml(expected)
    by_flag = ["--config", "list.yaml", "--solver.iterations", "plan.json"]
    assert load_config(by_flag).config == expected
    assert config_from_dict({"model": {"num_layers": 3}, "solver": {"iterations": "plan.json"},
                             "logging": {"interval": 3}}) == expected  # fmt: skip


def test_a_plan_that_is_overridden_is_not_read(folder: Path) -> None:
    (folder / "plan.json").unlink()
    assert config_from_file("run.yaml", ["--solver.iterations", "2"]).solver.iterations == 2


FLAG = "solver.iterations on the command line"
FILE = "solver.iterations in run.yaml (line 5)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model.num_layers", "4"],
            f"{FILE}: plan.json is an iteration plan for 3 layers, but the model has 4; use a plan made for this model",
        ),
        (
            ["--solver.kind", "dlcl", "--solver.iterations", "plan.json"],
            "solver.iterations is 'plan.json' on the command line, but the solver is of kind dlcl, which has no such key; leave it out, or take a solver of kind iiet",
        ),
        (
            ["--solver.iterations", "other.json"],
            f"{FLAG}: cannot read the iteration plan other.json: No such file or directory; tools/iteration_influence.py makes one",
        ),
        (
            ["--solver.iterations", "plan"],
            "solver.iterations is 'plan' on the command line, but must be an integer or a list of integers",
        ),
        (
            ["--solver.schedule", "[[0.5, 0], [0.5, 3]]"],
            "solver.schedule ends with 3 iterations, but solver.iterations is [2, 0, 1]; make them equal",
        ),
        (
            ["--model.num_layers", "x"],
            "model.num_layers is 'x' on the command line, but must be an integer",
        ),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(flags: list[str], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_file("run.yaml", flags)
    assert str(caught.value) == message


def test_a_plan_is_not_read_for_a_solver_without_iterations(folder: Path) -> None:
    """In a comparison of solvers that one file serves; that the key has no effect is told."""
    (folder / "plan.json").unlink()
    loaded = load_config(["--config", "run.yaml", "--solver.kind", "dlcl"])
    assert loaded.config.solver == DLCL()
    assert loaded.notes == ("without effect for kind dlcl: solver.iterations",)
