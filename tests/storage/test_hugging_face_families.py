"""Models of several families, made and saved by transformers' own classes, compute in ours what they compute
there; so does what comes back from ours."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_iiet import models
from megatron_iiet.config import config_from_dict
from megatron_iiet.config.hugging_face import FAMILIES, model_of_fields, read_json
from megatron_iiet.storage.hugging_face import import_llama

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": None, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-3.2": ("Llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "smollm": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "biased-llama": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "nemo": ("Mistral", {"sliding_window": 128, "head_dim": 8, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "yarn-no-mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biased": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
}

QUICK = ("llama-3.1", "qwen2.5-yarn", "qwen3-biased")


def make(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A source with random weights, no norm or bias at the value that would hide a mistake."""
    torch.manual_seed(0)
    family, fields = SOURCES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif parameter_name.endswith(".bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(97, (2, 120), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


def imported(folder: Path, target: Path) -> models.Transformer:
    config, state = import_llama(folder)
    assert config.solver.kind == "euler"
    models.save(config, state, target)
    return models.load(target)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SOURCES]
)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = make(name, tmp_path / "hf")
    ours = imported(tmp_path / "hf", tmp_path / "ours")
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-5
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2", "qwen3"])
def test_shards_of_bf16(tmp_path: Path, name: str) -> None:
    """They are fp32 here, to the bit, and the model computes what one of these weights does."""
    make(name, tmp_path / "hf").bfloat16().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    ours = imported(tmp_path / "half", tmp_path / "ours")
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-5


def rewritten(folder: Path, **fields: Any) -> None:
    """The ``config.json`` of a folder with other fields; ``...`` removes one."""
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


@pytest.mark.parametrize("name", ["llama-3.1", "linear", "qwen2", "qwen2.5-yarn"])
def test_spelling_of_older_transformers(tmp_path: Path, name: str) -> None:
    """rope_theta and rope_scaling, its kind as ``type`` or ``rope_type``; torch_dtype."""
    make(name, tmp_path / "hf")
    today = import_llama(tmp_path / "hf")[0]
    rope = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]
    base, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for spelling in ("type", "rope_type"):
        scaling = None if kind == "default" else {spelling: kind, **rope}
        older = {"rope_theta": base, "rope_scaling": scaling, "torch_dtype": "float32", "dtype": ...}
        rewritten(tmp_path / "hf", rope_parameters=..., **older)
        assert import_llama(tmp_path / "hf")[0] == today
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = imported(tmp_path / "hf", tmp_path / "ours")
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-5


