"""The ``config.json`` of a Hugging Face folder as our ``model`` section, family by family. What our model
would compute differently is refused: a field that changes the function has a value that we compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet.config.errors import ConfigError, ConfigWarning
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.rope import ROPE_SCALINGS, read_rope_scaling
from megatron_iiet.config.schema import ModelConfig

CONFIG_FILE = "config.json"
CACHES = ("all", "last", "first")
"""Values of an IIET's ``kv_cache``."""


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type``, in what they differ from others."""

    title: str
    architectures: tuple[str, ...]
    """What ``architectures`` may name; the first is today's spelling."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a field that is missing, where it is not LLaMA's default."""
    attention_bias: str = "qkvo"
    """The biases that ``attention_bias: true`` means, or, of a family without that field, always."""
    bias_is_a_field: bool = True
    qk_norm: bool = False
    has_solver: bool = False
    """Whether it is what we export."""
    window_has_a_switch: bool = True
    """Whether ``use_sliding_window`` and ``layer_types`` say that ``sliding_window`` is not in use."""


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, Family] = {
    "llama": Family("LLaMA", ("LlamaForCausalLM", "LLaMAForCausalLM")),
    "mistral": Family(
        "Mistral",
        ("MistralForCausalLM",),
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        attention_bias="none",
        bias_is_a_field=False,
        window_has_a_switch=False,
    ),
    "qwen2": Family(
        "Qwen2",
        ("Qwen2ForCausalLM",),
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, **_WINDOWS},
        attention_bias="qkv",
        bias_is_a_field=False,
    ),
    "qwen3": Family(
        "Qwen3",
        ("Qwen3ForCausalLM",),
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128, **_WINDOWS},
        qk_norm=True,
    ),
    "iiet": Family("IIET", ("IIETForCausalLM",), has_solver=True),
}
"""By ``model_type``."""

_LAYER_NORM = "it has LayerNorms with biases and no SwiGLU"
_EXPERTS = "its feed-forward is a mixture of experts"
_FUSED = "it keeps queries, keys and values in one matrix under names of its own"
_WINDOWED = "it attends within windows and norms before and behind every block"
_GEMMA = "its feed-forward is a GeGLU and its norms multiply by 1 + weight"
MISSING = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "bloom", "mpt", "starcoder2"), _LAYER_NORM),
    **dict.fromkeys(
        ("gpt_neox", "phi", "falcon", "stablelm", "persimmon"),
        "it has LayerNorms with biases, and rotates a part of each head or not at all",
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4"), _EXPERTS),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "kimi_k2"), f"{_EXPERTS} and its attention has latent keys and values"
    ),
    "phi3": f"{_FUSED}, and may scale positions by a list (longrope)",
    **dict.fromkeys(("internlm2", "baichuan", "qwen", "chatglm"), _FUSED),
    "gemma": _GEMMA,
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), f"{_GEMMA}; {_WINDOWED}"),
    "granite": "it multiplies embedding, residual stream, attention and logits with factors of its own",
    **dict.fromkeys(("cohere", "cohere2"), "it has LayerNorms, and attention and feed-forward side by side"),
    "olmo": "its norms have no weights",
    **dict.fromkeys(("olmo2", "olmo3"), "its norms stand behind attention and feed-forward"),
    "smollm3": "some of its layers have no rotary positions",
    **dict.fromkeys(("glm", "glm4"), "it rotates a part of each head, in pairs of neighbours"),
    "nemotron": "it has LayerNorms and a squared ReLU",
    **dict.fromkeys(("mamba", "mamba2", "qwen3_next", "jamba"), "it has recurrent layers"),
    **dict.fromkeys(("mistral3", "llava", "qwen2_vl", "qwen2_5_vl", "mllama"), "it reads images as well"),
}
"""What our model lacks of families that people have, by ``model_type``."""

# Fields with values that our model computes, and why there are no others. A value of None is as if missing.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the feed-forward is SwiGLU"),
    "hidden_activation": (("silu", "swish"), "the feed-forward is SwiGLU"),
    "mlp_bias": ((False,), "the feed-forward has no biases"),
    "attention_dropout": ((0,), "the model has no dropout"),
    "hidden_dropout": ((0,), "the model has no dropout"),
    "resid_pdrop": ((0,), "the model has no dropout"),
    "embd_pdrop": ((0,), "the model has no dropout"),
    "pretraining_tp": ((1,), "matrices are not multiplied in slices"),
    "partial_rotary_factor": ((1,), "every part of a head is rotated"),
    "rotary_pct": ((1,), "every part of a head is rotated"),
    "rope_interleaved": ((False,), "a head is rotated in halves"),
    "rope_traditional": ((False,), "a head is rotated in halves"),
    "no_rope_layers": (([],), "every layer is rotated"),
    "alibi": ((False,), "positions are rotary"),
    "use_mrope": ((False,), "positions are those of a text"),
    "attn_logit_softcapping": ((), "scores are not capped"),
    "final_logit_softcapping": ((), "logits are not capped"),
    "attention_chunk_size": ((), "attention sees all that came before"),
    "embedding_multiplier": ((1,), "the embedding has no factor of its own"),
    "residual_multiplier": ((1,), "the residual stream has no factor"),
    "logits_scaling": ((1,), "logits have no factor"),
    "logit_scale": ((1,), "logits have no factor"),
    "num_experts": ((0, 1), "the feed-forward is no mixture of experts"),
    "num_local_experts": ((0, 1), "the feed-forward is no mixture of experts"),
    "n_routed_experts": ((0, 1), "the feed-forward is no mixture of experts"),
    "use_parallel_residual": ((False,), "the feed-forward stands behind attention"),
    "parallel_attn": ((False,), "the feed-forward stands behind attention"),
    "is_encoder_decoder": ((False,), "the model is a decoder"),
    "add_cross_attention": ((False,), "the model is a decoder"),
    "use_bidirectional_attention": ((False,), "attention is causal"),
    "is_causal": ((True,), "attention is causal"),
    "pruned_heads": (({},), "every layer has all heads"),
}
_NAMES = """
    _name_or_path name_or_path transformers_version dtype torch_dtype use_bfloat16 torchscript use_cache
    solver id2label label2id problem_type finetuning_task task_specific_params tokenizer_class prefix
    return_dict output_attentions output_hidden_states output_scores return_dict_in_generate
    chunk_size_feed_forward is_decoder cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss
    remove_invalid_values bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    suppress_tokens begin_suppress_tokens exponential_decay_length_penalty max_length min_length
    max_sequence_length text_follows is_llama_config transformers.js_config unsloth_fixed unsloth_version
