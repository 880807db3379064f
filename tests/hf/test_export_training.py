"""Training goes on from an exported folder, in any layout: initial weights, a teacher, a model to measure."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet import models
from megatron_iiet.config import ConfigError
from megatron_iiet.distillation.analysis import Options, prepare
from megatron_iiet.distillation.plans import PlanRequest
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.tokenizer import Extras, extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.warm_start import open_teacher, open_warm_start
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, validation_loss

torch.set_num_threads(1)

SHAPE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
PAPER: dict[str, Any] = {"kind": "iiet", "iterations": 2}
RELEASED: dict[str, Any] = {"kind": "iiet", "variant": "released", "iterations": 1}
STILL = {"lr": 1e-30}
"""A step with it leaves fp32 weights as they are, to the bit, unless they are 0."""


class State(dict[str, torch.Tensor]):
    """A state dict, some rows at a time."""

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self[name][first:last]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def exported(folder: Path, data: dict[str, str], solver: dict[str, Any], **options: Any) -> Transformer:
    """A model none of whose parameters is 0 or at its initial value, and its folder."""
    model = Transformer(tiny_config(data, folder, model=SHAPE, solver=solver)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if "solver" in name or "norm" in name else 0.05
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            parameter += 1e-3 * (parameter == 0)
            parameter += "norm" in name
    extras = (
        extras_of_tokenizer(Path(data["tokenizer"])) if options.pop("tokenizer", False) else Extras({}, {})
    )
    export_folder(model.config, State(model.state_dict()), folder, extras, max_shard_bytes=30_000, **options)
    return model


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one process, bf16": (1, 1, {"training": {"precision": "bf16"}}),
    "tensor": (2, 1, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline, bf16": (2, 1, {"parallel": {"pipeline": 2}, "training": {"precision": "bf16"}}),
    "zero 2": (2, 2, {}),
    "tensor, zero 3, bf16": (4, 3, {"parallel": {"tensor": 2}, "training": {"precision": "bf16"}}),
}


SOLVERS = {"paper": PAPER, "released": RELEASED}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    long_but(
        product(LAYOUTS, SOLVERS),
        ("tensor, zero 3, bf16", "paper"),
        ("zero 2", "paper"),
        ("pipeline, bf16", "released"),
    ),
)
def test_initial_weights(name: str, variant: str, data: dict[str, str], tmp_path: Path) -> None:
    """Masters are the folder's to the bit, the solver's coefficients too, and the loss is the model's."""
    model = exported(tmp_path / "hf", data, solver := SOLVERS[variant])
    world_size, stage, sections = LAYOUTS[name]
    training = {"steps": 1, "initial_weights": str(tmp_path / "hf"), **sections.get("training", {})}
    given = {**sections, "training": training, "model": SHAPE, "solver": solver, "optimizer": STILL}
    config = tiny_config(data, tmp_path / "run", **given)
    run_ranks(pretrain_rank, world_size, as_data(config), ds_json(tmp_path, stage))
    tolerance = 1e-5 if training.get("precision", "fp32") == "fp32" else 1e-2
    assert read_log(tmp_path / "run")[0]["validation_loss"] == pytest.approx(
        validation_loss(model), rel=tolerance
    )
    found, expected = export_run(tmp_path / "run").state, model.state_dict()
    assert set(found) == set(expected)
    for parameter, tensor in expected.items():
        # Of the released variant's matrices the parts that are never read stay as they are as well.
        assert torch.equal(found[parameter], tensor), parameter


