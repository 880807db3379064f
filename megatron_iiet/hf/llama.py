"""A Hugging Face LLaMA folder (``config.json`` and safetensors) as our configuration and parameters.

What our model would compute differently is refused; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_iiet.config import RunConfig, config_from_dict, config_to_dict
from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.solvers import build_solver

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

_STORAGE_TYPES = ("F32", "BF16", "F16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096
# Fields with one value that our model computes, and why there is no other.
_ONLY_VALUES: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the feed-forward is SwiGLU"),
    "attention_bias": (False, "attention has no biases"),
    "mlp_bias": (False, "the feed-forward has no biases"),
    "attention_dropout": (0, "the model has no dropout"),
    "pretraining_tp": (1, "matrices are not multiplied in slices"),
    "partial_rotary_factor": (1, "every part of a head is rotated"),
}


def import_llama(
    folder: str | Path, solver: Mapping[str, Any] | None = None
) -> tuple[RunConfig, Mapping[str, Tensor]]:
    """Configuration and fp32 parameters (by our names) of a LLaMA checkpoint.

    ``solver`` sets keys of the ``solver`` section; without any the layers are integrated as the checkpoint
    was trained, by explicit Euler. Solver coefficients get their initial values.

    Raises:
        ValueError: (and its subclass ConfigError) no LLaMA checkpoint, one that our model can't represent,
            or a damaged one; the message names the file, the field or tensor, and what is supported.
    """
    folder = Path(folder)
    config = read_config(folder, {"kind": "euler", **(solver or {})})
    state = dict(LlamaWeights(folder, config.model))
    for n in range(config.model.num_layers):
        for name, value in build_solver(config, n, "reference").state_dict().items():
            state[f"layers.{n}.solver.{name}"] = value
    return config, state


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer files of a checkpoint folder, the one to load first; empty if there is none."""
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    return [] if [file.name for file in found] == ["tokenizer_config.json"] else found


def read_config(folder: Path, solver: Mapping[str, Any]) -> RunConfig:
    """The run configuration that a folder's ``config.json`` describes, with ``solver`` as its solver section.

    Raises:
        ValueError: as :func:`import_llama`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {found}; give the folder of a Hugging Face LLaMA checkpoint")
    fields = _read_json(path)
    _refuse_unsupported(fields, path)
    model = ModelConfig(
        hidden_size=_size(fields, "hidden_size", path),
        ffn_hidden_size=_size(fields, "intermediate_size", path),
        num_layers=_size(fields, "num_hidden_layers", path),
        num_attention_heads=_size(fields, "num_attention_heads", path),
        vocab_size=_size(fields, "vocab_size", path),
        max_position_embeddings=_size(fields, "max_position_embeddings", path, default=2048),
        tie_embeddings=_flag(fields, "tie_word_embeddings", path),
        embedding_scale=1.0,
        rms_norm_eps=_number(fields, "rms_norm_eps", path, default=1e-6),
        rotary_base=_rotary_base(fields, path),
        init_std=_number(fields, "initializer_range", path, default=0.02),
    )
    model.num_key_value_heads = _size(fields, "num_key_value_heads", path, default=model.num_attention_heads)
    _check_heads(model, fields, path)
    data: dict[str, Any] = {"sequence_length": min(model.max_position_embeddings, 2048)}
    tokenizer = tokenizer_files(folder)
    if tokenizer:
        data["tokenizer"] = tokenizer[0].name
    sections = {
        "model": config_to_dict(RunConfig(model=model))["model"],
        "solver": dict(solver),
        "data": data,
    }
    return config_from_dict(sections, source=f"{path} and the solver options")


class LlamaWeights(Mapping[str, Tensor]):
    """The parameters of a folder under our names, fp32; read when asked for, whole or some rows of one.

    Raises:
        ValueError: files or tensors are missing, superfluous, damaged or of the wrong shape.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Check everything that can be checked without reading the weights."""
        table: tuple[int, ...] = (model.vocab_size, model.hidden_size)
        embedding, head = {_EMBEDDING: table}, {_HEAD: table}
        self._sources: dict[str, dict[str, tuple[int, ...]]] = {
            "embedding.weight": embedding,
            "norm.weight": {"model.norm.weight": (model.hidden_size,)},
        }
        for n in range(model.num_layers):
            for name, sources in _layer_sources(model, n).items():
                self._sources[f"layers.{n}.increment.{name}"] = sources
        if not model.tie_embeddings:
            self._sources["head.weight"] = head
        self._reader = _TensorReader(folder)
        for sources in self._sources.values():
            self._reader.check(sources)
        if model.tie_embeddings and _HEAD in self._reader:
            self._reader.check(head)
            if not self._reader.same(embedding, head):
                raise ValueError(
                    f"{folder / CONFIG_FILE}: tie_word_embeddings is true, but {_HEAD} differs from "
                    f"{_EMBEDDING}; set it to false to use both, or remove the head"
                )
        self._reader.refuse_unread()

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, sum(shape[0] for shape in self._sources[name].values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a parameter."""
        return self._reader.rows(self._sources[name], first, last)


