"""What a run says of itself on the console: numbers that somebody reads, and that nothing else checks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet.config import RunConfig
from megatron_iiet.evaluation import harness
from megatron_iiet.evaluation.harness import TaskResults
from megatron_iiet.models import Transformer
from megatron_iiet.models.diagnostics import IterateStatistics
from megatron_iiet.models.pipeline import stage_plan
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import TensorParallel
from megatron_iiet.training import task_evaluation
from megatron_iiet.training.callbacks import SolverDiagnostics, _clock
from megatron_iiet.training.engine import Engine
from megatron_iiet.training.layout import describe_layout
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import describe_other_layout, describe_start, describe_teacher
from megatron_iiet.training.resume import Resumption
from tests.tiny import tiny_config
from tests.training.bare_run import PATHS, alone, bare_run


def laid_out(config: RunConfig, accumulation: int) -> Engine:
    """What is told of an engine on the grid that ``config`` asks for, with 2 replicas."""
    sizes = (config.parallel.tensor, config.parallel.pipeline, 2)
    tensor, pipeline, data = (Group(range(size), handle="nobody is met") for size in sizes)
    context = replace(
        alone(2 * tensor.size * pipeline.size),
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        tensor_parallel=TensorParallel(tensor, config.parallel.sequence),
    )
    model = Transformer.on_meta(config)
    told = SimpleNamespace(
        context=context,
        meta_model=model,
        plan=stage_plan(config, model),
        accumulation=accumulation,
        zero_stage=1,
    )
    return cast(Engine, told)


def grid(tmp_path: Path, *, sequence: bool, precision: str = "fp32") -> RunConfig:
    """Four stages of two layers, and heads that cost nothing worth a word; a stream of 8 MiB a micro-batch,
    in fp32 and not cut."""
    return tiny_config(
        PATHS,
        tmp_path,
        model={
            "hidden_size": 512,
            "ffn_hidden_size": 1024,
            "num_layers": 8,
            "vocab_size": 2,
            "vocab_multiple": 2,
            "max_position_embeddings": 1024,
        },
        data={"sequence_length": 1024},
        training={"micro_batch_size": 4, "global_batch_size": 64, "precision": precision},
        parallel={"tensor": 2, "pipeline": 4, "sequence": sequence},
    )


def test_the_layout_in_words(tmp_path: Path) -> None:
    """Stages 1 to 3 receive the stream, and the embedding and an increment of each layer before them."""
    config = grid(tmp_path, sequence=False)
    assert describe_layout(config, laid_out(config, 8)).splitlines() == [
        "layout: tensor 2 x pipeline 4 x data 2, ZeRO stage 1",
        "pipeline: layers 0-1 (25%), 2-3 (25%), 4-5 (25%), 6-7 (25%) of the work; bubble 27% of the time "
        "with 8 micro-batches a step",
        "payload: into stage 1 the stream and 2 history entries, 24.0 MiB a micro-batch (72.0 MiB in 3 "
        "buffers); into stage 2 the stream and 4 history entries, 40.0 MiB a micro-batch (80.0 MiB in 2 "
        "buffers); into stage 3 the stream and 6 history entries, 56.0 MiB a micro-batch (112.0 MiB in 2 "
        "buffers)",
    ]


def test_payloads_are_of_what_is_sent(tmp_path: Path) -> None:
    """Half of a sequence under sequence parallelism, 2 bytes a number in bf16; as many buffers as there are
    micro-batches, but two."""
    cut = grid(tmp_path, sequence=True)
    said = describe_layout(cut, laid_out(cut, 1))
    assert said.startswith("layout: tensor 2 x pipeline 4 x data 2, ZeRO stage 1, sequence parallel\n")
    assert "into stage 1 the stream and 2 history entries, 12.0 MiB a micro-batch (24.0 MiB in 2 b" in said
    half = grid(tmp_path, sequence=False, precision="bf16")
    assert "2 history entries, 12.0 MiB a micro-batch (36.0 MiB in 3 b" in describe_layout(
        half, laid_out(half, 8)
    )


def test_without_stages_the_layout_is_the_grid(tmp_path: Path) -> None:
    config = tiny_config(PATHS, tmp_path, parallel={"tensor": 2})
    assert (
        describe_layout(config, laid_out(config, 4)) == "layout: tensor 2 x pipeline 1 x data 2, ZeRO stage 1"
    )


def test_diagnostics_are_recorded_by_layer_and_said_by_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over the layers that have the iteration; the predictor is recorded and not said."""
    residuals = {(0, 0): 9.0, (0, 1): 0.5, (0, 2): 0.125, (1, 0): 7.0, (1, 1): 0.25}
    influence = {key: value / 16 for key, value in residuals.items()}
    run = bare_run(tmp_path / "run")
    run.engine.observe = lambda batch: IterateStatistics(residuals, influence)  # type: ignore[method-assign]
    train(run, [SolverDiagnostics(cast(Any, None), 3)])
    run.close()
    log = read_log(tmp_path / "run")
    assert list(log) == [3, 6]
    for (layer, iterate), value in residuals.items():
        assert log[3][f"relative_residual/layer_{layer}_iterate_{iterate}"] == value
        assert log[3][f"influence/layer_{layer}_iterate_{iterate}"] == value / 16
    said = [line for line in capsys.readouterr().out.splitlines() if "residual" in line]
    assert said[0] == "step      3 | relative residual of iterations 1..2: 0.375 0.125"


