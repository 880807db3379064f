"""What a start makes of a configuration, without an engine that computes: callbacks, batches, opening
lines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.training import pretrain
from megatron_iiet.training.corpora import Corpora
from tests.tiny import tiny_config
from tests.training.bare_run import PATHS, HeldOut, alone, bare_run


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments by which batches are made."""
    given: list[dict[str, Any]] = []

    def making(name: str) -> Any:
        def make(parts: Any, weights: Any, **options: Any) -> Any:
            given.append({"kind": name, "parts": parts, "weights": weights, **options})
            return HeldOut(["batch"])

        return make

    for name in ("TrainBatches", "ValidationBatches"):
        monkeypatch.setattr(pretrain, name, making(name))
    return given


CORPORA = cast(Corpora, SimpleNamespace(
    train=["t"], weights=[1.0], names=["t"], validation=["v"], validation_weights=[2.0]
))  # fmt: skip


def test_batches_are_those_of_the_configuration(tmp_path: Path, noted: list[dict[str, Any]]) -> None:
    config = tiny_config(
        PATHS,
        tmp_path,
        training={"global_batch_size": 12, "micro_batch_size": 3, "seed": 77},
        data={"num_workers": 5, "timeout": 33.0, "skip_steps": [2, [4, 5]]},
    )
    context = alone(4)
    context.data.rank, context.data.size = 1, 4
    pretrain.train_batches(config, CORPORA, context)
    pretrain.validation_batches(config, CORPORA, context, 6, "first")
    assert noted[0].pop("skipped") == config.data.skipped
    assert noted == [
        {
            "kind": "TrainBatches", "parts": ["t"], "weights": [1.0], "global_batch_size": 12,
            "micro_batch_size": 3, "data_parallel_rank": 1, "data_parallel_size": 4, "seed": 77,
            "num_workers": 5, "timeout": 33.0, "pin_memory": False, "add_up": None,
        },
        {
            "kind": "ValidationBatches", "parts": ["v"], "weights": [2.0], "samples": 6,
            "micro_batch_size": 3, "dp_rank": 1, "dp_size": 4, "rule": "first",
        },
    ]  # fmt: skip
    context.counting.size = 2
    pretrain.train_batches(config, CORPORA, context)
    assert noted[2]["add_up"] == context.counting.all_reduce


ALL: dict[str, dict[str, Any]] = {
    "logging": {"profile": [2, 3], "solver_interval": 5},
    "guidance": {"interval": 4, "samples": 3},
    "guards": {"replicas": 6},
    "checkpoint": {"interval": 7},
    "debug": {"inject": ["raise@step=2"]},
}


def test_what_happens_around_a_step(tmp_path: Path, noted: list[dict[str, Any]]) -> None:
    """In this order: guidance changes what is validated, and a drift must not get into a checkpoint."""

    def chosen(corpora: Any = CORPORA, **sections: dict[str, Any]) -> list[Any]:
        config = tiny_config(PATHS, tmp_path, **{"logging": {"solver_interval": 0}, **sections})
        held_out = pretrain.validation_batches(config, corpora, alone(), 5, "spread")
        return pretrain.build_callbacks(config, corpora, alone(), held_out)

    def names(callbacks: list[Any]) -> list[str]:
        return [type(each).__name__ for each in callbacks]

    nothing = cast(Corpora, SimpleNamespace(train=["t"], weights=[1.0], validation=[], validation_weights=[]))
    assert names(chosen()) == ["MetricLogger", "Validation", "Checkpointing"]
    assert names(chosen(nothing)) == ["MetricLogger", "Checkpointing"]
    solver = {"kind": "iiet", "iterations": 1}
    every = chosen(**ALL, solver=solver, evaluation={"interval": 9})
    assert names(every) == [
        *("MetricLogger", "Profiling", "Guidance", "Validation", "SolverDiagnostics", "Replicas"),
        *("Checkpointing", "Faults"),
    ]
    profiling, _, validation, diagnostics, replicas, checkpointing, _ = every[1:]
    assert (profiling.first, profiling.last) == (2, 3)
    assert (validation.interval, diagnostics.interval, replicas.interval) == (9, 5, 6)
    assert checkpointing.interval == 7
    assert names(chosen(nothing, **ALL, solver=solver)) == [
        *("MetricLogger", "Profiling", "Replicas", "Checkpointing", "Faults")
    ]
    without_corrector = chosen(logging={"solver_interval": 5}, solver={"kind": "euler"})
    assert names(without_corrector) == ["MetricLogger", "Validation", "Checkpointing"]
    assert names(chosen(training={"compile": "layer"}))[:2] == ["MetricLogger", "CompileTime"]


