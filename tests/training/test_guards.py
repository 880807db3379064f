"""Numbers that training does not go on from: judged, left out, gone back from, told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config import LoadedConfig, config_from_dict
from megatron_iiet.config.schema import GuardsConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.storage.selection import find_candidates
from megatron_iiet.training.callbacks import describe_divergence
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.engine.gate import Gate
from megatron_iiet.training.guards import BadNumbersError
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from megatron_iiet.training.run import Run
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json
from tests.tiny import make_data, tiny_config
from tests.training.bare_run import bare_run

CPU = torch.device("cpu")


# --- the gate alone ---


def gate(**keys: Any) -> Gate:
    return Gate(GuardsConfig(**keys), Group(), CPU)


def verdict(gate: Gate, loss: float, norm: float) -> Verdict:
    gate.begin(torch.tensor([loss], dtype=torch.float64))
    return Verdict(int(gate.decide(norm)[2]))


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (5.0, 1.0, Verdict.TRAINED),
        (5.0, 0.0, Verdict.TRAINED),
        (math.nan, 1.0, Verdict.NOT_FINITE),
        (5.0, math.inf, Verdict.NOT_FINITE),
        (5.0, -1.0, Verdict.NOT_FINITE),  # DeepSpeed's word for a norm that is no number
    ],
)
def test_what_is_let_through(loss: float, norm: float, expected: Verdict) -> None:
    assert verdict(gate(nonfinite="skip"), loss, norm) is expected


def test_nothing_moves_after_a_step_that_ends_the_run() -> None:
    """Its number may be read many steps later."""
    stopping, skipping = gate(), gate(nonfinite="skip")
    for each in (stopping, skipping):
        assert verdict(each, math.nan, 1.0) is Verdict.NOT_FINITE
    assert verdict(skipping, 5.0, 1.0) is Verdict.TRAINED
    assert verdict(stopping, 5.0, 1.0) is Verdict.HELD
    stopping.open([])
    assert verdict(stopping, 5.0, 1.0) is Verdict.TRAINED


def test_a_spike_is_measured_against_steps_that_trained() -> None:
    """Of either number, once the window is full; spikes do not widen it, and what is read from the log is as
    good as what was seen."""
    steps = [(5.0, 1.0), (5.2, 1.2), (4.8, 0.8)]
    seen = gate(spike="skip", window=3, deviations=3.0)
    assert [verdict(seen, *step) for step in [(50.0, 1.0), *steps]] == [Verdict.TRAINED] * 4
    told = gate(spike="skip", window=3, deviations=3.0)
    told.open([(9.0, 9.0), *steps])
    for each in (seen, told):
        assert [verdict(each, 5.0, 1.65) for _ in range(3)] == [Verdict.SPIKE] * 3
        assert verdict(each, 5.65, 1.0) is Verdict.SPIKE
        assert verdict(each, 5.65, math.nan) is Verdict.NOT_FINITE
        each.open(steps)
        assert verdict(each, 5.0, 1.65) is Verdict.SPIKE
        assert verdict(each, 5.55, 1.55) is Verdict.TRAINED


def test_after_few_steps_in_the_log_there_is_no_spike_yet() -> None:
    told = gate(spike="skip", window=3, deviations=3.0)
    told.open([(5.0, 1.0), (5.2, 1.2)])
    assert verdict(told, 50.0, 1.0) is Verdict.TRAINED


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_steps_where_it_may(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    norms = iter([1.0, math.inf, 1.0])
    guarding = gate(nonfinite="skip")
    guarding.guard(optimizer, lambda: next(norms), offloaded=False)
    found = []
    for gradient in (1.0, math.nan, 1.0):
        weight.grad = torch.full((3,), gradient)
        guarding.begin(torch.zeros(1, dtype=torch.float64))
        optimizer.step()
        state = optimizer.state[weight]
        found.append((weight.tolist(), state["exp_avg"].tolist(), float(state["step"])))
    assert found[0] == found[1] != found[2]
    assert found[2][2] == 2


# --- runs ---

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def poison(run: Run, factors: dict[int, float]) -> None:
    """Multiply a gradient wherever the first micro-batch of these steps is read."""
    factor_of = {
        next(run.batches.again((step - 1) * GLOBAL_BATCH)).tokens.numpy().tobytes(): factor
        for step, factor in factors.items()
    }
    inputs, factor = run.engine._inputs, [1.0]

    def noting(batch: Any) -> Any:
        factor[0] = factor_of.get(batch.tokens.numpy().tobytes(), 1.0)
        return inputs(batch)

    run.engine._inputs = noting  # type: ignore[method-assign]
    list(run.engine._names)[3].register_hook(lambda gradient: gradient * factor[0])


def poisoned(config: dict[str, Any], ds_path: Path, factors: dict[int, float], at_once: bool = True) -> Any:
    """Train to the end: the weights; or to an error: what it says."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, callbacks = prepare(loaded.config, ds_config, context)
        poison(run, factors)
        run.engine.ring.at_once = at_once
        try:
            train(run, callbacks)
        except BadNumbersError as error:
            return str(error)
        finally:
            run.close()
        return dict(run.engine.gathered_parameters())


