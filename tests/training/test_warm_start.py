"""Initial weights from other models: which are taken, that they arrive whole, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megatron_iiet import models
from megatron_iiet.config import ConfigError, RunConfig, load_config
from megatron_iiet.models import Transformer
from megatron_iiet.storage.checkpoint import checkpoints_folder
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.storage.hugging_face import import_llama
from megatron_iiet.storage.source import KINDS
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.warm_start import open_warm_start
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, validation_loss

torch.set_num_threads(1)

SHAPE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
IIET = {"kind": "iiet", "iterations": 0}
STILL = {"lr": 1e-30}
"""A step with it leaves fp32 weights as they are, to the bit, unless they are 0."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Transformer++."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(data, folder / "run", model=SHAPE, solver={"kind": "euler"})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(folder, 1))
    return folder / "run"


def llama(folder: Path, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | fields)).eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def started(
    source: Path,
    data: dict[str, str],
    folder: Path,
    world_size: int = 1,
    stage: int = 1,
    **sections: dict[str, Any],
) -> float:
    """Validation loss before the first of one step that starts from ``source``."""
    training = {"steps": 1, "initial_weights": str(source), **sections.pop("training", {})}
    given = {"solver": IIET, **sections, "model": SHAPE | sections.get("model", {})}
    config = tiny_config(data, folder, training=training, optimizer=STILL, **given)
    run_ranks(pretrain_rank, world_size, as_data(config), ds_json(folder.parent, stage))
    return read_log(folder)[0]["validation_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [IIET, {"kind": "dlcl"}, {"kind": "iiet", "iterations": 3}],
    ids=str,
)
def test_starts_with_the_loss_of_transformer_pp(
    solver: dict[str, Any], data: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """Without corrector iterations to the bit; with them the function is another one from the first step."""
    expected = read_log(trained)[8]["validation_loss"]
    found = started(trained, data, tmp_path / "run", solver=solver)
    if solver.get("iterations"):
        assert abs(found - expected) > 1e-3
    else:
        assert found.hex() == expected.hex()


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "no zero": (1, 0, {}),
    "tensor, bf16": (2, 1, {"parallel": {"tensor": 2}, "training": {"precision": "bf16"}}),
    "pipeline": (2, 1, {"parallel": {"pipeline": 2}}),
    "zero 2, bf16": (2, 2, {"training": {"precision": "bf16"}}),
    "zero 3, bf16": (2, 3, {"training": {"precision": "bf16"}}),
    "all, zero 3": (4, 3, {"parallel": {"tensor": 2, "sequence": True}, "training": {"precision": "bf16"}}),
    "all, pipeline, bf16": (
        4,
        1,
        {"parallel": {"tensor": 2, "pipeline": 2}, "training": {"precision": "bf16"}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(LAYOUTS, "tensor, bf16", "all, zero 3", "all, pipeline, bf16"))
def test_masters_are_the_source_s_in_every_layout(
    name: str, data: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """To the bit, whatever the precision of the working copies; under another padding of the vocabulary."""
    world_size, stage, sections = LAYOUTS[name]
    model = {"vocab_multiple": 100}
    loss = started(trained, data, tmp_path / "run", world_size, stage, model=model, **sections)
    tolerance = 1e-5 if "bf16" not in str(sections) else 2e-3
    assert loss == pytest.approx(read_log(trained)[8]["validation_loss"], rel=tolerance)
    expected, found = export_run(trained).state, export_run(tmp_path / "run").state
    vocabulary = expected["embedding.weight"]
    assert len(vocabulary) == 384
    assert torch.equal(found["embedding.weight"], torch.cat((vocabulary, torch.zeros(16, 32))))
    for parameter in set(expected) - {"embedding.weight"}:
        assert torch.equal(found[parameter], expected[parameter]), parameter
    assert found["layers.2.solver.coefficients"].tolist() == pytest.approx([0, 0, 1], abs=1e-20)


def loss_of(theirs: PreTrainedModel, config: RunConfig) -> float:
    """What a run logs as validation loss, of a model of transformers."""

    class Wrapped(Transformer):
        """Their logits, torch's loss."""

        def loss(self, logits_BTV: Tensor, targets_BT: Tensor, divisor: Any = None) -> Tensor:
            losses_n = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
            return losses_n.mean() if divisor is None else losses_n.sum() / divisor

        def integrate(self, y_BTD: Tensor, *args: Any) -> Tensor:
            return theirs.float()(self.tokens).logits  # type: ignore[no-any-return]

        def embed(self, tokens_BT: Tensor) -> Any:
            self.tokens = tokens_BT
            return super().embed(tokens_BT)

    return validation_loss(Wrapped(config))


@pytest.mark.parametrize(
    ("world_size", "stage", "parallel"),
    [(1, 1, {}), pytest.param(2, 1, {"tensor": 2}, marks=pytest.mark.slow)],
)
def test_from_a_llama(
    world_size: int, stage: int, parallel: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    """Untied, bf16, in several files: the loss is transformers' own."""
    theirs = llama(tmp_path / "hf").bfloat16()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    model = {"embedding_scale": 1.0, "tie_embeddings": False}
    loss = started(tmp_path / "hf", data, tmp_path / "run", world_size, stage, model=model, parallel=parallel)
    config = tiny_config(data, tmp_path / "run", model=SHAPE | model, solver={"kind": "euler"})
    assert loss == pytest.approx(loss_of(theirs, config), rel=1e-5)


@pytest.mark.slow
def test_from_another_family(data: dict[str, str], tmp_path: Path) -> None:
    """Biases, q/k norms and a head width of its own, over tensor-parallel ranks with their parts: the shape
    is taken from the source, the loss is transformers', and what comes out is the source, to the bit."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "head_dim": 12,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    reach = {"vocab_size": 384, "max_position_embeddings": 64, "initializer_range": 0.1}
    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **reach)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "hf")
    flags = ["--model.from", str(tmp_path / "hf"), "--data.sequence_length", "16"]
    shape = asdict(load_config(flags).config.model)
    config = tiny_config(
        data,
        tmp_path / "run",
        model=shape,
        solver={"kind": "euler"},
        parallel={"tensor": 2},
        training={"steps": 1, "initial_weights": str(tmp_path / "hf")},
        optimizer=STILL,
    )
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 3))
    assert read_log(tmp_path / "run")[0]["validation_loss"] == pytest.approx(
        loss_of(theirs, config), rel=1e-5
    )
    found, expected = export_run(tmp_path / "run").state, import_llama(tmp_path / "hf")[1]
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name][: len(value)], value), name


@pytest.mark.slow
def test_resume_goes_before_initial_weights(data: dict[str, str], trained: Path, tmp_path: Path) -> None:
    """The same command goes on from its checkpoint, even when what it started from is gone."""
    source = tmp_path / "source"
    source.symlink_to(trained)
    given = {"model": SHAPE, "optimizer": STILL}
    for stop in (1, 2):
        training = {"steps": 2, "stop_after": stop, "initial_weights": str(source)}
        config = tiny_config(data, tmp_path / "run", training=training, **given)
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
        source.unlink(missing_ok=True)
    assert torch.equal(
        export_run(tmp_path / "run").state["norm.weight"], export_run(trained).state["norm.weight"]
    )
    config.output_dir = str(tmp_path / "other")
    with pytest.raises(
        RanksFailedError, match=r"ConfigError: training\.initial_weights is .*source, which does"
    ):
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    assert not Path(config.output_dir).exists(), "something was written before the check"


@pytest.mark.slow
def test_initial_weights_are_known_by_what_they_are(
    data: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """Moved they are the same, at every later checkpoint too; other ones in their place are others."""
    source, moved = tmp_path / "source", tmp_path / "moved"
    shutil.copytree(trained, source)

    def start(path: Path, stop: int) -> None:
        training = {"stop_after": stop, "initial_weights": str(path)}
        config = tiny_config(data, tmp_path / "run", training=training, model=SHAPE, optimizer=STILL)
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))

    start(source, 1)
    source.rename(moved)
    start(moved, 2)
    start(source, 3)  # it is gone
    config = tiny_config(data, source, model=SHAPE, solver={"kind": "euler"}, training={"steps": 1})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    with pytest.raises(RanksFailedError, match=r"training\.initial_weights is .*source of digest \w+ there"):
        start(source, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", long_but([1, 3], 3))
def test_all_ranks_refuse_weights_that_are_no_numbers(
    stage: int, data: dict[str, str], tmp_path: Path
) -> None:
    """Also those that read other parts of them."""
    config = tiny_config({}, tmp_path, model=SHAPE, solver={"kind": "euler"})
    model = Transformer(config)
    model.initialise(0)  # memory as it comes may hold NaN, too
    state = model.state_dict()
    state["layers.2.increment.mlp.down.weight"][31, 1] = float("nan")
    models.save(config, state, tmp_path / "model")
    config = tiny_config(data, tmp_path / "run", model=SHAPE, solver=IIET)
    config.training.initial_weights = str(tmp_path / "model")
    told = run_ranks(refusal_of_numbers, 2, as_data(config), ds_json(tmp_path, stage))
    assert told[0] == told[1]
    file = tmp_path / "model" / "model.safetensors"
    assert told[0].startswith(f"tensor layers.2.increment.mlp.down.weight in {file} holds NaN or infinity")
    assert not (tmp_path / "run").exists()


def refusal_of_numbers(config: dict[str, Any], ds_path: Path) -> str:
    with pytest.raises(ValueError, match="holds NaN") as caught:
        pretrain_rank(config, ds_path)
    return str(caught.value)


# --- what is taken over ---


def saved(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A model folder with values that are not the initial ones."""
    config = tiny_config({}, folder, **sections)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    models.save(config, model.state_dict(), folder)
    return config


DLCL = {"kind": "dlcl"}
PAPER = {"kind": "iiet", "iterations": 2}
RELEASED = {"kind": "iiet", "variant": "released", "iterations": 1}
DECODER = 384 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "here", "taken", "fresh", "left_out"),
    [
        ({"kind": "euler"}, PAPER, 0, 6, 0),
        (DLCL, PAPER, 6, 0, 0),
        (PAPER, DLCL, 6, 0, 0),
        (PAPER, {**PAPER, "predictor": "euler", "iterations": [0, 1, 0]}, 6, 0, 0),
        (PAPER, {**PAPER, "history_norm": "none"}, 0, 6, 6),
        (DLCL, {"kind": "euler"}, 0, 0, 6),
        (DLCL, RELEASED, 0, 3 * (2 * 4 + 4 * 32) + 8, 6),
        (RELEASED, {**RELEASED, "iterations": 3}, 3 * (2 * 4 + 4 * 32) + 8, 0, 0),
        (RELEASED, {**RELEASED, "readout": "shared"}, 3 * (4 + 4 * 32) + 8, 0, 12),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_taken_over(
    there: dict[str, Any], here: dict[str, Any], taken: int, fresh: int, left_out: int, tmp_path: Path
) -> None:
    saved(tmp_path / "model", solver=there)
    config = tiny_config({}, tmp_path, solver=here, training={"initial_weights": str(tmp_path / "model")})
    warm = open_warm_start(config)
    assert warm is not None
    assert warm.counts == (DECODER + taken, fresh, left_out)
    assert set(warm.taken) <= {name for name, _ in Transformer.on_meta(config).named_parameters()}
    lost = f"; {left_out} of its solver ({there['kind']}) have no place here and are left out"
    told = warm.changes
    assert bool(told) == (there != here)
    if "iterations" in there and here == {**there, "iterations": 3}:
        assert told == f"; trained with solver.iterations {there['iterations']}, they go on with iterations 3"
    assert warm.describe() == (
        f"initial weights: model {tmp_path / 'model'}: {DECODER + taken:,} parameters taken over, "
        f"{fresh} start at their initial values{lost if left_out else ''}"
        f"{told}"
    )


@pytest.mark.slow
def test_a_checkpoint_of_the_first_stage_has_no_coefficients_to_give(
    data: dict[str, str], tmp_path: Path
) -> None:
    two = {"kind": "iiet", "iterations": 1, "schedule": [[0.5, 0], [0.5, 1]]}
    config = tiny_config(data, tmp_path / "run", solver=two, training={"stop_after": 2})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    for source in (tmp_path / "run", checkpoints_folder(tmp_path / "run") / "step_00000002"):
        config.training.initial_weights = str(source)
        warm = open_warm_start(config)
        assert warm is not None
        assert warm.counts == (DECODER, 6, 0)
        assert warm.source.description.endswith("run/checkpoints/step_00000002")


# --- what is refused ---


def refusal(config: RunConfig, source: Path | str) -> str:
    config = replace(config, training=replace(config.training, initial_weights=str(source)))
    with pytest.raises(ConfigError) as caught:
        open_warm_start(config)
    return str(caught.value)


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    config = tiny_config({}, tmp_path / "run")
    assert open_warm_start(config) is None
    give = f"; give {KINDS}"
    gone = tmp_path / "gone"
    assert refusal(config, gone) == f"training.initial_weights is {gone}, which does not exist{give}"
    gone.write_text("")
    assert refusal(config, gone) == f"training.initial_weights is {gone}, which is no folder{give}"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("")
    assert refusal(config, empty) == (
        f"training.initial_weights is {empty}, which is none of what it may be{give}"
    )
    (empty / "checkpoints").mkdir()
    assert refusal(config, empty) == (
        f"{empty} holds no complete checkpoint; give the output_dir of a training run"
    )


def test_refuses_another_shape(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    path = tmp_path / "model"
    model: dict[str, Any] = {"ffn_hidden_size": 64, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    config = tiny_config({}, tmp_path, model={**model, "tie_embeddings": False, "rotary_base": 5e5})
    assert refusal(config, path) == (
        f"training.initial_weights is {path}, a model of another shape: "
        "model.ffn_hidden_size is 48 there and 64 here; "
        "model.num_key_value_heads is 2 there and 1 here; "
        "model.tie_embeddings is True there and False here; "
        "model.rms_norm_eps is 1e-06 there and 1e-05 here; "
        "model.rotary_base is 10000.0 there and 500000.0 here; "
        "give this run the same values, or another model"
    )
    for key, value in {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 400,
    }.items():
        assert f"model.{key} is " in refusal(tiny_config({}, tmp_path, model={key: value}), path)
    longer = tiny_config({}, tmp_path, model={"max_position_embeddings": 64, "vocab_multiple": 7})
    longer.training.initial_weights = str(path)
    assert open_warm_start(longer) is not None


def test_refuses_another_embedding_scale(tmp_path: Path) -> None:
    llama(tmp_path / "hf", tie_word_embeddings=True)
    config = tiny_config({}, tmp_path, model=SHAPE)
    assert refusal(config, tmp_path / "hf") == (
        f"training.initial_weights is {tmp_path / 'hf'}, whose embedding is scaled by 1, but here it is by "
        "50 (model.embedding_scale unit); add --model.embedding_scale 1"
    )
    saved(tmp_path / "model")
    config = tiny_config({}, tmp_path, model={"init_std": 0.03})
    assert refusal(config, tmp_path / "model").endswith("add --model.embedding_scale 50")
    config.model.embedding_scale = 50.0  # what counts is the factor, not how it is written
    config.training.initial_weights = str(tmp_path / "model")
    assert open_warm_start(config) is not None


def test_refuses_damaged_weights(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    config = tiny_config({}, tmp_path)
    config.training.initial_weights = str(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_warm_start(config)