"""
_SILENT = frozenset(_NAMES.split())
"""Fields that say nothing of the function, or say it for somebody who reads them on his own."""
_OWN_FIELDS = {"qkv_bias": (False, True), "qk_norm": (False, True)}
"""What an IIET says besides, and what others may not."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object {{...}}")
    return content


def model_of_fields(fields: Mapping[str, Any], path: Path) -> ModelConfig:
    """The ``model`` section that the fields of ``path``, a ``config.json``, describe.

    Raises:
        ValueError: our model cannot be that; the message names file, family, field, and what is supported.
    """
    return _Reader(fields, path).model()


class _Reader:
    """The fields of one file."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.where = str(path)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            lacking = MISSING.get(str(kind))
            why = f"; {kind} is not, because {lacking}" if lacking else ""
            raise self.unsupported("model_type", kind, join_words([repr(name) for name in FAMILIES]) + why)
        self.where = f"{path} (model_type {kind})"
        self.family = FAMILIES[kind]
        self.fields = {**self.family.defaults, **fields}
        self.asked = {"model_type", *self.family.defaults}
        """Names of fields that were read."""

    def get(self, name: str) -> Any:
        self.asked.add(name)
        return self.fields.get(name)

    def model(self) -> ModelConfig:
        self.check_fields()
        heads = self.size("num_attention_heads")
        model = ModelConfig(
            hidden_size=self.size("hidden_size"),
            ffn_hidden_size=self.size("intermediate_size"),
            num_layers=self.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=self.size("num_key_value_heads", default=heads),
            head_dim=None if self.get("head_dim") is None else self.size("head_dim"),
            attention_bias=self.attention_bias(),  # type: ignore[arg-type]
            qk_norm=self.family.qk_norm or bool(self.get("qk_norm")),
            vocab_size=self.size("vocab_size"),
            vocab_multiple=self.size("vocab_multiple", default=ModelConfig.vocab_multiple),
            max_position_embeddings=self.size("max_position_embeddings", default=2048),
            tie_embeddings=bool(self.get("tie_word_embeddings")),
            embedding_scale=1.0,
            rms_norm_eps=self.number("rms_norm_eps", default=1e-6),
            init_std=self.number("initializer_range", default=0.02),
        )
        model.rotary_base, model.rope_scaling = self.rotation(model.max_position_embeddings)
        if self.family.has_solver:
            scale = self.number("embedding_scale")
            model.embedding_scale = "unit" if scale == 1 / model.init_std else scale
        self.check_heads(model)
        self.check_windows(model)
        # As one would write it by hand.
        if model.num_kv_heads == model.num_attention_heads:
            model.num_key_value_heads = None
        model.head_dim = model.resolved()["head_dim"]
        self.tell_unread()
        return model

    def tell_unread(self) -> None:
        """Name the fields that nobody here knows, as transformers' classes of these families do not."""
        given = sorted(
            name for name, value in self.fields.items() if value is not None and value is not False
        )
        left = [name for name in given if name not in self.asked and name not in _SILENT]
        if left:
            warnings.warn(
                f"{self.where}: nothing reads {join_words(left, 'and')}, which transformers does not know of "
                "this family either; if code of your own does, the import computes something else",
                ConfigWarning,
                stacklevel=4,
            )

    def check_fields(self) -> None:
        """Refuse what changes the function and is none of the fields read."""
        family = self.family
        if self.get("architectures") not in (None, *([name] for name in family.architectures)):
            supported = " or ".join(str([name]) for name in family.architectures[:1])
            raise self.unsupported("architectures", self.fields["architectures"], supported)
        if self.family.has_solver and self.get("kv_cache") not in (None, *CACHES):
            raise self.unsupported("kv_cache", self.fields["kv_cache"], ", ".join(map(repr, CACHES)))
        if self.get("auto_map") and not self.family.has_solver:
            raise self.unsupported(
                "auto_map",
                self.fields["auto_map"],
                "null: code that comes with the weights may compute anything",
            )
        for name, choices in _OWN_FIELDS.items():
            known = choices if self.family.has_solver else choices[:1]
            if self.get(name) not in (None, *known):
                raise self.unsupported(
                    name, self.fields[name], " or ".join(str(choice).lower() for choice in known)
                )
        for name, (values, reason) in _NEUTRAL.items():
            if self.get(name) is not None and self.fields[name] not in values:
                supported = join_words([repr(value) for value in values[:1]] or ["null"])
                raise self.unsupported(name, self.fields[name], f"{supported}: {reason}")
        for name in ("tie_word_embeddings", "attention_bias"):
            if self.get(name) not in (None, True, False):
                raise self.unsupported(name, self.fields[name], "true or false")
        if self.get("quantization_config") is not None:
            method = self.fields["quantization_config"]
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise self.unsupported("quantization_config", method, "unquantised weights")

    def attention_bias(self) -> str:
        given, always = self.get("attention_bias"), self.family.attention_bias
        if not self.family.bias_is_a_field:
            if given is not None and given != (always != "none"):
                has = "no biases" if always == "none" else "biases of queries, keys and values, always"
                raise self.unsupported(
                    "attention_bias", given, f"{always != 'none'}: attention of {self.family.title} has {has}"
                )
            return always
        if self.get("qkv_bias"):
            if given:
                raise self.unsupported("attention_bias", given, "False beside qkv_bias")
            return "qkv"
        return always if given else "none"

    def rotation(self, longest: int) -> tuple[float, dict[str, Any] | None]:
        """Base and scaling: of ``rope_parameters`` (transformers 5), or of ``rope_theta`` and
        ``rope_scaling`` (before), which transformers prefers where both stand."""
        for name in ("rope_parameters", "rope_scaling"):
            if not isinstance(self.get(name) or {}, dict):
                raise self.unsupported(name, self.fields[name], "null or an object with rope_type 'default'")
        name = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        rope = {key: value for key, value in (self.get(name) or {}).items() if value is not None}
        base = self.number("rope_theta", default=10000.0)
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope.pop("type", None)
        if rope.pop("rope_theta", None) is not None:
            base = self.number("rope_theta", inside=name)
        if (part := rope.pop("partial_rotary_factor", 1)) != 1:
            reason = _NEUTRAL["partial_rotary_factor"][1]
            raise self.unsupported(f"{name}.partial_rotary_factor", part, f"1: {reason}")
        kinds = ("default", *ROPE_SCALINGS)
        if kind not in kinds:
            raise self.unsupported(f"{name}.rope_type", kind, join_words([repr(known) for known in kinds]))
        outside = self.get("original_max_position_embeddings")
        if kind == "default":
            if rope:
                raise self.unsupported(f"{name}.{next(iter(rope))}", next(iter(rope.values())), "null")
            return base, None
        if kind == "yarn":  # transformers takes 0 for no value
            rope = {key: value for key, value in rope.items() if value or not key.startswith("mscale")}
        if kind in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = outside or rope.get(
                "original_max_position_embeddings", longest
            )
        scaling = read_rope_scaling({"rope_type": kind, **rope}, f"{self.where}: {name}", "rope_type")
        assert scaling is not None
        return base, scaling.to_mapping()

    def check_heads(self, model: ModelConfig) -> None:
        heads, kv = model.num_attention_heads, model.num_kv_heads
        if model.hidden_size % heads:
            raise self.unsupported(
                "hidden_size", model.hidden_size, f"a multiple of num_attention_heads = {heads}"
            )
        if model.head_width % 2:
            raise self.unsupported("head_dim", model.head_width, "an even number")
        if heads % kv:
            raise self.unsupported("num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")
        scores = {"attention_multiplier": model.head_width**-0.5, "query_pre_attn_scalar": model.head_width}
        for name, value in scores.items():
            given = self.get(name)
            if given is not None and given != value:
                raise self.unsupported(
                    name, given, f"{value:g}: scores are divided by the root of a head's width"
                )

    def check_windows(self, model: ModelConfig) -> None:
        """A window changes the function if some layer has one, shorter than the longest sequence."""
        longest = model.max_position_embeddings
        kinds = self.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * model.num_layers:
            raise self.unsupported("layer_types", kinds, "'full_attention' for every layer")
        window, first = self.get("sliding_window"), self.get("max_window_layers")
        switched_off = self.get("use_sliding_window") is False or kinds is not None
        if isinstance(first, int) and first >= model.num_layers:
            switched_off = True
        if window is None or (switched_off and self.family.window_has_a_switch):
            return
        if not isinstance(window, int) or window < longest:
            raise self.unsupported(
                "sliding_window",
                window,
                f"null, or at least max_position_embeddings = {longest}: attention sees all that came "
                "before; for the same function on shorter sequences set sliding_window to null and "
                "max_position_embeddings to the window",
            )

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unsupported(name, value, "a whole number of at least 1")
        return value

    def number(self, name: str, *, default: float | None = None, inside: str = "") -> float:
        value = self.get(inside)[name] if inside else self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.unsupported(f"{inside}.{name}" if inside else name, value, "a number greater than 0")
        return float(value)

    def unsupported(self, name: str, found: Any, supported: str) -> ValueError:
        shown = "missing" if found is None else repr(found)
        return ConfigError(f"{self.where}: {name} is {shown}; supported is {supported}")