Poisoned = Callable[..., Any]


@pytest.fixture
def trained(data: dict[str, str], tmp_path: Path) -> Poisoned:
    def trained(
        name: str, factors: dict[int, float], at_once: bool = True, ranks: int = 1, **sections: Any
    ) -> Any:
        sections = {"checkpoint": {"interval": 4}, **sections}
        config = tiny_config(data | sections.pop("data", {}), tmp_path / name, **sections)
        stage = ds_json(tmp_path, 1 if ranks == 1 else 3)
        return run_ranks(poisoned, ranks, as_data(config), stage, factors, at_once)[0]

    return trained


def losses(folder: Path) -> dict[int, str]:
    return {step: values["loss"].hex() for step, values in read_log(folder).items() if "loss" in values}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(("step", "first_after"), [(5, True), (6, False)])
def test_the_end_names_what_and_the_ways_on(
    step: int, first_after: bool, trained: Poisoned, tmp_path: Path
) -> None:
    """Also where the numbers are read late; the same command says the same again."""
    late = {"interval": 7, "solver_interval": 0, "tensorboard": False}
    text = trained("run", {step: math.nan}, at_once=False, logging=late)
    sample = (step - 1) * GLOBAL_BATCH
    assert text.startswith(f"step {step} has loss ")
    assert "rank 0 has no numbers in the gradients of 1 parameter(s), layers." in text
    assert f"from samples {sample} to {sample + 1} (windows " in text
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_00000004'}" in text
    assert ("nothing was trained" in text) is first_after
    assert "rejected" not in text, "it is the samples' fault"
    assert f"--guards.nonfinite skip, or --data.skip_steps [{step}], or a smaller optimizer.lr (now" in text
    assert list(losses(tmp_path / "run")) == list(range(1, step))
    if first_after:
        assert trained("run", {step: math.nan}) == text


@pytest.mark.slow
def test_a_checkpoint_whose_weights_are_at_fault_is_not_gone_on_from_for_ever(
    trained: Poisoned, tmp_path: Path
) -> None:
    """Finite, but so large that no step after it is: the same command would end there again and again."""
    each: dict[str, Any] = {"checkpoint": {"interval": 1, "keep": 0}, "training": {"stop_after": 2}}
    trained("run", {}, **each)
    each["training"]["stop_after"] = None
    text = trained("run", {}, optimizer={"lr": 1e19}, **each)
    assert text.startswith("step 4 has loss ")
    assert (
        "step_00000003, after which nothing was trained, so its weights may be what is wrong: it is rej"
        in text
    )
    found = find_candidates(tmp_path / "run")
    assert found.tags == ["step_00000002", "step_00000001"]
    trained("run", {}, **each)
    assert list(losses(tmp_path / "run")) == list(range(1, 9))
    assert find_candidates(tmp_path / "run").tags[-2:] == ["step_00000002", "step_00000001"]