def test_the_opening_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for name in ("describe_corpora", "describe_validation", "describe_layout"):
        monkeypatch.setattr(pretrain, name, lambda *_, name=name: name)
    inject = {"inject": ["raise@step=2", "nan@step=3"]}
    precise = {"global_batch_size": 12, "micro_batch_size": 3, "steps": 40}
    run = bare_run(tmp_path / "run", training={**precise, "precision": "bf16"}, debug=inject)
    monkeypatch.setattr(run, "say", said.append)
    run.context.data.size = 2
    pretrain.say_start(run, CORPORA, cast(Any, [1]), ["the tokens are few"])
    length, model = run.config.data.sequence_length, run.engine.meta_model
    opening, *others = said
    assert opening.splitlines() == [
        f"model: 3 layers, d 32, ffn 48, 2 heads, vocabulary {run.config.model.vocab_size}: "
        f"{model.num_parameters():,} parameters, {model.num_solver_parameters():,} of them the solver's",
        f"training: 40 steps of {12 * length:,} tokens in 2 micro-batches of 3 x {length}, bf16, on 1 cpu "
        "process(es)",
    ]
    assert others == [
        "warning: debug.inject brings faults upon this run: raise@step=2, nan@step=3",
        "warning: the tokens are few",
        "describe_corpora",
        "describe_validation",
        "describe_layout",
    ]
    said.clear()
    run.config.debug.inject = []
    run.engine.zero_stage = 3
    pretrain.say_start(run, CORPORA, None, [])
    assert said[1:] == [
        "describe_corpora",
        "describe_layout",
        "merge coefficients: bf16 working copy, fp32 master copy (ZeRO-3 keeps one type)",
    ]
    said.clear()
    run.config.training.precision = "fp32"
    pretrain.say_start(run, CORPORA, None, [])
    assert said[1:] == ["describe_corpora", "describe_layout"]


def test_a_layout_that_differs_is_told() -> None:
    there = SimpleNamespace(state=SimpleNamespace(layout={"data": 2, "zero_stage": 1}))
    told = pretrain.describe_other_layout
    assert told(cast(Any, there), {"data": 2, "zero_stage": 1}) == []
    assert told(cast(Any, there), {"data": 4, "zero_stage": 3}) == [
        "  changed since then: data-parallel ranks: 2 → 4",
        "  changed since then: ZeRO stage: 1 → 3",
    ]


def test_paths_that_are_not_named(tmp_path: Path) -> None:
    pretrain.check_paths(tiny_config(PATHS, tmp_path))
    pretrain.check_paths(tiny_config({"blend": {"a": 1.0}, "tokenizer": "x"}, tmp_path))
    for data, message in (
        ({"tokenizer": "x"}, "data.prefix is not set; give the path of what tools/preprocess_data.py wrote"),
        ({"prefix": "x"}, "data.tokenizer is not set; give the path of what tools/train_tokenizer.py wrote"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            pretrain.check_paths(tiny_config(data, tmp_path))


def test_threads_count_over_replicas_where_documents_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to the process grid."""
    given: list[tuple[ParallelConfig, bool]] = []

    class JoinedError(Exception):
        pass

    def start(config: ParallelConfig, *, counting: bool) -> Any:
        given.append((config, counting))
        raise JoinedError

    monkeypatch.setattr(pretrain.ParallelContext, "start", start)
    for documents, counting in (("ignore", False), ("reset", True), ("pack", True)):
        config = tiny_config(PATHS, tmp_path, data={"documents": documents})
        loaded = pretrain.LoadedConfig(config=config, ds_config_path=None)
        with pytest.raises(JoinedError):
            pretrain.pretrain(loaded)
        assert given.pop() == (config.parallel, counting)
