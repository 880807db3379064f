"""Runs that learn from a teacher: what they start from, log, keep and resume; which teachers are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config import ConfigError, RunConfig, config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.models.distilled import teacher_config
from megatron_iiet.storage.checkpoint import checkpoints_folder
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.storage.source import Source, open_model
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.resume import model_identity
from megatron_iiet.training.warm_start import open_teacher
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config
from tests.tool_runs import run_here

FULL = {"kind": "iiet", "iterations": 2}
REDUCED = {"kind": "iiet", "iterations": [1, 0, 2]}
LINEAR = {"kind": "linear", "factor": 2.0}
OLDER_IDENTITY = "dade126f827fc137abb3d39ecb4975e3"
"""What a version without biases, q/k norms, head widths and scaled positions called the model below."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train(tiny_config(data, folder / "run", solver=FULL), folder)
    return folder / "run"


def train(config: RunConfig, folder: Path, ranks: int = 1, stage: int = 1) -> None:
    run_ranks(pretrain_rank, ranks, as_data(config), ds_json(folder, stage))


def student(data: dict[str, str], teacher: Path, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    distillation = {"teacher": str(teacher), **sections.pop("distillation", {})}
    return tiny_config(data, folder / "run", **{"solver": REDUCED, "distillation": distillation, **sections})


def test_a_teacher_has_its_own_solver_and_all_else_of_the_run(tmp_path: Path) -> None:
    there = tiny_config({}, tmp_path / "there", solver=FULL, training={"precision": "bf16"})
    here = tiny_config({}, tmp_path / "here", solver=REDUCED)
    made = teacher_config(here, there)
    assert made.solver == there.solver != here.solver
    assert (made.training, made.output_dir) == (here.training, here.output_dir)


@pytest.mark.slow
def test_a_run_and_its_resumption(data: dict[str, str], teacher: Path, tmp_path: Path) -> None:
    """The parts make the loss; what was interrupted ends where the uninterrupted run does, and holds nothing
    of the teacher."""
    weights = {"alpha": 0.5, "beta": 2.0, "temperature": 2.0}
    config = student(data, teacher, tmp_path / "whole", distillation=weights)
    train(config, tmp_path)
    log = read_log(tmp_path / "whole" / "run")
    for step in range(1, 9):
        ce, mse, kl = (
            log[step][f"distillation/{part}"] for part in ("cross_entropy", "hidden_mse", "kl_divergence")
        )
        assert min(ce, mse, kl) > 0
        assert log[step]["loss"] == pytest.approx(ce + 0.5 * mse + 2 * kl, rel=1e-6)
        assert log[step]["teacher_flops"] / log[step]["flops"] == pytest.approx(
            forward_flops(FULL, data) / forward_flops(REDUCED, data) / 3
        )

    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    for place, stop in ((teacher, 4), (moved, 8)):  # the same teacher, wherever it is
        again = student(data, place, tmp_path / "parts", distillation=weights, training={"stop_after": stop})
        train(again, tmp_path)
    uninterrupted, resumed = (export_run(tmp_path / name / "run", None) for name in ("whole", "parts"))
    assert set(uninterrupted.state) == set(export_run(teacher, None).state)
    for name in uninterrupted.state:
        assert torch.equal(uninterrupted.state[name], resumed.state[name]), name
    for written in (checkpoints_folder(tmp_path / "whole" / "run") / "step_00000008").iterdir():
        assert b"teacher." not in written.read_bytes()[:100_000], written


@pytest.mark.slow
def test_a_complete_run_needs_no_teacher(data: dict[str, str], teacher: Path, tmp_path: Path) -> None:
    """One that is not complete does."""
    there = tmp_path / "teacher"
    shutil.copytree(teacher, there)
    train(student(data, there, tmp_path, training={"stop_after": 1}), tmp_path)
    shutil.rmtree(there)
    with pytest.raises(
        RanksFailedError, match=r"NothingToDo: complete up to training.stop_after = 1: 1 of 8"
    ):
        train(student(data, there, tmp_path, training={"stop_after": 1}), tmp_path)
    with pytest.raises(RanksFailedError, match=r"NothingToDo: complete: 1 of 1 steps; raise training.steps"):
        train(student(data, there, tmp_path, training={"steps": 1}), tmp_path)
    with pytest.raises(
        RanksFailedError, match=rf"ConfigError: distillation.teacher is {there}, which does not"
    ):
        train(student(data, there, tmp_path, training={"stop_after": 2}), tmp_path)


@pytest.mark.slow
def test_a_teacher_that_has_gone_on_is_another_one(
    data: dict[str, str], teacher: Path, tmp_path: Path
) -> None:
    there = tmp_path / "teacher"
    shutil.copytree(teacher, there)
    train(student(data, there, tmp_path, training={"stop_after": 2}), tmp_path)
    digest = model_identity(open_model(there, "teacher"))
    train(tiny_config(data, there, solver=FULL, training={"steps": 9}), tmp_path)
    message = rf"\(distillation\.teacher is {there} of digest {digest:.8} there and {there} of digest"
    with pytest.raises(RanksFailedError, match=message):
        train(student(data, there, tmp_path, training={"stop_after": 3}), tmp_path)


def test_a_teacher_is_its_function_and_its_weights(tmp_path: Path) -> None:
    """Wherever it is; what only training needs says nothing."""

    def identity(**sections: dict[str, Any]) -> str:
        config = tiny_config({"prefix": str(tmp_path)}, tmp_path, **{"solver": FULL, **sections})
        return model_identity(Source(str(tmp_path), config, Rows()))

    class Rows(dict[str, torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(["norm.weight"])

        def rows(self, name: str, first: int, last: int) -> torch.Tensor:
            return torch.ones(last - first)

    assert identity() == identity(training={"seed": 3}, solver={**FULL, "coefficient_init": "average"})
    others = [{"damping": 0.5}, {"key_values": "first"}, {"iterations": 3}, {"history_norm": "none"}]
    assert len({identity(), *(identity(solver={**FULL, **other}) for other in others)}) == 5
    assert identity() == OLDER_IDENTITY, "runs of older versions would not be resumed"
    models = [{"head_dim": 8}, {"attention_bias": "qkv"}, {"qk_norm": True}, {"rope_scaling": LINEAR}]
    assert len({identity(), *(identity(model=model) for model in models)}) == 5
    assert identity(model={"head_dim": 16, "rope_scaling": {"kind": "none"}}) == identity()


def forward_flops(solver: dict[str, Any], data: dict[str, str]) -> int:
    return Transformer.on_meta(tiny_config(data, Path("x"), solver=solver)).forward_flops(16)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    data: dict[str, str], tmp_path: Path
) -> None:
    """DLCL is IIET without iterations."""
    train(tiny_config(data, tmp_path / "dlcl", solver={"kind": "dlcl"}, training={"steps": 1}), tmp_path)
    same = {"kind": "iiet", "iterations": 0}
    train(student(data, tmp_path / "dlcl", tmp_path, solver=same, training={"steps": 1}), tmp_path)
    first = read_log(tmp_path / "run")[1]
    assert first["distillation/hidden_mse"] == 0
    assert abs(first["distillation/kl_divergence"]) < 1e-6
    assert first["loss"] == pytest.approx(first["distillation/cross_entropy"], abs=1e-6)


@pytest.mark.parametrize(
    ("parallel", "ranks", "stage"),
    [
        pytest.param({"tensor": 2, "sequence": True}, 2, 3, marks=pytest.mark.slow),
        pytest.param({"pipeline": 3}, 3, 1, marks=pytest.mark.long),
        pytest.param({}, 2, 3, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_validation_in_other_layouts(
    parallel: dict[str, Any], ranks: int, stage: int, data: dict[str, str], teacher: Path, tmp_path: Path
) -> None:
    """Validation knows no teacher; with it between the steps, a layout writes the log of one process."""
    sections: dict[str, Any] = {"evaluation": {"interval": 2}, "training": {"micro_batch_size": 2}}
    train(student(data, teacher, tmp_path / "one", **sections), tmp_path)
    train(student(data, teacher, tmp_path / "split", parallel=parallel, **sections), tmp_path, ranks, stage)
    expected, found = (read_log(tmp_path / name / "run") for name in ("one", "split"))
    keys = [
        "loss",
        "grad_norm",
        "validation_loss",
        *(k for k in expected[1] if k.startswith("distillation/")),
    ]
    assert len(keys) == 6
    for step, wanted in expected.items():
        for key in keys:
            if key in wanted:
                assert found[step][key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-7), (step, key)


@pytest.mark.slow
def test_teachers_that_are_refused(data: dict[str, str], teacher: Path, tmp_path: Path) -> None:
    def message(**sections: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            open_teacher(student(data, sections.pop("teacher", teacher), tmp_path, **sections))
        text = str(caught.value)
        assert text.startswith("distillation.teacher is "), text
        assert "\n" not in text
        return text

    assert "which does not exist" in message(teacher=tmp_path / "nowhere")
    assert "which is none of what it may be" in message(teacher=tmp_path)
    assert "model.hidden_size is 32 there and 64 here" in message(model={"hidden_size": 64})
    assert "model.vocab_size is 384 there and 512 here" in message(model={"vocab_size": 512})
    assert "model.num_layers is 3 there and 2 here" in message(
        model={"num_layers": 2}, solver={"iterations": [1, 0]}
    )
    assert "iterates 2 times a layer, but the student up to 3 times" in message(
        solver={"iterations": [3, 0, 0]}
    )

    assert "which the student equals: iiet with 2 iterations a layer; give a plan" in message(solver=FULL)

    reduced = tmp_path / "reduced"
    reduced.mkdir()
    run = tiny_config(data, reduced / "run", solver=REDUCED, training={"steps": 1})
    train(run, reduced)
    assert "has the iterations [1, 0, 2]; give the full model" in message(teacher=reduced / "run")
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    train(student(data, teacher, distilled, solver={"iterations": 0}, training={"steps": 1}), distilled)
    assert f"was distilled from {teacher}; give the full model" in message(teacher=distilled / "run")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("temperature", 0.0, "distillation.temperature"),
        ("alpha", -1.0, "distillation.alpha"),
        ("beta", -0.5, "distillation.beta"),
    ],
)
def test_weights_that_are_refused(key: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict({"distillation": {key: value}})


@pytest.mark.slow
def test_script() -> None:
    """Without a teacher it says so; its short flags stand for the keys they name."""

    def error(*flags: str) -> str:
        return run_ranks(run_here, 1, "distill_iiet.py", *flags)[0].error

    assert error().startswith("there is no teacher; give --teacher")
    assert "distillation.teacher is nowhere" in error("--teacher=nowhere", "--guidance.interval", "5")
    assert "cannot read the iteration plan none.json" in error("--teacher", "nowhere", "--plan", "none.json")
    assert "unknown key '--teachr' on the command line; did you mean '--teacher'" in error("--teachr", "x")
    [shown] = run_ranks(run_here, 1, "distill_iiet.py", "--help")
    assert shown.code == 0
    assert "--teacher TEACHER     Short for --distillation.teacher." in shown.out
    assert "--plan ITERATIONS     Short for --solver.iterations." in shown.out