def test_both_spellings_at_once_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    make("llama-2", tmp_path / "hf")
    both = {"rope_theta": 77.0, "rope_scaling": {**LLAMA3, "rope_theta": ...}}
    del both["rope_scaling"]["rope_theta"]
    rewritten(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 5.0}, **both)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = imported(tmp_path / "hf", tmp_path / "ours")
    assert ours.config.model.rotary_base == 77.0
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_missing_field_is_transformers_default(tmp_path: Path, family: str) -> None:
    name = next(n for n, (title, _) in SOURCES.items() if title.lower() == family)
    make(name, tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept = {"num_attention_heads": 32, "num_hidden_layers": 1, "hidden_size": 4096, "vocab_size": 97}
    kept |= {"intermediate_size": 64, "model_type": family}
    if family == "mistral":
        kept["sliding_window"] = None
    rewritten(tmp_path / "hf", **{**dict.fromkeys(fields, ...), **kept})
    path = tmp_path / "hf" / "config.json"
    ours = model_of_fields(read_json(path), path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_width == getattr(theirs, "head_dim", 128)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.rms_norm_eps, ours.init_std) == (theirs.rms_norm_eps, theirs.initializer_range)
    assert (ours.rotary_base, ours.rope_scaling) == (theirs.rope_parameters["rope_theta"], None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_field_that_transformers_knows_is_known_here(tmp_path: Path, family: str) -> None:
    """Read, refused unless neutral, or of no effect; one that nobody knows is told."""
    theirs = getattr(transformers, f"{FAMILIES[family].title.replace('LLaMA', 'Llama')}Config")()
    fields = {name: value for name, value in theirs.to_dict().items() if value is not None}
    fields |= {"sliding_window": None, "architectures": None}
    path = tmp_path / "config.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of_fields(fields, path)
    unknown = {**fields, "head_scale": 2.0, "gate": {}, "nothing": None}
    with pytest.warns(
        UserWarning, match=rf"\(model_type {family}\): nothing reads gate and head_scale, which"
    ) as told:
        model_of_fields(unknown, path)
    assert told[0].filename == __file__, "whoever reads it learns which call it is of"


LLAMA_3_2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "pretraining_tp": 1, "mlp_bias": False, "attention_bias": False,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "max_position_embeddings": 8192,
}  # fmt: skip
TINYLLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_5: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "attention_bias": False, "max_window_layers": 28, "sliding_window": None,
    "use_sliding_window": False, "rope_scaling": None, "max_position_embeddings": 40960,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (LLAMA_3_2, 1_235_814_400),
        (SMOLLM2, 134_515_008),
        (TINYLLAMA, 1_100_048_384),
        (QWEN2_5, 494_032_768),
        (QWEN3, 596_049_920),
    ],
    ids=["Llama-3.2-1B", "SmolLM2-135M", "TinyLlama-1.1B", "Qwen2.5-0.5B", "Qwen3-0.6B"],
)
def test_models_that_people_have(fields: dict[str, Any], parameters: int) -> None:
    """Read without a word, and of the size that their publishers give."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_of_fields(fields, Path("config.json"))
    config = config_from_dict({"model": asdict(model), "solver": {"kind": "euler"}})
    assert models.Transformer.on_meta(config).num_parameters() == parameters


WINDOWS: list[tuple[str, dict[str, Any], bool]] = [
    ("mistral", {"sliding_window": 127}, False),
    ("mistral", {"sliding_window": ...}, True),  # 4096 is transformers' default
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 4097}, False),
    ("mistral", {"sliding_window": 64, "use_sliding_window": False}, False),  # it has no such switch
    ("mistral", {"sliding_window": 64, "layer_types": ["full_attention"] * 3}, False),
    ("qwen2", {"sliding_window": 64}, True),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ...}, True),
    (
        "qwen2",
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2, "layer_types": ...},
        False,
    ),
    ("qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, False),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ...}, True),  # 4096
]


@pytest.mark.parametrize(("name", "fields", "fits"), WINDOWS, ids=str)
def test_windows(tmp_path: Path, name: str, fields: dict[str, Any], fits: bool) -> None:
    theirs = make(name, tmp_path / "hf")
    plain = logits_of(theirs)
    rewritten(tmp_path / "hf", **fields)
    if fits:
        import_llama(tmp_path / "hf")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (logits_of(again) - plain).abs().max() < 1e-5
        return
    with pytest.raises(ValueError, match=rf"\(model_type {name}\): (sliding_window|layer_types) is"):
        import_llama(tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mistral", {"attention_bias": True}, "False: attention of Mistral has no biases"),
        (
            "qwen2",
            {"attention_bias": False},
            "True: attention of Qwen2 has biases of queries, keys and values",
        ),
        ("qwen3", {"architectures": ["Qwen2ForCausalLM"]}, r"\['Qwen3ForCausalLM'\]"),
    ],
)
def test_refusals_name_the_family(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    make(name, tmp_path / "hf")
    rewritten(tmp_path / "hf", **fields)
    with pytest.raises(ValueError, match=rf"\(model_type {name}\): .*; supported is {message}"):
        import_llama(tmp_path / "hf")


@pytest.mark.parametrize(("name", "other"), [("qwen2", "llama"), ("llama-2", "qwen2"), ("qwen3", "llama")])
def test_weights_that_nothing_reads_and_weights_that_lack(tmp_path: Path, name: str, other: str) -> None:
    make(name, tmp_path / "hf")
    names = {"model_type": other, "architectures": [FAMILIES[other].architectures[0]]}
    rewritten(tmp_path / "hf", **names, attention_bias=...)
    lacking = r"has no tensor model\.layers\.0\.self_attn\.q_proj\.bias \(\[48\]\)"
    lost = r"(_norm\.weight|_proj\.bias) has no place in the model that config\.json describes"
    with pytest.raises(ValueError, match=lacking if other == "qwen2" else lost):
        import_llama(tmp_path / "hf")


class TestPickles:
    """``pytorch_model.bin`` and its shards."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with the configuration of a source and no weights."""
        make("qwen2", tmp_path / "hf")
        return tmp_path / "hf"

    @staticmethod
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        file.unlink()
        return tensors

    @pytest.mark.parametrize("archive", [True, False])
    def test_one_file(self, folder: Path, tmp_path: Path, archive: bool) -> None:
        expected = imported(folder, tmp_path / "expected").state_dict()
        tensors = self.weights(folder)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat_interleave(2)[::2]  # strided
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as old files have a tied head
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
        found = imported(folder, tmp_path / "ours").state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_shards_one_at_a_time(self, folder: Path, tmp_path: Path) -> None:
        expected = imported(folder, tmp_path / "expected").state_dict()
        tensors = {name: tensor.bfloat16() for name, tensor in self.weights(folder).items()}
        where = {name: f"pytorch_model-{n % 3}.bin" for n, name in enumerate(sorted(tensors))}
        for file in set(where.values()):
            torch.save({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        _, state = import_llama(folder)
        for name, value in state.items():
            assert torch.equal(value, expected[name].bfloat16().float()[: len(value)]), name
            mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
            assert len({path for path in mapped if path.endswith(".bin")}) == 1
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {"a": "a.safetensors"}})
        )
        with pytest.raises(
            ValueError, match=r"names 'a\.safetensors', but must name \.bin files of its folder"
        ):
            import_llama(folder)

    def test_nothing_is_run(self, folder: Path, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "run",)

        tensors = self.weights(folder)
        torch.save({**tensors, "extra": Payload()}, folder / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin asks for .*, which no weight needs and which could"
        ):
            import_llama(folder)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04 no archive"])
    def test_what_is_no_file_of_torch(self, folder: Path, content: bytes) -> None:
        self.weights(folder)
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin is not a readable file of torch\.save; download"
        ):
            import_llama(folder)

    @pytest.mark.parametrize("content", [[1], {"model": {"a": torch.ones(1)}}, {1: torch.ones(1)}])
    def test_what_is_no_state_dict(self, folder: Path, content: Any) -> None:
        self.weights(folder)
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin holds more than tensors by name; save the state"
        ):
            import_llama(folder)

    def test_weights_that_were_never_loaded(self, folder: Path) -> None:
        tensors = self.weights(folder)
        torch.save(
            {**tensors, "model.norm.weight": torch.empty(32, device="meta")}, folder / "pytorch_model.bin"
        )
        with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has a shape and no values"):
            import_llama(folder)

    def test_quantised_weights(self, folder: Path) -> None:
        tensors = self.weights(folder)
        name = "model.layers.0.self_attn.q_proj.weight"
        torch.save({**tensors, name: tensors[name].to(torch.int8)}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=rf"{name} is stored as int8; supported are F32, BF16, F16"):
            import_llama(folder)
