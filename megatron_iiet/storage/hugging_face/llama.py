"""A Hugging Face folder (``config.json`` and weights) as our configuration and parameters: a LLaMA or another
of the :data:`megatron_iiet.config.hugging_face.FAMILIES`, or one that was exported. What our model would
compute differently is refused, and no code that a file brings is run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import RunConfig, config_from_dict, config_to_dict, iterations_per_layer
from megatron_iiet.config.errors import ConfigWarning
from megatron_iiet.config.hugging_face import CONFIG_FILE, FAMILIES, Family, model_of_fields, read_json
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.kinds import own_keys
from megatron_iiet.config.solvers import SOLVERS, Euler, Iterating, Merging, SolverConfig
from megatron_iiet.storage.hugging_face.weights import HFWeights, WithInitialSolvers

TOKENIZER_FILES = ("tokenizer.model", "sentencepiece.model", "tokenizer.json", "tokenizer_config.json")


def import_llama(
    folder: str | Path, solver: Mapping[str, Any] | None = None
) -> tuple[RunConfig, HFWeights | WithInitialSolvers]:
    """Configuration and fp32 parameters (by our names, read when asked for) of a checkpoint folder.

    ``solver`` sets keys of the ``solver`` section of all but an IIET; without any the layers are integrated
    as the checkpoint was trained, by explicit Euler. Solver coefficients get their initial values. An IIET
    has its own solver and coefficients.

    Raises:
        ValueError: (and its subclass ConfigError) no such checkpoint, one that our model can't represent,
            or a damaged one; the message names the file, the field or tensor, and what is supported.
    """
    folder = Path(folder)
    config, weights = open_folder(folder, solver)
    return config, weights if is_iiet(folder) else WithInitialSolvers(weights, config)


def open_folder(folder: Path, solver: Mapping[str, Any] | None = None) -> tuple[RunConfig, HFWeights]:
    """:func:`import_llama` with what is in the folder only: of an IIET alone solvers' parameters.

    Raises:
        ValueError: as :func:`import_llama`.
    """
    config = read_config(folder, solver)
    return config, HFWeights(folder, config, family_of(folder))


def is_iiet(folder: Path) -> bool:
    """Whether the ``config.json`` of a folder is that of an exported model with a solver."""
    return family_of(folder).has_solver


def family_of(folder: Path) -> Family:
    """What the ``config.json`` of a folder that :func:`read_config` takes says that it is."""
    return FAMILIES[read_json(folder / CONFIG_FILE)["model_type"]]


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
    """The run configuration that a folder's ``config.json`` describes; of all but an IIET with ``solver`` as
    its solver section (default: explicit Euler).

    Raises:
        ValueError: as :func:`import_llama`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        families = join_words([family.title for family in FAMILIES.values()])
        raise ValueError(f"{folder} {found}; give the folder of a Hugging Face {families} checkpoint")
    fields = read_json(path)
    model = model_of_fields(fields, path)
    data: dict[str, Any] = {"sequence_length": min(model.max_position_embeddings, 2048)}
    if not FAMILIES[fields["model_type"]].has_solver:
        given = dict(solver or {})
        # What Euler does not have is of the kind that every run has by default.
        section = {"kind": "euler", **given} if given.keys() <= {"kind", *own_keys(Euler)} else given
        source = f"{path} and the solver options"
    elif solver:
        raise ValueError(f"{path}: the model has a solver of its own; leave out solver.{next(iter(solver))}")
    else:
        section = solver_from_fields(fields.get("solver"), model.num_layers, path)
        declared = SOLVERS.find(section["kind"], section.get("variant"))
        if fields.get("kv_cache") == "first" and declared and "key_values" in own_keys(declared):
            section["key_values"] = "first"  # the one cache that makes the model another function
        source = str(path)
        if "text_follows" in fields:
            data["text_follows"] = fields["text_follows"]
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
            what = f"{path}: solver.{key} is {section.pop(key)!r}, which {declared().system} does not have"
            warnings.warn(f"{what}; it is left out", ConfigWarning, stacklevel=2)
    iterations = section.get("iterations")
    if isinstance(iterations, list) and iterations == iterations[:1] * layers:
        section["iterations"] = iterations[0]
    if issubclass(declared, Merging) and section.get("coefficient_init") == declared.default_init:
        del section["coefficient_init"]
    return section
