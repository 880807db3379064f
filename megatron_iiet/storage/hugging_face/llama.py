"""A Hugging Face folder (``config.json`` and safetensors) as our configuration and parameters: a LLaMA, or
one that was exported. What our model would compute differently is refused; nothing is ever unpickled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import RunConfig, config_from_dict, config_to_dict, iterations_per_layer
from megatron_iiet.config.kinds import own_keys
from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.config.solvers import SOLVERS, Iterating, Merging, SolverConfig
from megatron_iiet.storage.hugging_face.shards import read_json
from megatron_iiet.storage.hugging_face.weights import CONFIG_FILE, HFWeights, WithInitialSolvers

ARCHITECTURES = {"llama": "LlamaForCausalLM", "iiet": "IIETForCausalLM"}
"""By ``model_type``."""
CACHES = ("all", "last", "first")
"""Values of ``kv_cache``."""
TOKENIZER_FILES = ("tokenizer.model", "sentencepiece.model", "tokenizer.json", "tokenizer_config.json")

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
) -> tuple[RunConfig, HFWeights | WithInitialSolvers]:
    """Configuration and fp32 parameters (by our names, read when asked for) of a checkpoint folder.

    ``solver`` sets keys of the ``solver`` section of a LLaMA; without any the layers are integrated as the
    checkpoint was trained, by explicit Euler. Solver coefficients get their initial values. An IIET has its
    own solver and coefficients.

    Raises:
        ValueError: (and its subclass ConfigError) no such checkpoint, one that our model can't represent,
            or a damaged one; the message names the file, the field or tensor, and what is supported.
    """
    folder = Path(folder)
    config, weights = open_folder(folder, solver)
    return config, weights if is_iiet(folder) else WithInitialSolvers(weights, config)


def open_folder(folder: Path, solver: Mapping[str, Any] | None = None) -> tuple[RunConfig, HFWeights]:
    """:func:`import_llama` with what is in the folder only: of a LLaMA no solver's parameters.

    Raises:
        ValueError: as :func:`import_llama`.
    """
    config = read_config(folder, solver)
    return config, HFWeights(folder, config, solver=is_iiet(folder))


def is_iiet(folder: Path) -> bool:
    """Whether the ``config.json`` of a folder is that of an exported model with a solver."""
    return read_json(folder / CONFIG_FILE).get("model_type") == "iiet"


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer files of a checkpoint folder, the one to load first; empty if there is none."""
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    return [] if [file.name for file in found] == ["tokenizer_config.json"] else found


def files_of_tokenizer(tokenizer: Path) -> list[Path]:
    """A tokenizer file, and what else there is that says how it is read: a ``tokenizer_config.json`` beside a
    ``tokenizer.json``, pattern and special tokens of tiktoken's ranks."""
    ranks = tokenizer.with_name(tokenizer.name + ".json")
    declared = tokenizer.with_name("tokenizer_config.json")
    others = [declared] if tokenizer.suffix == ".json" else [ranks]
    return [tokenizer, *(file for file in others if file.is_file())]


