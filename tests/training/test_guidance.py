"""Influence-guided training: the rule, the record of a plan, and runs that plan as they train."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_iiet import models
from megatron_iiet.config import ConfigError, LoadedConfig, RunConfig, config_from_dict, validate
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.schema import GuidanceConfig
from megatron_iiet.config.solvers import SOLVERS
from megatron_iiet.data.loader.inputs import inputs_of
from megatron_iiet.data.loader.samples import build_splits
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.models.diagnostics import IterateStatistics, observe_iterates
from megatron_iiet.models.iterations import even_iterations, iterations_at, mean_evaluations, most_influential
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.storage.integrity import check_seal, read_json, write_sealed
from megatron_iiet.training import loop
from megatron_iiet.training.callbacks import Guidance, favouring, running_mean
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, validation_loss
from tests.training.bare_run import bare_run

# --- the rule ---


@st.composite
def measurements(draw: st.DrawFn) -> tuple[dict[tuple[int, int], float], int, int]:
    """Influence with ties, layers, and a legal number of evaluations."""
    layers, full = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    value = st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0, 2))
    influence = {(n, i): draw(value) for n in range(layers) for i in range(full + 1)}
    return influence, layers, draw(st.integers(layers, layers * (full + 1)))


@given(measurements())
def test_keeps_the_most_influence_any_choice_can(
    case: tuple[dict[tuple[int, int], float], int, int],
) -> None:
    influence, layers, evaluations = case
    counts = most_influential(influence, layers, evaluations)
    assert sum(counts) + layers == evaluations
    iterations = [key for key in influence if key[1] >= 1]
    best = max(
        sum(sorted(influence[key] for key in chosen))
        for chosen in itertools.combinations(iterations, evaluations - layers)
    )
    # Of all choices that keep as much, one has these counts.
    assert any(
        [sum(n == layer for n, _ in chosen) for layer in range(layers)] == counts
        for chosen in itertools.combinations(iterations, evaluations - layers)
        if sum(sorted(influence[key] for key in chosen)) == pytest.approx(best, abs=1e-12)
    )
    shuffled = dict(sorted(influence.items(), key=lambda item: item[0][::-1]))
    assert most_influential(shuffled, layers, evaluations) == counts


def test_counts_iterations_and_not_which() -> None:
    """Layer 1 keeps its iterations 1 and 3, so it gets two; iterate 0 is no iteration."""
    influence = {(0, 0): 0.0, (0, 1): 0.1, (0, 2): 0.0, (0, 3): 0.0}
    influence |= {(1, 0): 9.0, (1, 1): 0.5, (1, 2): 0.05, (1, 3): 0.4}
    assert most_influential(influence, 2, 5) == [1, 2]
    assert most_influential(influence, 2, 2) == [0, 0]


def test_of_equal_influences_the_earlier_iterates_of_the_lower_layers() -> None:
    influence = {(n, i): 0.5 for n in range(3) for i in range(3)}
    assert most_influential(influence, 3, 5) == [1, 1, 0]
    assert most_influential(influence, 3, 7) == [2, 1, 1]


@pytest.mark.parametrize(
    ("influence", "evaluations", "message"),
    [
        ({(0, 1): 1.0}, 1, "1 evaluations for 2 layers; give at least one a layer"),
        ({(2, 1): 1.0}, 3, "influence of layer 2 is given, but there are 2 layers, from 0 on"),
        ({(0, 1): float("nan")}, 3, "influence of iteration 1 of layer 0 is nan, not a number"),
    ],
)
def test_the_rule_refuses(influence: Any, evaluations: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        most_influential(influence, 2, evaluations)
    assert str(caught.value) == message


@given(layers=st.integers(1, 40), extra=st.integers(0, 200))
def test_even_iterations(layers: int, extra: int) -> None:
    counts = even_iterations(layers, layers + extra)
    assert sum(counts) == extra
    assert max(counts) - min(counts) <= 1
    for half in (layers // 2, -(-layers // 2)):  # neither end of the model has more than its part
        assert abs(sum(counts[:half]) - extra * half / layers) < 1


def test_running_mean() -> None:
    assert running_mean({(0, 1): 1.0}, {(0, 1): 3.0}, 0.25) == {(0, 1): 2.5}


@pytest.mark.parametrize(("inertia", "counts"), [(0.0, [1, 2]), (0.1, [1, 2]), (0.5, [2, 1])])
def test_inertia_keeps_iterations_in_force_among_equals(inertia: float, counts: list[int]) -> None:
    """Layer 0's second iteration is in force, with 4/5 of the influence of layer 1's."""
    influence = {(0, 0): 9.0, (0, 1): 0.3, (0, 2): 0.08, (1, 0): 9.0, (1, 1): 0.3, (1, 2): 0.1}
    ranked = favouring(influence, [2, 1], inertia)
    assert most_influential(ranked, 2, 5) == counts
    assert [ranked[key] for key in ((0, 0), (1, 0), (1, 2))] == [9.0, 9.0, 0.1]
    assert ranked[1, 1] == pytest.approx(0.3 * (1 + inertia))


# --- the record ---

PLAN = IterationPlan((2, 0, 1), 2, "budget", step=4, budget=0.7, influence={(0, 1): 0.1, (2, 0): 1 / 3})


def test_a_plan_comes_back_from_json() -> None:
    for plan in (PLAN, IterationPlan((0,), 0, "lower bound")):
        data = json.loads(json.dumps(plan.to_data()))
        assert IterationPlan.from_data(data, layers=len(plan.iterations), source="plan.json") == plan
    assert (PLAN.evaluations, PLAN.full_evaluations) == (6, 9)
    short = {"version": 1, "iterations": [1, 0], "full": 3, "method": "given"}
    assert IterationPlan.from_data(short, layers=2, source="plan.json").iterations == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": 3},
            "p.json is an iteration plan of version 3, but versions up to 2 are read here; use the release that wrote it",
        ),
        (
            {"iterations": None},
            "p.json lacks 'iterations'; an iteration plan has version, iterations, full, ",
        ),
        ({"iteration": []}, "p.json has the unknown key 'iteration'; an iteration plan has version, "),
        (
            {"iterations": [1, 2]},
            "p.json is an iteration plan for 2 layers, but the model has 3; use a plan made for this model",
        ),
        (
            {"iterations": [1, -1, 0]},
            "p.json is not a usable iteration plan: iterations is [1, -1, 0], but must lie between 0 and full = 2",
        ),
        (
            {"full": 1},
            "p.json is not a usable iteration plan: iterations is [2, 0, 1], but must lie between 0 ",
        ),
        (
            {"iterations": []},
            "p.json is not a usable iteration plan: iterations is empty; give one number a ",
        ),
        (
            {"iterations": [1, 0.5, 1]},
            "p.json is not a usable iteration plan: 0.5 stands where a whole number ",
        ),
        ({"iterations": 3}, "p.json is not a usable iteration plan: 3 stands where a list must be"),
        ({"method": 3}, "p.json is not a usable iteration plan: 3 stands where a text must be"),
        ({"budget": "all"}, "p.json is not a usable iteration plan: 'all' stands where a number must be"),
        (
            {"influence": [[0, 1]]},
            "p.json is not a usable iteration plan: influence must list [layer, iterate, ",
        ),
        (
            {"influence": [[3, 1, 0.1]]},
            "p.json is not a usable iteration plan: influence names iterate 1 of layer 3, but the plan has 3 ",
        ),
    ],
    ids=str,
)
def test_not_a_plan(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        IterationPlan.from_data(PLAN.to_data() | changes, layers=3, source="p.json")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("data", [[1, 0], {}, "[1, 0]", None])
def test_not_a_plan_at_all(data: Any) -> None:
    with pytest.raises(ValueError, match=r"^p.json is not an iteration plan: it holds no 'version'$"):
        IterationPlan.from_data(data, layers=2, source="p.json")


# --- the configuration ---


def guided(**changes: Any) -> RunConfig:
    """12 layers, r = 3, guided within half of 48 evaluations; ``section__key`` changes."""
    config = RunConfig()
    config.solver = SOLVERS.find(changes.pop("solver__kind", "iiet"))()  # type: ignore[misc]
    for name, value in {"guidance__interval": 100, **changes}.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section), key, value)
    return config


OFF = "guidance.interval is 100, but"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance__interval": -1}, "guidance.interval is -1, but must be 0 or greater"),
        ({"guidance__samples": 0}, "guidance.samples is 0, but must be greater than 0"),
        ({"guidance__start": 1.0}, "guidance.start is 1.0, but must be at least 0 and less than 1"),
        ({"guidance__decay": 1.0}, "guidance.decay is 1.0, but must be at least 0 and less than 1"),
        ({"guidance__budget": 1.0}, "guidance.budget is 1.0, but must be at least 0 and less than 1"),
        (
            {"guidance__budget": 0.2},
            "guidance.budget is 0.2 of the 48 evaluations of 3 iterations in 12 layers, which leaves less than "
            "one a layer; set it to at least 0.25",
        ),
        (
            {"solver__kind": "dlcl"},
            f"{OFF} solver.kind is 'dlcl', which has no iterations to guide; set guidance.interval to 0 or "
            "solver.kind to 'iiet'",
        ),
        (
            {"solver__predictor": "euler"},
            f"{OFF} solver.predictor is 'euler', with which a layer without iterations does not merge; set "
            "solver.predictor to 'merged' or guidance.interval to 0",
        ),
        (
            {"solver__iterations": 0},
            f"{OFF} solver.iterations is 0; make it the most iterations a layer may get, one number of at "
            "least 1, or set guidance.interval to 0",
        ),
        (
            {"solver__iterations": [3] * 12},
            f"{OFF} solver.iterations is {[3] * 12}; make it the most iterations a layer may get, one number of "
            "at least 1, or set guidance.interval to 0",
        ),
        (
            {"solver__schedule": [(0.5, 0), (0.5, 3)]},
            f"{OFF} solver.schedule gives every stage its iterations; set solver.schedule to null "
            "(guidance.start delays guidance) or guidance.interval to 0",
        ),
        (
            {"guidance__interval": 600, "guidance__start": 0.7},
            "guidance.interval is 600, but the first measurement, after step 1200 (guidance.start is 0.7), would "
            "not be before the end, training.steps = 1000; lower guidance.interval or guidance.start",
        ),
        (
            {"guidance__interval": 300, "guidance__start": 0.9006},
            "guidance.interval is 300, but the first measurement, after step 1200 (guidance.start is 0.9006), "
            "would not be before the end, training.steps = 1000; lower guidance.interval or guidance.start",
        ),
        (
            {"guidance__interval": 1000},
            "guidance.interval is 1000, but the first measurement, after step 1000 (guidance.start is 0.1), would "
            "not be before the end, training.steps = 1000; lower guidance.interval or guidance.start",
        ),
        (
            {"data__split": [1.0, 0.0, 0.0]},
            f"{OFF} there is no held-out text to measure on: data.split is [1.0, 0.0, 0.0] and "
            "data.validation_prefix is empty; give validation a share in data.split",
        ),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(guided(**changes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance__budget": 0.25},
        {"guidance__interval": 0, "solver__kind": "dlcl"},
        {"solver__variant": "released"},
        {"data__split": [1.0, 0.0, 0.0], "data__validation_prefix": "held-out"},
        {"guidance__interval": 999},
        {"guidance__interval": 300, "guidance__start": 0.9},
        {"guidance__interval": 300, "guidance__start": 0.9004},  # from step 900
        {"guidance__interval": 500, "guidance__start": 0.0},
    ],
    ids=str,
)
def test_allowed(changes: dict[str, Any]) -> None:
    validate(guided(**changes))


def test_before_the_first_plan_the_budget_is_spent_evenly() -> None:
    config = guided(guidance__budget=0.7, model__num_layers=5, solver__iterations=1)  # 0.7 · 10 is 7
    counts, merging = iterations_at(config, 0)
    assert (counts, merging) == ([0, 0, 1, 0, 1], True)
    assert mean_evaluations(config) == [7 / 5] * 5
    assert 0.57 * 100 < 57  # in fp64
    config = guided(guidance__budget=0.57, model__num_layers=50, solver__iterations=1)
    assert sum(iterations_at(config, 0)[0]) == 57 - 50


@pytest.mark.parametrize(
    ("interval", "start", "planned"),
    [
        (2, 0.5, [4, 6]),
        (2, 0.3, [2, 4, 6]),  # from step 2.4
        (2, 0.32, [4, 6]),  # from step 2.56
        (3, 0.0, [3, 6]),
        (4, 0.5, [4]),
        (1, 0.9, [7]),
    ],
)
def test_plans_are_made_from_the_start_on_but_not_in_the_end(
    interval: int, start: float, planned: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 steps from the one nearest to the start on; after the eighth there is nothing to plan for."""
    steps: list[int] = []
    monkeypatch.setattr(Guidance, "_make_plan", lambda self, run: steps.append(run.step))
    run = bare_run(tmp_path / "run", guidance={"interval": interval, "start": start})
    loop.train(run, [Guidance([])])  # type: ignore[arg-type]
    run.close()
    assert steps == planned


