"""Every solver, tiny: our Transformer with coefficients that matter, and the same model for transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_iiet.config import RunConfig, config_from_dict, config_to_dict, iterations_per_layer
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.models import Transformer

torch.set_num_threads(1)

SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "euler-normed": {"kind": "euler", "output_norm": "layer"},
    "dlcl": {"kind": "dlcl", "coefficient_init": "average", "history_norm": "none"},
    "dlcl-rms": {"kind": "dlcl"},
    "weight-sharing": {"kind": "weight-sharing", "repeats": 3},
    "rk2-fixed": {"kind": "rk2", "stage_coefficients": "fixed"},
    "rk2-learned": {"kind": "rk2", "stage_coefficients": "learned"},
    "rk2-gated": {"kind": "rk2", "stage_coefficients": "gated"},
    "rk4-fixed": {"kind": "rk4", "stage_coefficients": "fixed"},
    "rk4-learned": {"kind": "rk4", "stage_coefficients": "learned"},
    "rk2-full": {"kind": "rk2", "stage_coefficients": "full"},
    "rk4-full": {"kind": "rk4", "stage_coefficients": "full"},
    "pcformer-2": {"kind": "pcformer", "predictor_order": 2},
    "pcformer-4": {"kind": "pcformer", "predictor_order": 4},
    "iiet-r0": {"kind": "iiet", "iterations": 0},
    "iiet": {"kind": "iiet", "iterations": 2},
    "iiet-raw": {"kind": "iiet", "iterations": 2, "history_norm": "none"},
    "iiet-plan": {"kind": "iiet", "iterations": [2, 0, 3, 0, 1]},
    "iiet-euler-predictor": {"kind": "iiet", "iterations": [2, 0, 1, 0, 1], "predictor": "euler"},
    "iiet-damped": {"kind": "iiet", "iterations": 2, "damping": 0.6},
    "iiet-unmerged": {"kind": "iiet", "iterations": [2, 0, 1, 0, 1], "merge": False, "damping": 0.6},
    "released": {"kind": "iiet", "variant": "released", "iterations": 2},
    "released-shared": {
        "kind": "iiet",
        "variant": "released",
        "iterations": [1, 0, 2, 0, 1],
        "readout": "shared",
    },
    "iiet-first": {"kind": "iiet", "iterations": [2, 0, 3, 0, 1], "key_values": "first"},
    "pcformer-first": {"kind": "pcformer", "key_values": "first"},
    "released-r0": {"kind": "iiet", "variant": "released", "iterations": 0},
}
"""The solver sections that tests run, by name; five layers, so that PCformer's window is passed."""

QUICK = ("euler", "rk2-gated", "pcformer-2", "iiet-plan", "released-shared", "iiet-first")
EVERY_SOLVER = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)  # type: ignore[list-item]
    for name in SOLVERS
]
"""For ``parametrize``: one of a kind in the quick tests, all of them in the others."""

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "vocab_multiple": 16,
    "max_position_embeddings": 64,
    "init_std": 0.08,
    "tie_embeddings": True,
}


def our_model(name: str, **model: Any) -> Transformer:
    """Our Transformer with solver ``name``, no norm or solver parameter at its initial value."""
    sections = {"model": {**MODEL, **model}, "solver": SOLVERS[name], "data": {"sequence_length": 32}}
    config = config_from_dict(sections, source="test")
    transformer = Transformer(config)
    transformer.initialise(seed=7)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter_name, parameter in transformer.named_parameters():
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "solver" in parameter_name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
    return transformer.eval()


def hf_config(config: RunConfig, **fields: Any) -> IIETConfig:
    """The configuration for transformers that ``config`` asks for."""
    model = config.model
    solver = config_to_dict(config)["solver"]
    solver.pop("schedule", None)
    if "coefficient_init" in solver:
        solver["coefficient_init"] = config.solver.resolved_coefficient_init  # type: ignore[attr-defined]
    if "iterations" in solver:
        solver["iterations"] = iterations_per_layer(config)
    values: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "head_dim": model.head_width,
        "attention_bias": model.attention_bias == "qkvo",
        "qkv_bias": model.attention_bias == "qkv",
        "qk_norm": model.qk_norm,
        "embedding_scale": model.resolved_embedding_scale,
        "solver": solver,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if model.rope_scaling is not None:
        scaling = dict(model.rope_scaling)
        values["rope_parameters"] |= {"rope_type": scaling.pop("kind"), **scaling}
    return IIETConfig(**{**values, **fields})


def hf_state(transformer: Transformer) -> dict[str, Tensor]:
    """The weights of our Transformer under the names that transformers gives them, written out by hand."""
    model, state = transformer.config.model, transformer.state_dict()
    heads, kv = (n * model.head_width for n in (model.num_attention_heads, model.num_kv_heads))
    renamed = {"model.embed_tokens.weight": state["embedding.weight"][: model.vocab_size]}
    renamed["model.norm.weight"] = state["norm.weight"]
    renamed["lm_head.weight"] = (
        renamed["model.embed_tokens.weight"]
        if model.tie_embeddings
        else state["head.weight"][: model.vocab_size]
    )
    for n in range(model.num_layers):
        ours, theirs = f"layers.{n}.increment.", f"model.layers.{n}."
        q, k, v = state[f"{ours}attention.qkv.weight"].split([heads, kv, kv])
        gate, up = state[f"{ours}mlp.gate_up.weight"].chunk(2)
        renamed |= {
            f"{theirs}input_layernorm.weight": state[f"{ours}input_norm.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}post_attention_norm.weight"],
            f"{theirs}self_attn.q_proj.weight": q,
            f"{theirs}self_attn.k_proj.weight": k,
            f"{theirs}self_attn.v_proj.weight": v,
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}attention.output.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}mlp.down.weight"],
        }
        attention = f"{ours}attention."
        biases = state.get(f"{attention}qkv.bias")
        if biases is not None:
            for part, bias in zip("qkv", biases.split([heads, kv, kv]), strict=True):
                renamed[f"{theirs}self_attn.{part}_proj.bias"] = bias
        for found, name in (("output.bias", "o_proj.bias"), *((f"{x}_norm.weight",) * 2 for x in "qk")):
            if attention + found in state:
                renamed[f"{theirs}self_attn.{name}"] = state[attention + found]
        prefix = f"layers.{n}.solver."
        renamed |= {f"model.{key}": state[key] for key in state if key.startswith(prefix)}
    return renamed


def hf_model(transformer: Transformer, **fields: Any) -> IIETForCausalLM:
    """The same model for transformers; ``fields`` override its configuration."""
    hf = IIETForCausalLM(hf_config(transformer.config, **fields))
    hf.load_state_dict(hf_state(transformer), strict=True)
    return hf.eval()


def model_pair(name: str, **model: Any) -> tuple[Transformer, IIETForCausalLM]:
    """Solver ``name`` as our Transformer and for transformers, with the same weights."""
    ours = our_model(name, **model)
    return ours, hf_model(ours)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids without the special ones, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, MODEL["vocab_size"], (rows, length), generator=generator)