@pytest.mark.slow
def test_from_one_layout_to_another(data: dict[str, str], tmp_path: Path) -> None:
    """Trained tensor-parallel in two stages, exported, taken over by a run under ZeRO-3: one model."""
    config = tiny_config(
        data, tmp_path / "one", model=SHAPE, solver=PAPER, parallel={"tensor": 2, "pipeline": 2}
    )
    run_ranks(pretrain_rank, 4, as_data(config), ds_json(tmp_path, 1))
    run = export_run(tmp_path / "one")
    export_folder(run.config, run.state, tmp_path / "hf", extras_of_tokenizer(run.tokenizer_files[0]))
    training = {"steps": 1, "initial_weights": str(tmp_path / "hf")}
    config = tiny_config(
        data, tmp_path / "two", model=SHAPE, solver=PAPER, training=training, optimizer=STILL
    )
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 3))
    last, first = read_log(tmp_path / "one")[8], read_log(tmp_path / "two")[0]
    assert first["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    found = export_run(tmp_path / "two").state
    for name, tensor in run.state.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_taken_over(data: dict[str, str], tmp_path: Path) -> None:
    exported(tmp_path / "hf", data, PAPER)
    for solver, taken, fresh, left_out in (
        (PAPER, 6, 0, 0),
        ({"kind": "dlcl"}, 6, 0, 0),
        ({"kind": "euler"}, 0, 0, 6),
        (RELEASED, 0, 3 * (2 * 4 + 4 * 32) + 8, 6),
    ):
        config = tiny_config({}, tmp_path, model=SHAPE, solver=solver)
        config.training.initial_weights = str(tmp_path / "hf")
        warm = open_warm_start(config)
        assert warm is not None
        decoder = sum(p.numel() for n, p in Transformer(config).named_parameters() if ".solver." not in n)
        assert warm.counts == (decoder + taken, fresh, left_out)
        assert warm.describe().startswith(f"initial weights: IIET {tmp_path / 'hf'}: {decoder + taken:,} ")


def test_refuses_another_shape_or_scale(data: dict[str, str], tmp_path: Path) -> None:
    exported(tmp_path / "hf", data, PAPER)
    config = tiny_config({}, tmp_path, model=SHAPE | {"embedding_scale": 1.0})
    config.training.initial_weights = str(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"add --model\.embedding_scale 50$"):
        open_warm_start(config)
    config = tiny_config({}, tmp_path, model=SHAPE | {"ffn_hidden_size": 64})
    config.training.initial_weights = str(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size is 48 there and 64 here; give this run"):
        open_warm_start(config)


def test_teacher(data: dict[str, str], tmp_path: Path) -> None:
    """All of it, and refused where it is reduced itself."""
    model = exported(tmp_path / "hf", data, PAPER)
    student = tiny_config({}, tmp_path, model=SHAPE, solver={**PAPER, "iterations": [0, 1, 0]})
    student.distillation.teacher = str(tmp_path / "hf")
    teacher = open_teacher(student)
    assert teacher is not None
    assert set(teacher.weights) == set(model.state_dict())
    exported(tmp_path / "reduced", data, {**PAPER, "iterations": [0, 1, 2]})
    student.distillation.teacher = str(tmp_path / "reduced")
    with pytest.raises(
        ConfigError, match=r"reduced, which has the iterations \[0, 1, 2\]; give the full model"
    ):
        open_teacher(student)


def test_influence_is_measured_on_it(data: dict[str, str], tmp_path: Path) -> None:
    """With the tokenizer of the folder, on a text that is given."""
    exported(tmp_path / "hf", data, PAPER, tokenizer=True)
    (tmp_path / "text.txt").write_text("the solver merges the residual stream once more. " * 200)
    source, config, _ = prepare(
        Options(
            str(tmp_path / "hf"),
            tmp_path / "influence",
            PlanRequest(threshold="auto"),
            data=str(tmp_path / "text.txt"),
            sequences=4,
            micro_batch_size=2,
            sequence_length=16,
        ),
        world_size=1,
    )
    assert source.description == f"IIET {tmp_path / 'hf'}"
    assert config.data.tokenizer == str(tmp_path / "hf" / "tokenizer.model")


def test_a_portable_folder_between_is_the_same_source(data: dict[str, str], tmp_path: Path) -> None:
    from megatron_iiet.storage.hugging_face import import_llama

    model = exported(tmp_path / "hf", data, RELEASED)
    config, state = import_llama(tmp_path / "hf")
    models.save(config, state, tmp_path / "ours")
    for folder in ("hf", "ours"):
        run = tiny_config({}, tmp_path, model=SHAPE, solver=RELEASED)
        run.training.initial_weights = str(tmp_path / folder)
        warm = open_warm_start(run)
        assert warm is not None
        for name, tensor in model.state_dict().items():
            assert torch.equal(warm.source.weights.rows(name, 0, len(tensor)), tensor), name
