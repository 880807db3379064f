"""A rank's part of a model on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_iiet.config import ConfigError
from megatron_iiet.hf.export import Extras, export_folder
from megatron_iiet.models import Transformer
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.storage import checkpoint, portable, retention, source
from megatron_iiet.storage.fragments import Place
from megatron_iiet.storage.source import KINDS, Source, open_model
from tests.tiny import save_of, tiny_config


@dataclass
class Stored:
    """Weights in memory that note what was read."""

    tensors: dict[str, Tensor]
    most: int = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        assert 0 <= first <= last <= len(self.tensors[name])
        self.most = max(self.most, last - first)
        return self.tensors[name][first:last]

    def holding(self, name: str, row: int) -> str:
        return f"{name}[{row}]"


@pytest.mark.parametrize("scratch", [1 << 20, 4 * 12 * 3])
@pytest.mark.parametrize(
    ("shape", "shard", "sizes"),
    [
        ((24, 12), Shard(0, (24,)), (1, 2, 4)),
        ((24, 12), Shard(0, (12, 8, 4)), (1, 2, 4)),
        ((10, 12), Shard(1, (12,)), (1, 2, 4)),
        ((10, 12), Shard(1, (8, 4)), (1, 2, 4)),
        ((7, 12), None, (1,)),
        ((13,), None, (1,)),
    ],
    ids=str,
)
def test_a_rank_s_interval(
    shape: tuple[int, ...],
    shard: Shard | None,
    sizes: tuple[int, ...],
    scratch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "SCRATCH_BYTES", scratch)
    whole = torch.randn(shape)
    stored = Stored({"x": whole})
    model = Source("here", tiny_config({}, Path("run")), stored)
    for size in sizes:
        for rank in range(size):
            flat = (whole if shard is None else shard.take(whole, size, rank)).reshape(-1)
            for start in range(0, len(flat), 5):
                for stop in {start, start + 1, min(start + 17, len(flat)), len(flat)}:
                    out = torch.full((stop - start,), float("nan"))
                    model.fill("x", out, Place(shape, shard, size, rank, start))
                    assert torch.equal(out, flat[start:stop])
    if scratch < 1 << 20 and len(shape) > 1:
        assert stored.most <= 3, "reads more at once than the bound"


def test_vocabulary_padding_is_zero_whatever_is_stored() -> None:
    config = tiny_config({}, Path("run"), model={"vocab_size": 10})
    stored = Stored({"embedding.weight": torch.ones(12, 3)})  # with two rows of padding of its own
    model = Source("here", config, stored)
    config.model.hidden_size = 3
    for rank, expected in enumerate((8 * [1.0], 2 * [1.0] + 6 * [0.0], 8 * [0.0])):
        out = torch.full((8 * 3,), float("nan"))
        model.fill("embedding.weight", out, Place((24, 3), Shard(0, (24,)), 3, rank, 0))
        assert out.view(8, 3).tolist() == [[value] * 3 for value in expected]


def test_what_a_path_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is its newest checkpoint, or the one of a step; a checkpoint is itself."""
    monkeypatch.setattr(source, "model_of_checkpoint", lambda folder: (folder.name, None))
    config, layout = tiny_config({}, tmp_path), {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}
    folders = {}
    for step in (2, 4):
        folders[step] = checkpoint.checkpoints_folder(tmp_path) / checkpoint.tag_of(step)
        folders[step].mkdir(parents=True)
        state = checkpoint.TrainState(step, {}, layout)
        checkpoint.write_metadata(folders[step], config, state, save_of(config, state))
    retention.put_in_force(tmp_path, 4)
    for path, step, meant in (
        (tmp_path, None, 4),
        (tmp_path, 2, 2),
        (tmp_path, 4, 4),
        (folders[2], None, 2),
        (folders[4], None, 4),
    ):
        found = open_model(path, "--model", step=step)
        assert (found.description, found.config) == (f"checkpoint {folders[meant]}", folders[meant].name)
    with pytest.raises(ConfigError, match="has no checkpoint step_00000003; there are step_00000002, step_0"):
        open_model(tmp_path, "--model", step=3)
    (folders[2] / "state.json").write_text('{"format": 4, "step": 2, "data": {}, "layout": {}}')
    assert open_model(folders[2], "--model").description.endswith("damage to its files is not noticed)")


def test_what_a_path_may_not_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in (
        ("empty", "is none of what it may be"),
        ("file", "is no folder"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_model(tmp_path / name, "teacher")
        assert str(caught.value) == f"teacher is {tmp_path / name}, which {said}; give {KINDS}"
    with pytest.raises(ConfigError, match=r"^--model is empty; give a model folder of"):
        open_model("", "--model")


def test_a_digest_tells_models_of_one_shape_apart() -> None:
    """By their first rows, in whatever order they are stored."""

    def digest(**tensors: Tensor) -> str:
        return Source("here", tiny_config({}, Path("run")), Stored(tensors)).digest()

    one, other = torch.ones(3, 2), torch.ones(3, 2)
    other[0, 1] = 2.0
    assert digest(a=one, b=other) == digest(b=other, a=one.clone())
    assert len({digest(a=one, b=one), digest(a=one, b=other), digest(a=other, b=one)}) == 3


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("form", ["portable", "LLaMA"])
def test_weights_that_are_no_numbers(value: float, form: str, tmp_path: Path) -> None:
    """Of our parameters one is several tensors of a LLaMA, in other files."""
    name, row = "layers.1.increment.mlp.gate_up.weight", 48 + 3
    config = tiny_config({}, tmp_path, solver={"kind": "euler"}, model={"embedding_scale": 1.0})
    state = Transformer(config).state_dict()
    state[name][row, 5] = value
    portable.save(config, state, tmp_path / "portable")
    if form == "LLaMA":
        stored = portable.StoredModel(tmp_path / "portable")
        export_folder(stored.config, stored, tmp_path / "LLaMA", Extras({}, {}), as_llama=True)
    tensor = name if form == "portable" else "model.layers.1.mlp.up_proj.weight"
    where = f"tensor {tensor} in {tmp_path / form / 'model.safetensors'}"
    model = open_model(tmp_path / form, "training.initial_weights")
    assert len(model.digest()) == 32
    with pytest.raises(ValueError, match="holds NaN or infinity") as caught:
        model.fill(name, torch.empty(96 * 32), Place((96, 32), Shard(0, (48, 48)), 1, 0, 0))
    assert str(caught.value) == (
        f"{where} holds NaN or infinity, first in row {row} of {name}; use weights that are numbers, such as "
        "those of an earlier checkpoint"
    )
