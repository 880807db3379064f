"""A LLaMA checkpoint read into our model computes what transformers computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_iiet import models
from megatron_iiet.config.hugging_face import _NEUTRAL, model_of_fields
from megatron_iiet.storage.hugging_face import import_llama, tokenizer_files, weights

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}


def make_llama(folder: Path, shard: str = "5GB", **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:  # all ones would hide a swap of two norms
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    llama.save_pretrained(folder, max_shard_size=shard)
    return llama


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    make_llama(folder)
    return folder


def edited(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint folder with other fields in its config.json; ``...`` removes a field."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors"):
        (target / file.name).symlink_to(file)
    return target


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {
            "hidden_size": 6,
            "num_attention_heads": 1,
            "intermediate_size": 1,
            "num_hidden_layers": 1,
            "vocab_size": 5,
        },
    ],
    ids=["tied", "untied-grouped", "one-kv-head-theta", "tiny"],
)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_logits_equal_transformers(tmp_path: Path, fields: dict[str, Any], shard: str) -> None:
    llama = make_llama(tmp_path / "hf", shard, **fields)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (
        shard == "20KB" and "hidden_size" not in fields
    )
    config, state = import_llama(tmp_path / "hf")
    assert config.solver.kind == "euler"
    models.save(config, state, tmp_path / "ours")
    model = models.load(tmp_path / "ours")
    tokens = torch.randint(llama.config.vocab_size, (2, 128))
    with torch.no_grad():
        difference = (model(tokens) - llama(tokens).logits).abs().max()
    assert difference < 1e-5
    assert model.num_parameters() == sum(p.numel() for p in llama.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_fp32_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    make_llama(tmp_path / "hf").to(dtype).save_pretrained(tmp_path / "half")
    _, state = import_llama(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == dtype
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(state["layers.1.increment.attention.qkv.weight"], torch.cat((q, k, v)).float())


def test_rotary_base_of_older_transformers(tmp_path: Path, llama_folder: Path) -> None:
    def base(name: str, **fields: Any) -> float:
        return import_llama(edited(llama_folder, tmp_path / name, rope_parameters=..., **fields))[
            0
        ].model.rotary_base

    assert base("none") == 10000.0
    assert base("theta", rope_theta=5e5, rope_scaling=None) == 5e5
    assert base("scaling", rope_theta=5e5, rope_scaling={"type": "default"}) == 5e5
    assert base("inside", rope_scaling={"rope_type": "default", "rope_theta": 1e6}) == 1e6


def test_optional_fields_have_transformers_defaults(tmp_path: Path, llama_folder: Path) -> None:
    optional = [
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "head_dim",
    ]
    folder = edited(llama_folder, tmp_path / "x", **dict.fromkeys(optional, ...), initializer_range=...)
    model = import_llama(folder)[0].model
    assert (model.num_kv_heads, model.max_position_embeddings, model.rms_norm_eps) == (4, 2048, 1e-6)
    assert (model.tie_embeddings, model.embedding_scale, model.init_std) == (False, 1.0, 0.02)


FAMILIES = "'llama', 'mistral', 'qwen2', 'qwen3' or 'iiet'"
KINDS = "'default', 'linear', 'llama3' or 'yarn'"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt"}, f"model_type is 'gpt'; supported is {FAMILIES}"),
    ({"model_type": ["llama"]}, f"model_type is ['llama']; supported is {FAMILIES}"),
    ({"model_type": ...}, f"model_type is missing; supported is {FAMILIES}"),
    (
        {"model_type": "gemma"},
        f"model_type is 'gemma'; supported is {FAMILIES}; gemma is not, because its feed-forward is a "
        "GeGLU and its norms multiply by 1 + weight",
    ),
    ({"architectures": ["LlamaModel"]}, "architectures is ['LlamaModel']; supported is ['LlamaForCausalLM']"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu': the feed-forward is SwiGLU"),
    ({"attention_bias": "qkv"}, "attention_bias is 'qkv'; supported is true or false"),
    ({"qk_norm": True}, "qk_norm is True; supported is false"),
    ({"qkv_bias": True}, "qkv_bias is True; supported is false"),
    ({"mlp_bias": True}, "mlp_bias is True; supported is False: the feed-forward has no biases"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; supported is 0: the model has no dropout"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2; supported is 1: matrices are not multiplied in slices"),
    ({"head_dim": "wide"}, "head_dim is 'wide'; supported is a whole number of at least 1"),
    ({"num_attention_heads": 3}, "hidden_size is 40; supported is a multiple of num_attention_heads = 3"),
    (
        {"num_attention_heads": 8, "head_dim": None, "num_key_value_heads": 8},
        "head_dim is 5; supported is an even number",
    ),
    (
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3; supported is a divisor of num_attention_heads = 4",
    ),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
        "rope_scaling.rope_type is 'dynamic'; supported is 'default', 'linear', 'llama3' or 'yarn'",
    ),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "rope_scaling.rope_type is 'longrope'; supported is 'default', 'linear', 'llama3' or 'yarn'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_parameters has no 'factor', which rope_type yarn needs; give it",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
        "rope_scaling has the key 'low_freq_factor', which rope_type linear does not have; its keys are "
        "factor",
    ),
    (
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
        "rope_scaling.mrope_section is [16, 24, 24]; supported is null",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5; supported is 1: every part of a head is rotated",
    ),
    (
        {"rope_parameters": {"rope_theta": -1}},
        "rope_parameters.rope_theta is -1; supported is a number greater than 0",
    ),
    ({"rope_parameters": 3}, "rope_parameters is 3; supported is null or an object with rope_type 'default'"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is 'gptq'; supported is unquantised weights",
    ),
    ({"hidden_size": ...}, "hidden_size is missing; supported is a whole number of at least 1"),
    ({"vocab_size": True}, "vocab_size is True; supported is a whole number of at least 1"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; supported is a number greater than 0"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; supported is true or false"),
    (
        {"sliding_window": 64},
        "sliding_window is 64; supported is null, or at least max_position_embeddings = 128: attention sees "
        "all that came before; for the same function on shorter sequences set sliding_window to null and "
        "max_position_embeddings to the window",
    ),
    (
        {"layer_types": ["full_attention"] * 2},
        "layer_types is ['full_attention', 'full_attention']; supported is 'full_attention' for every layer",
    ),
    (
        {"attention_multiplier": 0.5},
        "attention_multiplier is 0.5; supported is 0.316228: scores are divided by the root of a "
        "head's width",
    ),
    (
        {"query_pre_attn_scalar": 256},
        "query_pre_attn_scalar is 256; supported is 10: scores are divided by the root of a head's width",
    ),
    (
        {"final_logit_softcapping": 30.0},
        "final_logit_softcapping is 30.0; supported is null: logits are not capped",
    ),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}; supported is {}: every layer has all heads"),
    (
        {"rope_parameters": {"rope_type": ["yarn"]}},
        "rope_parameters.rope_type is ['yarn']; supported is " + KINDS,
    ),
    (
        {"residual_multiplier": 0.2},
        "residual_multiplier is 0.2; supported is 1: the residual stream has no factor",
    ),
    ({"logits_scaling": 8.0}, "logits_scaling is 8.0; supported is 1: logits have no factor"),
    (
        {"num_local_experts": 8},
        "num_local_experts is 8; supported is 0: the feed-forward is no mixture of experts",
    ),
    (
        {"auto_map": {"AutoModel": "m.M"}},
        "auto_map is {'AutoModel': 'm.M'}; supported is null: code that comes with the weights may compute "
        "anything",
    ),
]
NEUTRAL: list[dict[str, Any]] = [
    {"hidden_act": "swish", "mlp_bias": None, "pretraining_tp": None, "attention_multiplier": 10**-0.5},
    {
        "residual_multiplier": 1.0,
        "logits_scaling": 1,
        "num_local_experts": 0,
        "final_logit_softcapping": None,
    },
    {"sliding_window": 128, "query_pre_attn_scalar": 10, "layer_types": ["full_attention"] * 3},
    {"sliding_window": 64, "use_sliding_window": False, "rope_interleaved": False, "no_rope_layers": []},
    {"architectures": ["LLaMAForCausalLM"], "torch_dtype": "float16", "dtype": ..., "auto_map": {}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": None}, "qk_norm": False},
    {
        "attention_dropout": 0, "hidden_dropout": 0.0, "resid_pdrop": 0, "embd_pdrop": 0, "pretraining_tp": 1,
        "partial_rotary_factor": 1, "rotary_pct": 1.0, "rope_traditional": False, "alibi": False,
        "use_mrope": False, "embedding_multiplier": 1, "logit_scale": 1.0, "num_experts": 0,
    },
    {
        "n_routed_experts": 0, "use_parallel_residual": False, "parallel_attn": False, "is_causal": True,
        "is_encoder_decoder": False, "add_cross_attention": False, "use_bidirectional_attention": False,
        "pruned_heads": {}, "hidden_activation": "silu", "mlp_bias": False,
    },
    {"num_experts": 1, "num_local_experts": 1, "n_routed_experts": 1, "hidden_activation": "swish"},
]  # fmt: skip
NEVER: dict[str, Any] = {
    "hidden_act": "gelu", "hidden_activation": "gelu", "mlp_bias": True, "attention_dropout": 0.1,
    "hidden_dropout": 0.1, "resid_pdrop": 1, "embd_pdrop": 0.1, "pretraining_tp": 2,
    "partial_rotary_factor": 0.5, "rotary_pct": 0.25, "rope_interleaved": True, "rope_traditional": True,
    "no_rope_layers": [1], "alibi": True, "use_mrope": True, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 0, "attention_chunk_size": 64, "embedding_multiplier": 2,
    "residual_multiplier": 0, "logits_scaling": 2, "logit_scale": 0.5, "num_experts": 2,
    "num_local_experts": 2, "n_routed_experts": 2, "use_parallel_residual": True, "parallel_attn": True,
    "is_encoder_decoder": True, "add_cross_attention": True, "use_bidirectional_attention": True,
    "is_causal": False, "pruned_heads": {"0": [1]},
}  # fmt: skip
"""Of every field that must have a neutral value one that is not."""


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_what_changes_nothing_is_read(tmp_path: Path, llama_folder: Path, fields: dict[str, Any]) -> None:
    plain = import_llama(llama_folder)[0]
    assert import_llama(edited(llama_folder, tmp_path / "x", **fields))[0] == plain


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refuses_what_the_model_cannot_be(
    tmp_path: Path, llama_folder: Path, fields: dict[str, Any], message: str
) -> None:
    folder = edited(llama_folder, tmp_path / "x", **fields)
    with pytest.raises(ValueError) as caught:
        import_llama(folder)
    named = "" if "model_type" in fields else " (model_type llama)"
    assert str(caught.value) == f"{folder / 'config.json'}{named}: {message}"


def test_no_field_that_changes_the_function_passes(tmp_path: Path, llama_folder: Path) -> None:
    fields = json.loads((llama_folder / "config.json").read_text())
    assert set(NEVER) == set(_NEUTRAL)
    for name, value in NEVER.items():
        with pytest.raises(ValueError, match=rf": {name} is {re.escape(repr(value))}; supported is .+: .+"):
            model_of_fields({**fields, name: value}, tmp_path / "config.json")


def test_refuses_what_is_not_a_checkpoint(tmp_path: Path, llama_folder: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ValueError) as caught:
            import_llama(folder)
        return str(caught.value).replace(str(tmp_path), "TMP")

    give = "give the folder of a Hugging Face LLaMA, Mistral, Qwen2, Qwen3 or IIET checkpoint"
    assert message(tmp_path / "gone") == f"TMP/gone is not a folder; {give}"
    assert message(tmp_path) == f"TMP has no config.json; {give}"

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert message(tmp_path / "bad").startswith("cannot read TMP/bad/config.json: Expecting property name")
    (tmp_path / "bad" / "config.json").write_text("[]")
    assert message(tmp_path / "bad") == "TMP/bad/config.json must hold an object {...}"
    (tmp_path / "bad" / "config.json").write_text("[" * 100_000)
    assert message(tmp_path / "bad").startswith("cannot read TMP/bad/config.json: maximum recursion depth")

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((llama_folder / "config.json").read_text())
    neither = (
        "TMP/bare has no model.safetensors or model.safetensors.index.json, pytorch_model.bin or "
        "pytorch_model.bin.index.json; give the folder of a complete checkpoint"
    )
    assert message(tmp_path / "bare") == neither
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"not a header")
    assert message(tmp_path / "bare").startswith(
        "TMP/bare/model.safetensors is not a readable safetensors file ("
    )


def with_tensors(source: Path, target: Path, change: dict[str, torch.Tensor | None], **fields: Any) -> Path:
    """A copy of a checkpoint with other tensors; None removes one."""
    folder = edited(source, target, **fields)
    tensors: dict[str, Any] = load_file(source / "model.safetensors") | change
    (folder / "model.safetensors").unlink()
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {Q: None},
        "DIR has no tensor model.layers.0.self_attn.q_proj.weight ([40, 40]), which its config.json asks "
        "for; give a complete checkpoint",
    ),
    (
        {Q: torch.zeros(40, 20)},
        "DIR/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight is [40, 20], but config.json "
        "asks for [40, 40]; weights and configuration do not belong together",
    ),
    (
        {Q: torch.zeros(40, 40, dtype=torch.int8)},
        "DIR/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight is stored as I8; supported are "
        "F32, BF16, F16, so save the checkpoint in one of them",
    ),
    (
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(40)},
        "DIR/model.safetensors: tensor model.layers.0.self_attn.q_proj.bias has no place in the model that "
        "config.json describes (1 such tensors); supported are the tensors of its LlamaForCausalLM",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_refuses_wrong_tensors(
    tmp_path: Path, llama_folder: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = with_tensors(llama_folder, tmp_path / "x", change)
    with pytest.raises(ValueError) as caught:
        import_llama(folder)
    assert str(caught.value).replace(str(folder), "DIR") == message


def test_stored_rotary_tables_are_ignored(tmp_path: Path, llama_folder: Path) -> None:
    change: dict[str, torch.Tensor | None] = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}
    import_llama(with_tensors(llama_folder, tmp_path / "x", change))


def test_tied_checkpoint_that_stores_a_head(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = load_file(llama_folder / "model.safetensors")["model.embed_tokens.weight"]
    same = with_tensors(
        llama_folder, tmp_path / "a", {"lm_head.weight": embedding.clone()}, tie_word_embeddings=True
    )
    assert "head.weight" not in import_llama(same)[1]
    other = with_tensors(
        llama_folder, tmp_path / "b", {"lm_head.weight": embedding + 1}, tie_word_embeddings=True
    )
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        import_llama(other)
    monkeypatch.setattr(weights, "_COMPARED_ROWS", 10)
    assert import_llama(same)[1]
    in_the_end = embedding.clone()
    in_the_end[-1, -1] += 1
    other = with_tensors(
        llama_folder, tmp_path / "c", {"lm_head.weight": in_the_end}, tie_word_embeddings=True
    )
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        import_llama(other)
    longer = torch.cat((embedding, embedding[:1]))
    other = with_tensors(llama_folder, tmp_path / "d", {"lm_head.weight": longer}, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is \[98, 40\], but config.json asks for \[97, 40\]"
    ):
        import_llama(other)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is None, but must name a file for every tensor"),
        ({"weight_map": {"a": "../a.safetensors"}}, "weight_map names '../a.safetensors', but must name"),
        ({"weight_map": {"a": "a.bin"}}, "weight_map names 'a.bin', but must name"),
        ({"weight_map": {"a": "a.safetensors"}}, "names a.safetensors, which is missing"),
        (  # of several the first: two attempts on one folder say the same
            {"weight_map": {f"t{n}": f"{n}.safetensors" for n in (3, 5, 1, 9, 7, 2, 8, 4, 6)}},
            "names 1.safetensors, which is missing",
        ),
    ],
)
def test_refuses_a_wrong_index(
    tmp_path: Path, llama_folder: Path, index: dict[str, Any], message: str
) -> None:
    folder = edited(llama_folder, tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as caught:
        import_llama(folder)
    assert message in str(caught.value)


def test_solver_options_are_checked(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"solver\.kind is 'rk9' in .*config\.json and the solver options"):
        import_llama(llama_folder, {"kind": "rk9"})
    with pytest.raises(ValueError, match=r"solver\.iterations lists 2 numbers, but model\.num_layers is 3"):
        import_llama(llama_folder, {"kind": "iiet", "iterations": [1, 2]})


def test_coefficients_start_as_the_solver_asks(llama_folder: Path) -> None:
    _, identity = import_llama(llama_folder, {"kind": "iiet"})
    _, average = import_llama(llama_folder, {"kind": "dlcl", "coefficient_init": "average"})
    assert identity["layers.2.solver.coefficients"].tolist() == [0, 0, 1]
    assert torch.allclose(average["layers.2.solver.coefficients"], torch.full((3,), 1 / 3))
    assert identity.rows("layers.2.solver.coefficients", 1, 3).tolist() == [0, 1]
    config, released = import_llama(
        llama_folder, {"kind": "iiet", "variant": "released", "iterations": [0, 1, 2]}
    )
    assert config.solver.iterations == [0, 1, 2]
    assert released["layers.0.solver.coefficients"].tolist() == [0.5, 0.5, 0, 0]


def test_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_files(tmp_path) == []
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [file.name for file in tokenizer_files(tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]
