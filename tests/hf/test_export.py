"""From exported folders transformers computes what our model computes, and they come back to the bit."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from megatron_iiet import models
from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.config.solvers import IIET
from megatron_iiet.hf import modeling_iiet, travelling
from megatron_iiet.hf.export import Written, export_folder
from megatron_iiet.hf.tokenizer import Extras, extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable, safetensors_stream
from megatron_iiet.storage.hugging_face import import_llama
from megatron_iiet.storage.hugging_face.shards import parse_bytes, write_shards
from megatron_iiet.storage.safetensors_stream import TensorToWrite
from tests.marks import long_but

torch.set_num_threads(1)

SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "ffn_hidden_size": 37,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "rotary_base": 5000.0,
    "rms_norm_eps": 1e-5,
}
SOLVERS: list[dict[str, Any]] = [
    {"kind": "euler"},
    {"kind": "euler", "output_norm": "layer"},
    {"kind": "dlcl", "coefficient_init": "average"},
    {"kind": "weight-sharing", "repeats": 2},
    {"kind": "rk2", "stage_coefficients": "gated"},
    {"kind": "rk2", "stage_coefficients": "learned"},
    {"kind": "rk4", "stage_coefficients": "fixed"},
    {"kind": "pcformer", "predictor_order": 2},
    {"kind": "pcformer", "predictor_order": 4},
    {"kind": "iiet", "iterations": 2},
    {
        "kind": "iiet",
        "iterations": [1, 0, 2, 3],
        "predictor": "euler",
        "damping": 0.5,
        "history_norm": "none",
    },
    {"kind": "iiet", "variant": "released", "iterations": 1},
    {"kind": "iiet", "iterations": 2, "key_values": "first"},
    {"kind": "iiet", "variant": "released", "iterations": [0, 2, 1, 1], "readout": "shared"},
]
OF_IIET = "DIR/config.json (model_type iiet)"
NO_EXTRAS = Extras({}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})


def build(solver: dict[str, Any], **model: Any) -> Transformer:
    """A model none of whose parameters is at a value that hides a mistake."""
    sections = {"model": SHAPE | model, "solver": solver, "data": {"sequence_length": 16}}
    result = Transformer(config_from_dict(sections)).eval()
    result.initialise(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if ".solver." in name or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return result


class State(dict[str, torch.Tensor]):
    """A state dict, some rows at a time."""

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self[name][first:last]


def export(model: Transformer, folder: Path, **options: Any) -> Written:
    return export_folder(model.config, State(model.state_dict()), folder, NO_EXTRAS, **options)


def unpadded(model: Transformer) -> dict[str, torch.Tensor]:
    rows = model.config.model.vocab_size
    return {
        name: tensor[:rows] if name in ("embedding.weight", "head.weight") else tensor
        for name, tensor in model.state_dict().items()
    }


def assert_same(one: RunConfig, other: RunConfig) -> None:
    assert (one.model, one.solver) == (other.model, other.solver)


@pytest.mark.parametrize(
    ("solver", "tied"), [(solver, number % 3 > 0) for number, solver in enumerate(SOLVERS)], ids=str
)
def test_comes_back_to_the_bit(tmp_path: Path, solver: dict[str, Any], tied: bool) -> None:
    """Ours → Hugging Face in many shards → ours: equal tensors and an equal configuration."""
    model = build(solver, tie_embeddings=tied, vocab_multiple=32)
    written = export(model, tmp_path / "hf", max_shard_bytes=20_000)
    assert len(written.weight_files) > 2
    config, state = import_llama(tmp_path / "hf")
    assert_same(config, model.config)
    expected = unpadded(model)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        middle = len(tensor) // 2
        assert torch.equal(state.rows(name, middle, len(tensor)), tensor[middle:]), name
    models.save(config, state, tmp_path / "ours")
    again = models.load(tmp_path / "ours")
    assert_same(again.config, model.config)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_transformers_computes_the_same(tmp_path: Path, solver: dict[str, Any]) -> None:
    model = build(solver, init_std=0.05)
    export(model, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (loaded(tokens).logits - model(tokens)).abs().max() < 1e-5
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.num_parameters() == model.num_parameters()
    loaded.save_pretrained(tmp_path / "saved")  # what transformers writes comes back as well
    config, state = import_llama(tmp_path / "saved")
    assert_same(config, model.config)
    assert all(torch.equal(state[name], tensor) for name, tensor in unpadded(model).items())


def test_files_of_a_folder(tmp_path: Path) -> None:
    model = build({"kind": "iiet", "iterations": [1, 0, 2, 3]})
    written = export(model, tmp_path / "hf")
    assert written.files == ["README.md", "modeling_iiet.py"]
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "README.md",
        "model.safetensors",
        "modeling_iiet.py",
    }
    assert (tmp_path / "hf" / "modeling_iiet.py").read_bytes() == travelling.modeling_code()
    assert travelling.AUTO_MAP == modeling_iiet.AUTO_MAP
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["model_type"] == "iiet"
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_iiet.IIETForCausalLM"
    assert (fields["vocab_size"], fields["embedding_scale"], fields["pad_token_id"]) == (61, 50.0, None)
    assert fields["solver"] == {
        "kind": "iiet",
        "variant": "paper",
        "iterations": [1, 0, 2, 3],
        "merge": True,
        "predictor": "merged",
        "coefficient_init": "identity",
        "history_norm": "rms",
        "damping": 1.0,
        "key_values": "every",
    }
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, None)


def test_iterations_are_listed_layer_by_layer(tmp_path: Path) -> None:
    """Also where one number was given: whoever reads config.json needs no rule for the other form."""
    export(build({"kind": "iiet", "iterations": 2}), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["solver"]["iterations"] == [2, 2, 2, 2]


@pytest.mark.parametrize("as_llama", [False, True])
def test_rows_at_a_time_are_the_same_file(
    as_llama: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values, gate and up lie one below the other in ours; large ones are written in parts."""
    model = build({"kind": "euler"} if as_llama else {"kind": "iiet", "iterations": 1}, tie_embeddings=False)
    export(model, tmp_path / "whole", as_llama=as_llama, dtype="bf16")
    for rows in (1, 5):
        monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 4 * SHAPE["hidden_size"] * rows)
        export(model, tmp_path / f"{rows}", as_llama=as_llama, dtype="bf16")
        for whole in (tmp_path / "whole").glob("*.safetensors"):
            assert (tmp_path / f"{rows}" / whole.name).read_bytes() == whole.read_bytes()