def _layer_sources(model: ModelConfig, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameters of a layer → the tensors, with their shapes, whose rows make them up in order."""
    d, m = model.hidden_size, model.ffn_hidden_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return {
        "input_norm.weight": {f"model.layers.{layer}.input_layernorm.weight": (d,)},
        "attention.qkv.weight": {
            f"{attention}.q_proj.weight": (q, d),
            f"{attention}.k_proj.weight": (kv, d),
            f"{attention}.v_proj.weight": (kv, d),
        },
        "attention.output.weight": {f"{attention}.o_proj.weight": (d, q)},
        "post_attention_norm.weight": {f"model.layers.{layer}.post_attention_layernorm.weight": (d,)},
        "mlp.gate_up.weight": {f"{mlp}.gate_proj.weight": (m, d), f"{mlp}.up_proj.weight": (m, d)},
        "mlp.down.weight": {f"{mlp}.down_proj.weight": (d, m)},
    }


class _TensorReader:
    """Tensors of the safetensors files of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, Any]] = {}
        self._known: set[str] = set()
        self._folder = folder
        for file in _weight_files(folder):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a readable safetensors file ({error}); download it again"
                ) from None
            self._where |= dict.fromkeys(opened.keys(), (file, opened))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def check(self, sources: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors (name → expected shape) that are missing or that cannot be read as these."""
        for name, shape in sources.items():
            if name not in self._where:
                raise ValueError(
                    f"{self._folder} has no tensor {name} ({list(shape)}), which its {CONFIG_FILE} asks for; "
                    "give the complete checkpoint of a LlamaForCausalLM"
                )
            self._known.add(name)
            file, opened = self._where[name]
            piece = opened.get_slice(name)
            found, storage = list(piece.get_shape()), piece.get_dtype()
            if found != list(shape):
                raise ValueError(
                    f"{file}: tensor {name} is {found}, but {CONFIG_FILE} asks for {list(shape)}; "
                    "weights and configuration do not belong together"
                )
            if storage not in _STORAGE_TYPES:
                raise ValueError(
                    f"{file}: tensor {name} is stored as {storage}; supported are "
                    f"{', '.join(_STORAGE_TYPES)}, so save the checkpoint without quantisation"
                )

    def rows(self, sources: Mapping[str, tuple[int, ...]], first: int, last: int) -> Tensor:
        """Rows [first, last) of all ``sources`` (name → shape) below each other, as one fp32 tensor."""
        result = torch.empty((last - first, *next(iter(sources.values()))[1:]))
        start = 0
        for name, shape in sources.items():
            low, high = max(first, start), min(last, start + shape[0])
            if low < high:
                piece = self._where[name][1].get_slice(name)
                result[low - first : high - first].copy_(piece[low - start : high - start])
            start += shape[0]
        return result

    def same(self, one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether two of one shape have equal values."""
        rows = sum(shape[0] for shape in one.values())
        parts = [(first, min(rows, first + _COMPARED_ROWS)) for first in range(0, rows, _COMPARED_ROWS)]
        return all(torch.equal(self.rows(one, *part), self.rows(other, *part)) for part in parts)

    def refuse_unread(self) -> None:
        """Refuse tensors nobody asked for; only rotary tables, which old files store, may be lost."""
        left = sorted(n for n in self._where.keys() - self._known if not n.endswith("rotary_emb.inv_freq"))
        if left:
            raise ValueError(
                f"{self._where[left[0]][0]}: tensor {left[0]} has no place in the model that {CONFIG_FILE} "
                f"describes ({len(left)} such tensors); supported are the tensors of a plain LlamaForCausalLM"
            )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        pickled = any(folder.glob("*.bin"))
        hint = (
            "its .bin files are pickles, which can run code and are never read; save it with safetensors"
            if pickled
            else "give the folder of a complete checkpoint"
        )
        raise ValueError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; {hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r}, but must name a file for every tensor")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names '{name}', but must name .safetensors files of its folder"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing; download the checkpoint again")
        files.append(folder / name)
    return files


def _refuse_unsupported(fields: Mapping[str, Any], path: Path) -> None:
    if fields.get("model_type") != "llama":
        raise _unsupported(path, "model_type", fields.get("model_type"), "'llama'")
    architectures = fields.get("architectures")
    if architectures not in (None, ["LlamaForCausalLM"]):
        raise _unsupported(path, "architectures", architectures, "['LlamaForCausalLM']")
    for name, (only, reason) in _ONLY_VALUES.items():
        if fields.get(name) is not None and fields[name] != only:
            raise _unsupported(path, name, fields[name], f"{only!r}: {reason}")
    if fields.get("quantization_config") is not None:
        method = fields["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise _unsupported(path, "quantization_config", method, "unquantised weights")


def _rotary_base(fields: Mapping[str, Any], path: Path) -> float:
    """The rotary base, from ``rope_parameters`` (transformers 5) or ``rope_theta`` (before); no scaling."""
    base = _number(fields, "rope_theta", path, default=10000.0)
    for name in ("rope_parameters", "rope_scaling"):  # where both stand, transformers uses the second
        rope = fields.get(name)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise _unsupported(path, name, rope, "null or an object with rope_type 'default'")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise _unsupported(path, f"{name}.rope_type", kind, "'default': rotary positions are not scaled")
        if rope.get("partial_rotary_factor", 1) != 1:
            only, reason = _ONLY_VALUES["partial_rotary_factor"]
            raise _unsupported(
                path, f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], f"{only}: {reason}"
            )
        base = _number(rope, "rope_theta", path, default=base, prefix=f"{name}.")
    return base


def _check_heads(model: ModelConfig, fields: Mapping[str, Any], path: Path) -> None:
    width, heads, kv = model.hidden_size, model.num_attention_heads, model.num_kv_heads
    head_dim = fields.get("head_dim")
    if width % heads or (head_dim is not None and head_dim * heads != width):
        raise _unsupported(
            path,
            "head_dim",
            head_dim,
            f"hidden_size / num_attention_heads ({width} / {heads} = {width / heads:g})",
        )
    if model.head_dim % 2:
        raise _unsupported(path, "head_dim", model.head_dim, "an even number")
    if heads % kv:
        raise _unsupported(path, "num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")


def _size(fields: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(path, name, value, "a whole number of at least 1")
    return value


def _number(fields: Mapping[str, Any], name: str, path: Path, *, default: float, prefix: str = "") -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _unsupported(path, prefix + name, value, "a number greater than 0")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, path: Path) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise _unsupported(path, name, value, "true or false")
    return bool(value)


def _unsupported(path: Path, field: str, found: Any, supported: str) -> ValueError:
    shown = "missing" if found is None else repr(found)
    return ValueError(f"{path}: {field} is {shown}; supported is {supported}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object {{...}}")
    return content