def test_a_plan_is_recorded_as_it_is_in_force(tmp_path: Path) -> None:
    """7 of 9 evaluations: 4 iterations of 6. A batch of two rows weighs twice as much as one of one."""
    seen = {1.0: {(n, i): 0.1 * n + 0.3 for n in range(3) for i in range(3)}, 2.0: {}}
    seen[2.0] = {key: 2 * value for key, value in seen[1.0].items()}
    run = bare_run(
        tmp_path / "run",
        solver={"kind": "iiet", "iterations": 2},
        guidance={"interval": 4, "start": 0.0, "budget": 0.8},
    )
    run.engine.observe = lambda batch: IterateStatistics({}, seen[float(batch.weights.sum())])  # type: ignore[method-assign]
    batches = [SimpleNamespace(weights=torch.ones(rows)) for rows in (1, 2)]
    loop.train(run, [Guidance(batches)])  # type: ignore[arg-type]
    run.close()
    log = read_log(tmp_path / "run")[4]
    assert [log[f"guidance/layer_{n}"] for n in range(3)] == [0, 2, 2]
    assert log["guidance/evaluations"] == 7
    for (layer, iterate), value in seen[1.0].items():
        mean = (value + 2 * 2 * value) / 3
        assert log[f"guidance/influence_layer_{layer}_iterate_{iterate}"] == pytest.approx(mean)
    assert run.engine.meta_model.solvers[0].iterations == 0