def test_shards_are_what_transformers_reads(tmp_path: Path) -> None:
    model = build({"kind": "euler"}, embedding_scale=1.0, tie_embeddings=False)
    written = export(model, tmp_path / "hf", max_shard_bytes=10_000, as_llama=True)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    sizes = {}
    for name in written.weight_files:
        with safe_open(tmp_path / "hf" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes[name] = sum(4 * file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
            assert {key for key, where in index["weight_map"].items() if where == name} == set(file.keys())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * model.num_parameters()
    assert max(sizes.values()) <= 10_000
    assert all(sizes[one] + sizes[two] > 5_000 for one, two in zip(sizes, list(sizes)[1:], strict=False))


@pytest.mark.parametrize(("most", "files"), [(79, ["a", "b", "c"]), (80, ["ab", "c"]), (119, ["ab", "c"])])
def test_a_file_is_as_full_as_it_may_be(most: int, files: list[str], tmp_path: Path) -> None:
    tensors = {name: TensorToWrite.whole((10,), lambda: torch.zeros(10)) for name in "abc"}
    names = write_shards(tmp_path, tensors, most)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert ["".join(name for name in "abc" if where[name] == file) for file in names] == files
    assert write_shards(tmp_path, tensors, 120) == ["model.safetensors"]


@pytest.mark.parametrize(("cache", "key_values"), [("all", "every"), ("last", "every"), ("first", "first")])
def test_the_cache_that_makes_another_function_is_read(cache: str, key_values: str, tmp_path: Path) -> None:
    """Of a folder whose configuration somebody has changed: attention sees the keys that are cached."""
    export(build({"kind": "iiet", "iterations": 2}), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kv_cache": cache}))
    assert import_llama(tmp_path / "hf")[0].solver.key_values == key_values  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_solver_in_fp32(tmp_path: Path, dtype: str) -> None:
    model = build({"kind": "iiet", "variant": "released", "iterations": 1}, init_std=0.05)
    export(model, tmp_path / "hf", dtype=dtype)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if ".solver." in name else half), name
    _, state = import_llama(tmp_path / "hf")
    for name, tensor in unpadded(model).items():
        assert torch.equal(state[name], tensor if ".solver." in name else tensor.to(half).float())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(half)[6:]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stored[name]), name
        assert parameter.dtype == stored[name].dtype, name


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = build({"kind": "euler"})
    with torch.no_grad():
        model.get_parameter("layers.2.increment.mlp.down.weight")[3, 5] = 1e5
    with pytest.raises(ValueError) as caught:
        export(model, tmp_path / "hf", dtype="fp16")
    assert str(caught.value) == (
        "model.layers.2.mlp.down_proj.weight holds 100000, which fp16 (largest value 65504) cannot hold; "
        "export as bf16 or fp32"
    )
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "hf", dtype="bf16")


