"""A model as a Hugging Face folder: safetensors shards, ``config.json``, ``generation_config.json``, files of
the tokenizer and the code that computes it: all that ``AutoModelForCausalLM.from_pretrained`` needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_iiet.config import RunConfig
from megatron_iiet.config.hugging_face import CONFIG_FILE, FAMILIES, Family, read_json
from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.config.solvers import Euler
from megatron_iiet.durable import new_folder, write_text
from megatron_iiet.hf.card import CARD_FILE, model_card
from megatron_iiet.hf.chat import CHAT_TEMPLATE_FILE, read_template, try_template
from megatron_iiet.hf.source_tokenizer import files_of_source, keep_ids
from megatron_iiet.hf.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from megatron_iiet.hf.tokenizer import DEFINITION_FILE, NO_TOKENIZER, TOKEN_FIELDS, Extras, to_json
from megatron_iiet.hf.travelling import AUTO_MAP, MODELING_FILE, modeling_code
from megatron_iiet.storage.hugging_face.llama import solver_to_fields
from megatron_iiet.storage.hugging_face.shards import write_shards
from megatron_iiet.storage.hugging_face.weights import tensors_to_write
from megatron_iiet.storage.parameters import RowSource
from megatron_iiet.storage.portable import check_new

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights can be stored as, by the names of the tool's option."""
GENERATION_FILE = "generation_config.json"

_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}


@dataclass(frozen=True)
class Written:
    """What was written."""

    weight_files: list[str]
    files: list[str]
    """The others but the configuration's."""
    notes: list[str]


def extras_of_folder(folder: Path) -> Extras:
    """Tokenizer, generation settings and ids of another Hugging Face folder, as they are.

    Raises:
        ValueError: the tokenizer is of an older form, and damaged.
    """
    files = files_of_source(folder)
    fields = read_json(folder / CONFIG_FILE)
    ids = {name: fields[name] for name in TOKEN_FIELDS if name in fields}
    note, source = ("", folder) if files else (NO_TOKENIZER, None)
    if (folder / GENERATION_FILE).is_file():
        files[GENERATION_FILE] = (folder / GENERATION_FILE).read_bytes()
    return Extras(files, ids, note, source)