def test_influence_is_the_mean_over_the_rows_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows here, and three on another rank that saw twice as much in each."""
    seen = {(n, i): 0.1 * n + 0.2 * i + 0.1 for n in range(3) for i in range(2)}
    run = bare_run(tmp_path / "run", guidance={"interval": 4, "start": 0.0, "budget": 0.8})
    run.engine.observe = lambda batch: IterateStatistics({}, seen)  # type: ignore[method-assign]

    def of_two_ranks(part: Any) -> list[Any]:
        assert part == ({key: 2 * value for key, value in seen.items()}, 2.0)
        return [part, ({key: 6 * value for key, value in seen.items()}, 3.0)]

    monkeypatch.setattr(run.context.world, "gather_objects", of_two_ranks)
    run.enter_stage()
    run.step = 4
    Guidance([SimpleNamespace(weights=torch.ones(2))]).on_step(run, None)  # type: ignore[arg-type, list-item]
    assert run.plan is not None
    assert run.plan.influence == pytest.approx({key: 8 / 5 * value for key, value in seen.items()})
    run.close()


# --- runs ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


SECTIONS: dict[str, dict[str, Any]] = {
    "solver": {"kind": "iiet", "variant": "released", "iterations": 2},
    "guidance": {"interval": 4, "budget": 0.6, "start": 0.2, "samples": 7, "inertia": 0.25},
    "training": {"steps": 12},
    "evaluation": {"interval": 4, "samples": 11},
    "checkpoint": {"interval": 4, "keep": 0},
    "optimizer": {"lr": 1e-2, "eps": 1e-4},
    "logging": {"interval": 4, "solver_interval": 0, "tensorboard": False},
}


def train(
    data: dict[str, str],
    output_dir: Path,
    stage: int = 1,
    ranks: int = 1,
    zero: dict[str, Any] | None = None,
    accept: tuple[str, ...] = (),
    **sections: dict[str, Any],
) -> dict[int, dict[str, float]]:
    """Train :data:`SECTIONS` with some keys changed; the log."""
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {**SECTIONS, **sections}}
    config = tiny_config(data, output_dir, **merged)
    ds_path = ds_json(output_dir.parent, stage, zero_optimization={"stage": stage, **(zero or {})})
    run_ranks(pretrain_rank, ranks, as_data(config), ds_path, accept)
    return read_log(output_dir)


@pytest.fixture(scope="module")
def whole(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided run in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(data, folder)
    return folder


def plan_at(run: Path, step: int) -> IterationPlan | None:
    return checkpoint.read_plan(checkpoint.checkpoints_folder(run) / checkpoint.tag_of(step))


def exported(run: Path, step: int, to: Path) -> models.Transformer:
    found = export_run(run, step)
    models.save(found.config, found.state, to)
    return models.load(to)


@pytest.mark.slow
def test_a_run_plans_as_it_trains(whole: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Plans after steps 4 and 8 (not after the last one) of what the weights of the checkpoints say, on 7
    sequences: the run's micro-batches of 2 have a filler row, here is none."""
    log = read_log(whole)
    assert [step for step in log if "guidance/evaluations" in log[step]] == [4, 8]
    splits = build_splits(data["prefix"], 16, [0.8, 0.1, 0.1], vocab_size=4096)
    batches = ValidationBatches([splits.validation], samples=7, micro_batch_size=7, dp_rank=0, dp_size=1)
    mean: dict[tuple[int, int], float] | None = None
    before: tuple[int, ...] = ()
    for step in (4, 8):
        model = exported(whole, step, tmp_path / str(step))
        assert model.config.guidance == GuidanceConfig()
        plan = plan_at(whole, step)
        assert plan is not None
        assert model.config.solver.iterations == list(plan.iterations)
        assert validation_loss(model) == pytest.approx(log[step]["validation_loss"], rel=1e-5)
        model.set_iterations([2, 2, 2])
        with observe_iterates(model) as statistics:
            model(inputs_of(next(iter(batches))).tokens)
        measured = statistics.influence
        mean = measured if mean is None else {k: 0.5 * mean[k] + 0.5 * v for k, v in measured.items()}
        assert plan.influence == pytest.approx(mean, abs=2e-6)
        ranked = mean if step == 4 else favouring(mean, before, 0.25)
        assert list(plan.iterations) == most_influential(ranked, 3, 5)  # 0.6 · 9 evaluations
        before = plan.iterations
        assert [log[step][f"guidance/layer_{n}"] for n in range(3)] == list(plan.iterations)
        assert log[step]["guidance/evaluations"] == plan.evaluations == 5
        assert (plan.step, plan.full, plan.budget) == (step, 2, 0.6)
    assert plan_at(whole, 12) == plan_at(whole, 8)
    assert exported(whole, 12, tmp_path / "end").config.solver.iterations == list(plan.iterations)