@pytest.mark.slow
def test_skipped_and_resumed_is_skipped_by_hand(trained: Poisoned, tmp_path: Path) -> None:
    """Early enough for the bias correction of the moments, which is by the steps that trained, to matter; the
    window is full with what the log has of the first part."""
    bad = {2: math.nan, 3: math.inf, 6: 1e7}
    skip = {"nonfinite": "skip", "spike": "skip", "window": 3, "deviations": 300.0}
    parts = {"checkpoint": {"interval": 0}, "guards": skip}
    trained("parts", bad, training={"stop_after": 4}, **parts)
    weights = trained("parts", bad, **parts)
    by_hand = trained("by_hand", {}, data={"skip_steps": [[2, 3], 6]})
    trained("late", bad, at_once=False, guards=skip)
    assert equal(weights, by_hand)
    found = [read_log(tmp_path / name) for name in ("parts", "by_hand", "late")]
    assert [[step for step in log if log[step].get("skipped")] for log in found] == [[2, 3, 6]] * 3
    for log in found:
        assert [log[step]["lr"] for step in range(1, 9)] == [found[0][step]["lr"] for step in range(1, 9)]
        assert [log[step]["loss"] for step in (1, 4, 5, 7, 8)] == [
            found[0][step]["loss"] for step in (1, 4, 5, 7, 8)
        ]
    state = json.loads((tmp_path / "parts/checkpoints/step_00000008/state.json").read_text())
    assert state["data"]["left_out"] == [[2, 3], [6, 6]]
    assert state["data"]["samples"] == 64


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "ranks"), [(True, 1), (False, 2)])
def test_going_back_leaves_out_what_led_there(
    at_once: bool, ranks: int, trained: Poisoned, tmp_path: Path
) -> None:
    """From the checkpoint at 4, because of 7, of which with a window of 2 step 6 is held responsible too;
    alone, and under ZeRO-3."""
    guards = {"spike": "rewind", "window": 2, "deviations": 300.0}
    weights = trained("run", {7: 1e7}, at_once, ranks, guards=guards)
    assert equal(weights, trained("by_hand", {}, ranks=ranks, data={"skip_steps": [[6, 7]]}))
    assert list(losses(tmp_path / "by_hand")) == [1, 2, 3, 4, 5, 8]
    assert losses(tmp_path / "run").items() >= losses(tmp_path / "by_hand").items()
    state = json.loads((tmp_path / "run/checkpoints/step_00000008/state.json").read_text())
    assert state["data"]["left_out"] == [[6, 7]]


@pytest.mark.slow
def test_without_a_checkpoint_there_is_no_way_back(trained: Poisoned) -> None:
    guards = {"spike": "rewind", "window": 2, "deviations": 300.0}
    text = trained("run", {3: 1e7}, guards=guards)
    assert "more than 300 deviations above the last 2 steps, and there is no checkpoint to go back to" in text
    assert "there is no checkpoint yet; resume with a larger guards.deviations (now 300)" in text


# --- the loop, with results that are given ---


def results_of(verdicts: dict[int, Verdict]) -> Callable[[int, float], StepResult]:
    return lambda step, lr: StepResult(5.0, 1.0, lr, verdict=verdicts.get(step, Verdict.TRAINED))


def test_an_end_after_too_many_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guards = {"spike": "skip", "max_skips": 2, "window": 3}
    spikes = dict.fromkeys((1, 2, 4, 5, 6), Verdict.SPIKE)
    run = bare_run(tmp_path / "run", results_of(spikes), guards=guards, data={"skip_steps": []})
    run.engine.open_gate = lambda recent: None  # type: ignore[method-assign]
    with pytest.raises(
        BadNumbersError, match=r"^step 6 has .*; the 2 steps before it were left out \(guards"
    ):
        train(run, [])
    assert "step      1 | left out: it has loss 5 and gradient norm 1, more than" in capsys.readouterr().out
    run.close()


def test_steps_left_out_by_hand_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bare_run(tmp_path / "run", data={"skip_steps": [[2, 4], 6]})
    train(run, [])
    run.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "nothing is trained" in line]
    assert [line[:48] for line in lines] == [
        "step      2 | nothing is trained in step 2 to 4:",
        "step      6 | nothing is trained in step 6: samp",
    ]
    assert len(run.engine.lrs) == 4  # type: ignore[attr-defined]
    assert run.batches.left_out == {2, 3, 4, 6}


# --- the corrector ---


def test_a_corrector_that_diverges_is_named() -> None:
    before = {(0, 0): 1.0, (0, 1): 0.3, (0, 2): 0.2, (1, 0): 1.0, (1, 1): 0.3, (1, 2): 0.2}
    assert describe_divergence(before, {}) == describe_divergence(before, before) == ""
    assert describe_divergence(before | {(1, 2): 0.61}, before) == (
        "layer 1 (relative residual 0.3 → 0.61 over iterations 1..2)"
    )
    assert describe_divergence(before | {(0, 1): 0.6, (0, 2): 0.55}, before) == (
        "layer 0 (relative residual 0.2 → 0.55 since the last diagnostics)"
    )
    assert describe_divergence(before | {(0, 1): 0.49, (0, 2): 0.45}, before) == ""  # small, and contracting
    assert describe_divergence(before | {(0, 2): math.nan}, before).startswith(
        "layer 0 (relative residual nan"
    )
    assert describe_divergence({(0, 0): 1.0}, {}) == ""
    many = {(n, i): float(i) for n in range(6) for i in range(4)}
    assert describe_divergence(many, {}).endswith(" and 2 more")