def export_folder(
    config: RunConfig,
    weights: RowSource,
    folder: str | Path,
    extras: Extras,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
    as_llama: bool = False,
    chat_template: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> Written:
    """Write the model that ``config`` describes, with ``weights`` by our names.

    The folder appears whole or not at all: it is written under a temporary name and renamed. Weights are
    asked for some rows at a time, so the memory needed does not grow with the model.

    Args:
        dtype: a name from :data:`DTYPES`; what solvers have is stored in fp32 whatever it is.
        max_shard_bytes: most bytes of tensors in a file.
        as_llama: a plain LlamaForCausalLM (with what those have Qwen2ForCausalLM, Qwen3ForCausalLM), which is
            read without this package's code.
        chat_template: one from :data:`chat.NAMED <megatron_iiet.hf.chat.NAMED>`, or a file; in place of the
            tokenizer's own.
        facts: what the model card says of the training besides.

    Raises:
        ValueError: the folder exists, the model is no LLaMA though ``as_llama`` says so, ``dtype`` cannot
            hold a weight, or the chat template cannot write a conversation.
    """
    folder = Path(folder)
    check_new(folder)
    notes = [extras.note] if extras.note else []
    if as_llama:
        _refuse_other_than_llama(config)
        if config.model.resolved_embedding_scale != 1:
            notes.append(
                f"model.embedding_scale {config.model.resolved_embedding_scale:g} is multiplied into the "
                "embedding: a LLaMA has no such factor"
            )
    fields = config_fields(config, extras.token_ids, dtype, as_llama=as_llama)
    generation = {name: value for name, value in extras.token_ids.items() if value is not None}
    files = {GENERATION_FILE: to_json(generation), **extras.files}
    files[CARD_FILE] = model_card(config, folder.resolve().name, facts or {}, own_code=not as_llama)
    if not as_llama:
        files[MODELING_FILE] = modeling_code()
    if chat_template is not None:
        files[CHAT_TEMPLATE_FILE] = read_template(chat_template)
        if DEFINITION_FILE not in files and TOKENIZER_CONFIG not in files:
            raise ValueError("--chat-template is given, but the folder gets no tokenizer that could use it")
    with new_folder(folder) as partial:
        tensors = tensors_to_write(config, weights, DTYPES[dtype], as_llama=as_llama)
        weight_files = write_shards(partial, tensors, max_shard_bytes)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        write_text(partial / CONFIG_FILE, to_json(fields).decode())
        if extras.source is not None:
            notes += keep_ids(partial, extras.source, config.model.vocab_size)
        if chat_template is not None:
            try_template(partial, chat_template)
    return Written(weight_files, sorted(files.keys() - {GENERATION_FILE}), notes)


def plain_family(model: ModelConfig) -> str:
    """The ``model_type`` of the plain models that have what ``model`` has.

    Raises:
        ValueError: there are none.
    """
    if not model.qk_norm:
        return "qwen2" if model.attention_bias == "qkv" else "llama"
    if model.attention_bias == "qkv":
        raise ValueError(
            "the model is no plain LLaMA, Qwen2 or Qwen3: none has both model.qk_norm true and "
            "model.attention_bias 'qkv'; leave out --as-llama"
        )
    return "qwen3"


def config_fields(
    config: RunConfig, token_ids: Mapping[str, Any], dtype: str, *, as_llama: bool
) -> dict[str, Any]:
    """``config.json``: the fields of LLaMA or of a relative as transformers 5 writes them (of a plain model
    also as 4 reads them), and what an IIET has besides."""
    model = config.model
    kind = plain_family(model) if as_llama else "iiet"
    fields = {
        "architectures": [FAMILIES[kind].architectures[0]],
        "model_type": kind,
        "attention_bias": model.attention_bias == "qkvo",
        "attention_dropout": 0.0,
        **token_ids,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default", **rope_fields(model)},
        "tie_word_embeddings": model.tie_embeddings,
        "transformers_version": metadata.version("transformers"),
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    if as_llama:
        return _plain_fields(model, fields, FAMILIES[kind])
    own = {"qkv_bias": model.attention_bias == "qkv", "qk_norm": model.qk_norm}
    return fields | {
        "auto_map": dict(AUTO_MAP),
        **{name: value for name, value in own.items() if value},
        "vocab_multiple": model.vocab_multiple,
        "embedding_scale": model.resolved_embedding_scale,
        "solver": solver_to_fields(config),
        **({"text_follows": config.data.text_follows} if config.data.text_follows != "eod" else {}),
    }


def _plain_fields(model: ModelConfig, fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """Of a model that needs no code of its own, without what its family does not know."""
    known = {name: value for name, value in fields.items() if name != "mlp_bias" or not family.defaults}
    if not family.bias_is_a_field:
        del known["attention_bias"]
    # transformers 4 reads these, and takes its defaults where they are missing.
    known |= {"rope_theta": model.rotary_base, "torch_dtype": fields["dtype"]}
    if scaling := rope_fields(model):
        known["rope_scaling"] = scaling
    return known | {name: value for name, value in _NO_WINDOW.items() if name in family.defaults}


def rope_fields(model: ModelConfig) -> dict[str, Any]:
    """How positions are scaled, in transformers' words; empty if they are not."""
    scaling = model.resolved_rope_scaling
    if scaling is None:
        return {}
    values = scaling.to_mapping()
    return {"rope_type": values.pop("kind"), **values}


def _refuse_other_than_llama(config: RunConfig) -> None:
    solver, model = config.solver, config.model
    if not (isinstance(solver, Euler) and solver.is_llama):
        what = f"solver.kind is '{solver.kind}'"
        if isinstance(solver, Euler):
            what = f"solver.output_norm is '{solver.output_norm}'"
        raise ValueError(
            f"the model is no plain LLaMA: {what}, where a LLaMA has explicit Euler and no norm behind its "
            "layers; leave out --as-llama"
        )
    if model.tie_embeddings and model.resolved_embedding_scale != 1:
        raise ValueError(
            f"the model is no plain LLaMA: its embedding is the head as well, and is scaled by "
            f"{model.resolved_embedding_scale:g} as an embedding only; leave out --as-llama"
        )