@pytest.mark.slow
@pytest.mark.parametrize(("inertia", "kept"), [(0.0, False), (1e6, True)])
def test_inertia_keeps_a_plan_in_force(
    inertia: float, kept: bool, data: dict[str, str], tmp_path: Path
) -> None:
    """A run is resumed with a plan that has a second iteration, a tenth as influential as any first one."""
    run = tmp_path / "run"
    train(data, run, training={"stop_after": 4})
    path = checkpoint.checkpoints_folder(run) / checkpoint.tag_of(4) / "state.json"
    state = check_seal(path, read_json(path))
    state["plan"]["iterations"] = [2, 0, 0]
    write_sealed(path, state)
    accept = ("guidance.inertia",)
    log = train(data, run, accept=accept, guidance={"inertia": inertia}, training={"stop_after": 8})
    assert ([log[8][f"guidance/layer_{n}"] for n in range(3)] == [2, 0, 0]) is kept


@pytest.mark.slow
def test_export_before_the_first_plan(data: dict[str, str], tmp_path: Path) -> None:
    log = train(data, tmp_path / "run", training={"stop_after": 2})
    model = exported(tmp_path / "run", 2, tmp_path / "model")
    assert model.config.solver.iterations == [0, 1, 1]
    assert checkpoint.read_state(tmp_path / "run/checkpoints/step_00000002").plan is None
    assert "validation_loss" in log[0]


