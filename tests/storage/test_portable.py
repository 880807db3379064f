"""Model folders: round trip and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_iiet import models
from megatron_iiet.storage.portable import StoredModel, tokenizer_path, without_padding
from tests.models.conftest import Build, randomise_solvers


@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "euler"},
        {"kind": "dlcl"},
        {"kind": "iiet", "iterations": [1, 0, 2, 1]},
        {"kind": "iiet", "variant": "released", "iterations": 1},
        {"kind": "weight-sharing", "repeats": 2},
        {"kind": "rk2", "stage_coefficients": "gated"},
        {"kind": "rk4", "stage_coefficients": "fixed"},
        {"kind": "pcformer"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(
    build: Build, tokens: torch.Tensor, tmp_path: Path, solver: dict[str, Any], tied: bool
) -> None:
    model = build(**solver, model={"tie_embeddings": tied}, training={"recompute": "layer"})
    randomise_solvers(model)
    extra = tmp_path / "tokenizer.model"
    extra.write_bytes(b"x")
    models.save(model.config, model.state_dict(), tmp_path / "m", extra_files=[extra])
    assert {f.name for f in (tmp_path / "m").iterdir()} == {
        "config.yaml",
        "model.safetensors",
        "tokenizer.model",
    }
    loaded = models.load(tmp_path / "m")
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    for n in range(4):
        if solver["kind"] in ("dlcl", "iiet", "pcformer"):
            coefficients = loaded.get_parameter(f"layers.{n}.solver.coefficients")
            assert coefficients.shape == ((5,) if solver.get("variant") else (n + 1,))
    marked = {name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)}
    assert {name for name, p in loaded.named_parameters() if getattr(p, "keep_fp32", False)} == marked


def test_loads_in_fp32(build: Build, tmp_path: Path) -> None:
    model = build()
    models.save(model.config, {n: t.bfloat16() for n, t in model.state_dict().items()}, tmp_path / "m")
    assert {p.dtype for p in models.load(tmp_path / "m").parameters()} == {torch.float32}
    weights = tmp_path / "m" / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights)
    assert {p.dtype for p in models.load(tmp_path / "m").parameters()} == {torch.float32}


def test_rows_and_settings_of_a_stored_model(build: Build, tmp_path: Path) -> None:
    """A part of a parameter is read from where it lies; how the model was trained is of no interest."""
    model = build(kind="iiet")
    model.config.training.recompute = "layer"
    models.save(model.config, model.state_dict(), tmp_path / "m")
    stored = StoredModel(tmp_path / "m")
    assert stored.config.training.recompute == "off"
    for name in ("embedding.weight", "norm.weight"):
        assert torch.equal(stored.rows(name, 2, 5), model.state_dict()[name][2:5])


def test_saving_refuses(build: Build, tmp_path: Path) -> None:
    model = build()
    state = model.state_dict()
    with pytest.raises(ValueError) as caught:
        models.save(model.config, state, tmp_path)
    assert str(caught.value) == f"{tmp_path} exists already; choose another folder or remove it"
    del state["norm.weight"]
    with pytest.raises(ValueError) as caught:
        models.save(model.config, state, tmp_path / "m")
    assert str(caught.value) == (
        f"{tmp_path / 'm'}: parameter norm.weight is missing, the configuration asks for (24,); weights and "
        "configuration do not belong together"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing(build: Build, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(FileNotFoundError):
        models.save(model.config, model.state_dict(), tmp_path / "m", extra_files=[tmp_path / "gone"])
    assert list(tmp_path.iterdir()) == []


def test_loading_refuses(build: Build, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError) as caught:
            models.load(tmp_path / "m")
        return str(caught.value).replace(str(tmp_path), "TMP")

    hint = "so it is not a model folder; make one with tools/convert_checkpoint.py"
    assert message() == f"TMP/m has no config.yaml, {hint}"
    model = build(kind="iiet")
    models.save(model.config, model.state_dict(), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    assert message().startswith("TMP/m/model.safetensors is damaged (")
    weights.write_bytes(b"")
    assert message().startswith("TMP/m/model.safetensors is damaged (")
    weights.unlink()
    assert message() == f"TMP/m has no model.safetensors, {hint}"

    state = {k: without_padding(model.config, k, v).clone() for k, v in model.state_dict().items()}
    save_file({**state, "layers.1.solver.coefficients": torch.ones(3)}, weights)
    assert "parameter layers.1.solver.coefficients is (3,), the configuration asks for (2,)" in message()
    save_file({**state, "layers.9.x": torch.ones(3)}, weights)
    assert "parameter layers.9.x is (3,), the configuration asks for none of that name" in message()
    config = tmp_path / "m" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 24", "hidden_size: twenty"))
    assert "model.hidden_size is 'twenty' in TMP/m/config.yaml" in message()


def test_a_tokenizer_beside_the_weights_goes_before_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "here.model").write_bytes(b"")
    for name in ("here.model", "elsewhere/here.model"):
        assert tokenizer_path(name, tmp_path) == str(tmp_path / "here.model")
    assert tokenizer_path("elsewhere/other.model", tmp_path) == "elsewhere/other.model"
    assert tokenizer_path("", tmp_path) == ""