class TestPlainLlama:
    def test_from_llama_and_back(self, tmp_path: Path) -> None:
        """Hugging Face → ours → Hugging Face: every tensor and every field that LLaMA has."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
        llama = LlamaForCausalLM(config).eval()
        llama.save_pretrained(tmp_path / "hf")
        ours, state = import_llama(tmp_path / "hf")
        models.save(ours, state, tmp_path / "ours")
        stored = portable.StoredModel(tmp_path / "ours")
        ids = Extras({}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
        export_folder(stored.config, stored, tmp_path / "again", ids, as_llama=True)
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        fields = [LlamaForCausalLM.from_pretrained(tmp_path / n).config.to_dict() for n in ("hf", "again")]
        for ours_only in ("_name_or_path", "transformers_version"):
            fields[0].pop(ours_only, None), fields[1].pop(ours_only, None)
        assert fields[0] == fields[1]
        assert not (tmp_path / "again" / "modeling_iiet.py").exists()

    def test_both_generations_of_transformers_find_the_rotary_base(self, tmp_path: Path) -> None:
        """Version 4 reads ``rope_theta`` and takes 10000 where it is missing; 5 reads ``rope_parameters``."""
        model = build({"kind": "euler"}, embedding_scale=1.0)
        export(model, tmp_path / "hf", as_llama=True)
        fields = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 5000.0
        config, _ = import_llama(tmp_path / "hf")
        assert config.model.rotary_base == 5000.0

    def test_scale_moves_into_an_untied_embedding(self, tmp_path: Path) -> None:
        model = build({"kind": "euler"}, tie_embeddings=False, init_std=0.05)
        written = export(model, tmp_path / "hf", as_llama=True)
        assert written.notes == [
            "model.embedding_scale 20 is multiplied into the embedding: a LLaMA has no such factor"
        ]
        tokens = torch.arange(30)[None]
        with torch.no_grad():
            found = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
            assert (found - model(tokens)).abs().max() < 1e-5

    @pytest.mark.parametrize(
        ("solver", "why"),
        [
            ({"kind": "dlcl"}, "solver.kind is 'dlcl', where"),
            ({"kind": "euler", "output_norm": "layer"}, "solver.output_norm is 'layer', where"),
            (
                {"kind": "euler"},
                "its embedding is the head as well, and is scaled by 50 as an embedding only",
            ),
        ],
        ids=str,
    )
    def test_refuses_what_is_none(self, tmp_path: Path, solver: dict[str, Any], why: str) -> None:
        with pytest.raises(ValueError) as caught:
            export(build(solver), tmp_path / "hf", as_llama=True)
        assert str(caught.value).startswith(f"the model is no plain LLaMA: {why}")
        assert str(caught.value).endswith("; leave out --as-llama")
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        export(build({"kind": "iiet", "iterations": [1, 0, 2, 3]}), tmp_path / "hf", max_shard_bytes=20_000)
        return tmp_path / "hf"

    def edit(self, folder: Path, of_solver: dict[str, Any] | None = None, **fields: Any) -> None:
        content = json.loads((folder / "config.json").read_text()) | fields
        if of_solver:
            content["solver"] |= of_solver
        (folder / "config.json").write_text(json.dumps(content))

    def message(self, folder: Path, **solver: Any) -> str:
        with pytest.raises(ValueError) as caught:
            import_llama(folder, solver)
        return str(caught.value).replace(str(folder), "DIR")

    def test_solver_of_its_own(self, folder: Path) -> None:
        assert self.message(folder, kind="euler") == (
            "DIR/config.json: the model has a solver of its own; leave out solver.kind"
        )

    @pytest.mark.parametrize(
        ("solver", "message"),
        [
            ({"kind": "heun"}, "solver.kind is 'heun' in DIR/config.json, but must be 'euler', 'dlcl'"),
            (
                {"iterations": [1, 2]},
                "solver.iterations lists 2 numbers, but model.num_layers is 4; give one",
            ),
            (
                {"iterations": [2, 2]},  # of one number, which must not stand for all layers
                "solver.iterations lists 2 numbers, but model.num_layers is 4; give one",
            ),
            (
                {"iterations": [1, 2, -1, 0]},
                "solver.iterations is [1, 2, -1, 0], but iteration counts must be",
            ),
            ({"iterations": None}, "DIR/config.json: solver has no 'iterations'; export the model again"),
            ({"kind": None}, "DIR/config.json: solver has no 'kind'; export the model again"),
            (
                {"order": 3},
                "DIR/config.json: solver has the unknown key 'order'; known are kind, variant, output_norm,",
            ),
            ({"damping": "much"}, "solver.damping is 'much' in DIR/config.json, but must be"),
            (
                {"repeats": 4},
                "solver.repeats is 4 in DIR/config.json, but the solver is of kind iiet, variant paper",
            ),
            ({"readout": "shared"}, "solver.readout is 'shared' in DIR/config.json, but the solver is of"),
        ],
        ids=str,
    )
    def test_solver(self, folder: Path, solver: dict[str, Any], message: str) -> None:
        self.edit(folder, solver)
        assert self.message(folder).startswith(message)

    def test_a_key_of_the_other_variant_is_told(self, folder: Path) -> None:
        """transformers wrote it when the file that travels had one table for both variants."""
        self.edit(folder, {"readout": "separate"})
        with pytest.warns(
            UserWarning, match=r"solver\.readout is 'separate', which kind iiet, variant paper"
        ):
            config, _ = import_llama(folder)
        assert config.solver == IIET(iterations=[1, 0, 2, 3])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"solver": [1]}, "DIR/config.json: solver is [1], but must be an object such as"),
            ({"solver": None}, "DIR/config.json: solver is None, but must be an object such as"),
            ({"embedding_scale": None}, f"{OF_IIET}: embedding_scale is missing; supported is a number"),
            (
                {"architectures": ["X"]},
                f"{OF_IIET}: architectures is ['X']; supported is ['IIETForCausalLM']",
            ),
            (
                {"kv_cache": "half"},
                f"{OF_IIET}: kv_cache is 'half'; supported is 'all', 'last', 'first'",
            ),
            ({"vocab_size": 60}, "DIR/model-00001-of-000"),
        ],
        ids=str,
    )
    def test_fields(self, folder: Path, fields: dict[str, Any], message: str) -> None:
        self.edit(folder, **fields)
        assert self.message(folder).startswith(message)

    def test_another_depth(self, folder: Path) -> None:
        self.edit(folder, {"iterations": [1, 0, 2, 3, 0]}, num_hidden_layers=5)
        assert self.message(folder) == (
            "DIR has no tensor model.layers.4.input_layernorm.weight ([24]), which its config.json asks for; "
            "give a complete checkpoint"
        )

    def test_missing_and_damaged_shards(self, folder: Path) -> None:
        shard = sorted(folder.glob("model-*"))[1]
        content = shard.read_bytes()
        shard.write_bytes(content[:-10])
        assert self.message(folder).startswith(f"DIR/{shard.name} is not a readable safetensors file (")
        shard.write_bytes(b"\x80\x04" + content)
        assert self.message(folder).startswith(f"DIR/{shard.name} is not a readable safetensors file (")
        shard.unlink()
        assert self.message(folder) == (
            f"DIR/model.safetensors.index.json names {shard.name}, which is missing; download the "
            "checkpoint again"
        )

    def test_a_coefficient_is_missing(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        path = folder / index["model.layers.3.solver.coefficients"]
        tensors = load_file(path)
        del tensors["model.layers.3.solver.coefficients"]
        save_file(tensors, path)
        assert self.message(folder).startswith(
            "DIR has no tensor model.layers.3.solver.coefficients ([4]), which"
        )

    def test_pickles(self, folder: Path) -> None:
        for file in folder.glob("model*"):
            if file.suffix != ".py":
                file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
        assert self.message(folder) == (
            "DIR/pytorch_model.bin asks for os.system, which no weight needs and which could run code; it is "
            "not read, so save the checkpoint with safetensors"
        )

    def test_target_exists(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="exists already; choose another folder or remove it"):
            export(build({"kind": "euler"}), folder)


@pytest.mark.parametrize(
    ("version", "works"),
    [
        ("4.56.2", False),
        ("4.57.6", True),
        ("5.0.0", True),
        ("5.24.1", True),
        ("5.25.0", False),
        ("6.0", False),
    ],
)
def test_the_code_that_travels_knows_its_transformers(
    tmp_path: Path, version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while it is imported: a later check would come after the names that a version lacks."""
    export(build({"kind": "iiet", "iterations": 1}), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["transformers_version"] == transformers.__version__
    monkeypatch.setattr("transformers.__version__", version)
    load = partial(runpy.run_path, str(tmp_path / "hf" / "modeling_iiet.py"), run_name=f"of_{version}")
    if works:
        assert "IIETForCausalLM" in load()
        return
    with pytest.raises(
        ImportError, match=rf"transformers >= 4\.57, < 5\.25, but {version} is installed; pip"
    ):
        load()


def test_sizes() -> None:
    decimal = {"5GB": 5_000_000_000, "500 MB": 500_000_000, "1.5kb": 1500, "77": 77, " 1Mb ": 1_000_000}
    binary = {"2GiB": 2_147_483_648, "0.5 gib": 536_870_912, "3MiB": 3_145_728, "1KiB": 1024}
    sizes = decimal | binary
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GB", "5TB", "-1GB", "0", "five"):
        with pytest.raises(ValueError, match="is no size of a file; give a number and a unit"):
            parse_bytes(text)


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """The weights fail half-way."""
    model = build({"kind": "euler"})
    state = State(model.state_dict())
    del state["layers.3.increment.mlp.down.weight"]
    with pytest.raises(KeyError):
        export_folder(model.config, state, tmp_path / "hf", NO_EXTRAS, max_shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_no_tokenizer(tmp_path: Path) -> None:
    extras = extras_of_tokenizer(None)
    assert extras.note == "no tokenizer came with the model, so the folder has none"
    model = build({"kind": "euler"})
    export_folder(model.config, State(model.state_dict()), tmp_path / "a/b/hf", extras)
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["hf"], "folders above are made"
    (tmp_path / "a/b/hf").rename(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None


BIG = {"hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 8, "vocab_size": 8000}
LAYER_BYTES = 4 * (3 * 512**2 + 3 * 512 * 1408)
_MEASURED = """
import sys, threading, time
import torch
from tools.convert_checkpoint import convert, parse_arguments

torch.set_num_threads(1)
def anonymous():  # memory that no file backs
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
words = sys.argv[1:]
sys.argv[1:] = [word.replace("big", "small") for word in words]
convert(parse_arguments())  # what is imported on the way is not the model's
sys.argv[1:] = words
thread = threading.Thread(target=watch)
before = anonymous()
thread.start()
try:
    convert(parse_arguments())
finally:
    done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--from-model", "model-big", "--to-hf", "target-big", "--dtype", "bf16"],
        *long_but(
            [
                (["--from-hf", "hf-big", "--to", "target-big"],),
                (["--from-hf", "hf-big", "--to-hf", "target-big", "--max-shard-size", "20MB"],),
            ]
        ),
    ],
    ids=lambda options: f"{options[0]} {options[2]}",
)
def test_memory_is_a_layer_s(tmp_path: Path, options: list[str]) -> None:
    """A conversion's own memory does not grow with the model: of 8 layers and a table, less than 3."""
    for name, shape in (("small", SHAPE), ("big", BIG)):
        model = build({"kind": "iiet", "iterations": 1}, **shape)
        if options[0] == "--from-hf":
            export(model, tmp_path / f"hf-{name}", max_shard_bytes=30_000_000)
        else:
            models.save(model.config, model.state_dict(), tmp_path / f"model-{name}")
    assert 4 * model.num_parameters() > 9 * LAYER_BYTES
    result = subprocess.run(
        [sys.executable, "-c", _MEASURED, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 3 * LAYER_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("how", long_but([signal.SIGKILL, signal.SIGTERM], signal.SIGKILL))
def test_a_kill_leaves_no_folder(tmp_path: Path, how: signal.Signals) -> None:
    """Killed while it writes; the next attempt is not disturbed by what the kill left."""
    model = build({"kind": "euler"})
    models.save(model.config, model.state_dict(), tmp_path / "source")
    tool = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    command = [sys.executable, tool, "--from-model", "source", "--to-hf", "target", "--max-shard-size", "1KB"]
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    for _ in range(10):  # until it is hit while it writes: a busy machine may look too late
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("target.partial/*"))) < 4:
            time.sleep(0.001)
        process.send_signal(how)
        process.wait()
        if not target.exists():
            break
        shutil.rmtree(target)
    assert process.returncode
    assert not target.exists()
    assert partial.exists() == (how == signal.SIGKILL)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not partial.exists()
    _, state = import_llama(tmp_path / "target")
    assert all(torch.equal(state[name], tensor) for name, tensor in unpadded(model).items())