def bits(log: dict[int, dict[str, float]]) -> dict[int, dict[str, str]]:
    """Everything that is not a time, in hexadecimal."""
    kinds = ("loss", "grad_norm", "validation_loss", "guidance/", "flops")
    return {
        s: {k: float(v).hex() for k, v in values.items() if k.startswith(kinds)} for s, values in log.items()
    }


@pytest.mark.slow
def test_resumed_equals_uninterrupted(whole: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Stopped before the first plan, right after one and between two."""
    for stop in (3, 8, 10, None):
        log = train(data, tmp_path / "run", training={"stop_after": stop})
    assert {s: v for s, v in bits(log).items() if s} == {s: v for s, v in bits(read_log(whole)).items() if s}
    assert plan_at(tmp_path / "run", 12) == plan_at(whole, 12)


@pytest.mark.slow
def test_flops_are_those_of_the_plan(whole: Path) -> None:
    """5 of 9 evaluations in every step, however they are spread."""
    log = read_log(whole)
    assert len({log[step]["flops"] for step in range(1, 13)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"guidance": {"decay": 0.0}}, "planned after step 4"),
        ({"solver": {"iterations": 1}, "guidance": {"budget": 0.7}}, "even until the first plan"),
        *long_but(
            [
                ({"guidance": {"budget": 0.7}}, "even until the first plan"),
                ({"guidance": {"interval": 0}}, None),
            ]
        ),
    ],
    ids=str,
)
def test_a_plan_made_for_other_settings_is_dropped(
    changes: dict[str, dict[str, Any]],
    source: str | None,
    whole: Path,
    data: dict[str, str],
    tmp_path: Path,
) -> None:
    train(data, tmp_path / "run", training={"stop_after": 4})
    sections = {**SECTIONS, **{k: {**SECTIONS[k], **v} for k, v in changes.items()}}
    accept = [f"{section}.{key}" for section, keys in changes.items() for key in keys]
    config = tiny_config(data, tmp_path / "run", **sections)
    said = run_ranks(resumed_solver, 1, as_data(config), accept)[0]
    if source is None:
        assert said == "solver iiet, variant released, r = 2"
    else:
        assert said.endswith(source), said


def resumed_solver(config: dict[str, Any], accept: list[str]) -> str:
    """What a resumed run says of its solver before its first step."""
    loaded = LoadedConfig(config=config_from_dict(config))
    with ParallelContext.start(loaded.config.parallel) as context:
        run, _ = prepare(loaded.config, reconciled_ds_config(loaded, 1), context, accept)
        run.enter_stage()
        run.close()
        return run.describe_solver()


CPU = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero0": (2, 0, {}),
    "zero0 alone": (1, 0, {}),
    "zero2": (2, 2, {}),
    "zero3": (2, 3, {}),
    "zero1 offload": (2, 1, CPU),
    "zero2 offload": (2, 2, CPU),
    "zero3 offload": (2, 3, CPU),
    "tensor, sequence": (2, 1, {"tensor": 2, "sequence": True}),
    "pipeline": (2, 1, {"pipeline": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(LAYOUTS, "zero3", "pipeline"))
def test_every_layout_makes_the_same_plans(
    name: str, whole: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """Also where a plan takes a layer's last iteration away, and with it the gradient of a norm."""
    ranks, stage, extra = LAYOUTS[name]
    zero, parallel = (extra, {}) if extra is CPU else ({}, extra)
    log = train(data, tmp_path / "run", stage, ranks, zero, parallel=parallel)
    expected = read_log(whole)
    for step in (4, 8):
        found, plan = plan_at(tmp_path / "run", step), plan_at(whole, step)
        assert found is not None
        assert plan is not None
        assert found.iterations == plan.iterations
        assert found.influence == pytest.approx(plan.influence, rel=1e-3, abs=1e-7)
    kinds = ("loss", "validation_loss", "grad_norm")
    found_losses, losses = (
        {(s, k): v[k] for s, v in x.items() for k in kinds if k in v} for x in (log, expected)
    )
    assert found_losses == pytest.approx(losses, rel=1e-5)