def test_diagnostics_of_predictors_alone_are_recorded_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run")
    run.engine.observe = lambda batch: IterateStatistics({(0, 0): 1.0}, {(0, 0): 0.5})  # type: ignore[method-assign]
    train(run, [SolverDiagnostics(cast(Any, None), 8)])
    run.close()
    assert read_log(tmp_path / "run")[8]["influence/layer_0_iterate_0"] == 0.5
    assert "residual" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3600.0, "1:00:00"), (90061.0, "25:01:01")],
)
def test_the_time_that_is_left(seconds: float, said: str) -> None:
    assert _clock(seconds) == said


def test_the_opening_lines_of_a_run(tmp_path: Path) -> None:
    """4 micro-batches of 2 in a step of one rank; every matrix counted, and the solver's coefficients."""
    run = bare_run(tmp_path / "run", training={"precision": "bf16", "steps": 9})
    matrices = 3 * (32 * 3 * 32 + 32 * 32 + 3 * 32 * 48) + 384 * 32  # embedding and head are one
    solvers = sum(p.numel() for name, p in run.engine.meta_model.named_parameters() if ".solver." in name)
    norms = (2 * 3 + 1) * 32
    assert describe_start(run).splitlines() == [
        f"model: 3 layers, d 32, ffn 48, 2 heads, vocabulary 384: {matrices + norms + solvers:,} parameters, "
        f"{solvers} of them the solver's",
        "training: 9 steps of 128 tokens in 4 micro-batches of 2 x 16, bf16, on 1 cpu process(es)",
    ]
    run.close()


def test_a_teacher_in_words(tmp_path: Path) -> None:
    """Three evaluations a layer of the teacher to one of the student; heads cost both the same."""
    weights = {"teacher": "not read", "alpha": 0.5, "beta": 2.0, "temperature": 3.0}
    run = bare_run(
        tmp_path / "run",
        teacher={"kind": "iiet", "iterations": 2},
        solver={"kind": "iiet", "iterations": 0},
        distillation=weights,
    )
    source = cast(Any, SimpleNamespace(description="model here"))
    said = describe_teacher(run, source)
    run.close()
    layers, head = (getattr(run.engine.meta_model, part)(16) for part in ("layer_flops", "head_flops"))
    assert said == (
        f"teacher: model here, solver iiet, a forward pass of {(3 * layers + head) / (layers + head):.2f} x "
        "the student's FLOPs; loss CE + 0.5 MSE + 2 KL at temperature 3"
    )


def test_coefficient_norms_are_euclidean_and_of_what_is_trained() -> None:
    named = {
        "layers.1.solver.coefficients": torch.nn.Parameter(torch.tensor([3.0, -4.0])),
        "layers.2.solver.coefficients": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "norm.weight": torch.nn.Parameter(torch.ones(2)),
    }
    names = {parameter: name for name, parameter in named.items()}
    told = SimpleNamespace(_names=names, _gathered=lambda parameters: nullcontext(), context=alone())
    assert Engine.coefficient_norms(cast(Engine, told)) == {"layers.1.solver.coefficients": 5.0}


def test_another_layout_in_words() -> None:
    there = {"tensor": 1, "pipeline": 1, "data": 4, "zero_stage": 2}
    found = Resumption(Path("there"), cast(Any, SimpleNamespace(layout=there)))
    assert describe_other_layout(found, {**there, "data": 2, "zero_stage": 3}) == [
        "  changed since then: data-parallel ranks: 4 → 2",
        "  changed since then: ZeRO stage: 2 → 3",
    ]
    assert describe_other_layout(found, {**there, "tensor": 2}) == []  # the configuration says that


@pytest.mark.parametrize(
    ("limit", "shown"), [(None, "all rows"), (5, "the first 5 rows of each")], ids=["all", "limited"]
)
def test_tasks_are_said_by_the_metric_that_the_paper_reports(
    limit: int | None,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a task that the paper does not have, by its first one; all of them are recorded."""
    metrics = {"piqa": {"acc": 0.25, "acc_norm": 0.5}, "boolq": {"acc": 0.75, "f1": 0.125}}
    limits: list[int | None] = []

    def run_tasks(model: object, loaded: object, *, limit: int | None, errors: bool) -> TaskResults:
        limits.append(limit)
        return TaskResults(metrics, {"piqa": 1, "boolq": 1})

    monkeypatch.setattr(
        task_evaluation, "load_tasks", lambda names, folder, own: {"tasks": dict.fromkeys(metrics)}
    )
    monkeypatch.setattr(
        task_evaluation, "load_tokenizer", lambda path: SimpleNamespace(eod_id=0, bos_id=None)
    )
    monkeypatch.setattr(task_evaluation, "EngineScorer", lambda engine, config, between: None)
    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    run = bare_run(
        tmp_path / "run", evaluation={"tasks": ["piqa"], "tasks_interval": 3, "tasks_limit": limit}
    )
    train(run, [task_evaluation.TaskEvaluation(run.config)])
    run.close()
    assert limits == [limit] * 3
    log = read_log(tmp_path / "run")
    assert list(log) == [3, 6, 8]
    assert log[8]["tasks/piqa/acc"] == 0.25
    assert log[8]["tasks/boolq/f1"] == 0.125
    said = capsys.readouterr().out.splitlines()
    assert f"evaluation tasks: piqa, boolq on {shown}, every 3 steps" in said
    assert "step      3 | piqa acc_norm 0.5000 | boolq acc 0.7500" in said