def read_config(folder: Path, solver: Mapping[str, Any] | None = None) -> RunConfig:
    """The run configuration that a folder's ``config.json`` describes; of a LLaMA with ``solver`` as its
    solver section (default: explicit Euler).

    Raises:
        ValueError: as :func:`import_llama`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {found}; give the folder of a Hugging Face LLaMA or IIET checkpoint")
    fields = read_json(path)
    _refuse_unsupported(fields, path)
    model = _model(fields, path)
    _check_heads(model, fields, path)
    if model.num_kv_heads == model.num_attention_heads:
        model.num_key_value_heads = None
    if fields["model_type"] == "llama":
        section = {"kind": "euler", **(solver or {})}
        source = f"{path} and the solver options"
    elif solver:
        raise ValueError(f"{path}: the model has a solver of its own; leave out solver.{next(iter(solver))}")
    else:
        section = solver_from_fields(fields.get("solver"), model.num_layers, path)
        declared = SOLVERS.find(section["kind"], section.get("variant"))
        if fields.get("kv_cache") == "first" and declared and "key_values" in own_keys(declared):
            section["key_values"] = "first"  # the one cache that makes the model another function
        source = str(path)
    data: dict[str, Any] = {"sequence_length": min(model.max_position_embeddings, 2048)}
    tokenizer = tokenizer_files(folder)
    if tokenizer:
        data["tokenizer"] = tokenizer[0].name
    sections = {"model": config_to_dict(RunConfig(model=model))["model"], "solver": section, "data": data}
    return config_from_dict(sections, source=source)


def _exported_fields(solver: type[SolverConfig]) -> dict[str, Any]:
    """What an export says of a solver, with defaults: its names, and all keys but those about training."""
    exported = [f for f in fields_of(solver) if f.metadata.get("exported", True)]
    return {f.name: f.default for f in exported}


def solver_to_fields(config: RunConfig) -> dict[str, Any]:
    """The object ``solver`` of ``config.json``; ``iterations`` always lists a number for every layer."""
    solver = config.solver
    if isinstance(solver, Merging):
        solver = replace(solver, coefficient_init=solver.resolved_coefficient_init)
    if isinstance(solver, Iterating):
        solver = replace(solver, iterations=iterations_per_layer(config))
    return {name: getattr(solver, name) for name in _exported_fields(type(solver))}


def solver_from_fields(fields: Any, layers: int, path: Path) -> dict[str, Any]:
    """The solver section that :func:`solver_to_fields` wrote to ``path`` for a model of ``layers`` layers.

    What is as it would be anyway is left to its default. A key of the kind's other variant that has its
    default, as older versions wrote it, is left out with a warning.

    Raises:
        ValueError: it is no such object; values are left to the configuration's own checks.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'{path}: solver is {fields!r}, but must be an object such as {{"kind": "euler"}}')
    known = [name for name in SOLVERS.types if name != "schedule"]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{path}: solver has the unknown key '{unknown[0]}'; known are {', '.join(known)}")
    section = {key: value for key, value in fields.items() if value is not None}
    if "kind" not in section:
        raise ValueError(f"{path}: solver has no 'kind'; export the model again")
    declared = SOLVERS.find(section["kind"], section.get("variant"))
    if declared is None:
        return section  # for the configuration's own checks to name
    if "iterations" in own_keys(declared) and "iterations" not in section:
        raise ValueError(f"{path}: solver has no 'iterations'; export the model again")
    variants = [_exported_fields(solver) for solver in SOLVERS if solver().kind == section["kind"]]
    for key in [key for key in section if key not in _exported_fields(declared)]:
        if any(defaults.get(key) == section[key] for defaults in variants):
            what = f"{path}: solver.{key} is {section.pop(key)!r}"
            warnings.warn(f"{what}, which {declared().system} does not have; it is left out", stacklevel=2)
    iterations = section.get("iterations")
    if isinstance(iterations, list) and iterations == iterations[:1] * layers:
        section["iterations"] = iterations[0]
    if issubclass(declared, Merging) and section.get("coefficient_init") == declared.default_init:
        del section["coefficient_init"]
    return section


def _model(fields: Mapping[str, Any], path: Path) -> ModelConfig:
    heads = _size(fields, "num_attention_heads", path)
    model = ModelConfig(
        hidden_size=_size(fields, "hidden_size", path),
        ffn_hidden_size=_size(fields, "intermediate_size", path),
        num_layers=_size(fields, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_size(fields, "num_key_value_heads", path, default=heads),
        vocab_size=_size(fields, "vocab_size", path),
        vocab_multiple=_size(fields, "vocab_multiple", path, default=ModelConfig.vocab_multiple),
        max_position_embeddings=_size(fields, "max_position_embeddings", path, default=2048),
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        embedding_scale=1.0,
        rms_norm_eps=_number(fields, "rms_norm_eps", path, default=1e-6),
        rotary_base=_rotary_base(fields, path),
        init_std=_number(fields, "initializer_range", path, default=0.02),
    )
    if fields["model_type"] == "iiet":
        scale = _number(fields, "embedding_scale", path)
        model.embedding_scale = "unit" if scale == 1 / model.init_std else scale
    return model


def _refuse_unsupported(fields: Mapping[str, Any], path: Path) -> None:
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise _unsupported(path, "model_type", kind, "'llama' or 'iiet'")
    architectures = fields.get("architectures")
    if architectures not in (None, [ARCHITECTURES[kind]]):
        raise _unsupported(path, "architectures", architectures, str([ARCHITECTURES[kind]]))
    if fields.get("kv_cache") not in (None, *CACHES):
        raise _unsupported(path, "kv_cache", fields["kv_cache"], ", ".join(map(repr, CACHES)))
    for name, (only, reason) in _ONLY_VALUES.items():
        if fields.get(name) is not None and fields[name] != only:
            raise _unsupported(path, name, fields[name], f"{only!r}: {reason}")
    if fields.get("tie_word_embeddings") not in (None, True, False):
        raise _unsupported(path, "tie_word_embeddings", fields["tie_word_embeddings"], "true or false")
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
    if model.head_width % 2:
        raise _unsupported(path, "head_dim", model.head_width, "an even number")
    if heads % kv:
        raise _unsupported(path, "num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")


def _size(fields: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(path, name, value, "a whole number of at least 1")
    return value


def _number(
    fields: Mapping[str, Any], name: str, path: Path, *, default: float | None = None, prefix: str = ""
) -> float:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _unsupported(path, prefix + name, value, "a number greater than 0")
    return float(value)


def _unsupported(path: Path, field: str, found: Any, supported: str) -> ValueError:
    shown = "missing" if found is None else repr(found)
    return ValueError(f"{path}: {field} is {shown}; supported is {supported}")
