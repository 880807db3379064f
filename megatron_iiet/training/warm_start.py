"""Initial weights from another model of the same shape, whatever solver integrated it.

The decoder's parameters are taken over, and the solver's where they mean the same; the others start at their
initial values. Weights go where a resumed checkpoint's go, into the fp32 masters of the optimizer: DeepSpeed
makes masters from the module's bf16 working copy, so weights put into the module would lose their last bits.
A rank reads the rows that hold its part, whole models are nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_iiet.config import ConfigError, RunConfig, iterations_per_layer
from megatron_iiet.hf import llama
from megatron_iiet.models import portable
from megatron_iiet.models.solvers import Solver
from megatron_iiet.models.transformer import VOCABULARY_WEIGHTS, Transformer
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.training.export import find_checkpoint, model_of_checkpoint
from megatron_iiet.training.fragments import SCRATCH_BYTES

INITIAL_WEIGHTS, TEACHER = "training.initial_weights", "distillation.teacher"
KINDS = (
    "a model folder of tools/convert_checkpoint.py (config.yaml, model.safetensors), a training run's "
    "output_dir or one of its checkpoints, or a Hugging Face folder (config.json, safetensors) of a LLaMA or "
    "one that tools/convert_checkpoint.py wrote"
)
# What a model's parameters are, or are multiplied with; longer rotary tables are the same function.
_SHAPE = (
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_kv_heads",
    "vocab_size",
    "tie_embeddings",
    "rotary_base",
    "rms_norm_eps",
)
_CONFIG_KEYS = {"num_kv_heads": "num_key_value_heads"}


class Weights(Protocol):
    """Stored parameters by our names; the vocabulary's padding may be there or not."""

    def __iter__(self) -> Iterator[str]: ...

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a parameter, fp32 on the CPU (a scalar is one row)."""


@dataclass(frozen=True)
class Source:
    """A model to take weights from."""

    words: str
    """What and where it is."""
    config: RunConfig
    weights: Weights


@dataclass(frozen=True)
class WarmStart:
    """Which parameters a run takes from where."""

    source: Source
    taken: frozenset[str]
    """Names of the parameters taken over."""
    counts: tuple[int, int, int]
    """Elements taken over, of this model at initial values, of the source's solver left out."""

    def describe(self) -> str:
        """The line of a run's start."""
        taken, fresh, left_out = self.counts
        kind = self.source.config.solver.kind
        lost = f"; {left_out:,} of its solver ({kind}) have no place here and are left out"
        return (
            f"initial weights: {self.source.words}: {taken:,} parameters taken over, {fresh:,} start at "
            f"their initial values{lost if left_out else ''}"
        )

    def fill_parameter(self, name: str, parameter: Tensor, tensor: Group) -> None:
        """Fill a rank's part of a parameter, which must be there to write to."""
        shard, shape = shard_of(parameter), list(parameter.shape)
        if shard is not None:
            shape[shard.dim] = sum(shard.blocks)
        self.fill(
            name,
            parameter.detach().view(-1),
            shape=tuple(shape),
            shard=shard,
            tensor_size=tensor.size if shard else 1,
            tensor_rank=tensor.rank if shard else 0,
            start=0,
        )

    def fill(
        self,
        name: str,
        out: Tensor,
        *,
        shape: tuple[int, ...],
        shard: Shard | None,
        tensor_size: int,
        tensor_rank: int,
        start: int,
    ) -> None:
        """Fill ``out``, [numel] on any device, from element ``start`` on of a rank's flattened local shard.

        ``shape`` is the whole parameter's in the model that starts, its vocabulary's padding included, whose
        rows are zero.
        """
        local = shard.local_shape(shape, tensor_size) if shard else shape
        slices = shard.slices(tensor_size, tensor_rank) if shard else []
        width, end = prod(local[1:]), start + len(out)
        most = max(1, SCRATCH_BYTES // (4 * prod(shape[1:])))
        last = -(-end // width)
        for row in range(start // width, last, most):
            stop = min(row + most, last)
            if shard is not None and shard.dim == 0:
                rows = self._split_rows(name, slices, row, stop)
            else:
                rows = self._rows(name, row, stop)
            if shard is not None and shard.dim == 1:
                rows = torch.cat([rows[:, columns] for columns in slices], 1)
            low, high = max(start, row * width), min(end, stop * width)
            part = rows.reshape(-1)[low - row * width : high - row * width]
            out[low - start : high - start].copy_(part)

    def _split_rows(self, name: str, slices: list[slice], first: int, last: int) -> Tensor:
        """Rows [first, last) of a local shard that is made of the rows ``slices`` of the whole."""
        parts, start = [], 0
        for held in slices:
            shift = held.start - start
            low, high = max(first, start), min(last, start + held.stop - held.start)
            if low < high:
                parts.append(self._rows(name, low + shift, high + shift))
            start += held.stop - held.start
        return torch.cat(parts)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the whole parameter; those of the vocabulary's padding are zero."""
        if name not in VOCABULARY_WEIGHTS:
            return self.source.weights.rows(name, first, last)
        model = self.source.config.model
        stored = min(last, model.vocab_size)
        found = self.source.weights.rows(name, min(first, stored), stored)
        return torch.cat((found, found.new_zeros(last - max(first, stored), model.hidden_size)))


def open_warm_start(config: RunConfig) -> WarmStart | None:
    """What ``training.initial_weights`` asks for, checked against the model; None if it is empty. A student
    starts from its teacher unless told otherwise.

    Raises:
        ValueError: (and its subclass ConfigError) there is no such thing, it is damaged, or of a model with
            which this one can't start.
    """
    key, path = INITIAL_WEIGHTS, config.training.initial_weights
    if not path:
        key, path = TEACHER, config.distillation.teacher
    if not path:
        return None
    source = open_source(path, key)
    check_fits(source, config, key, path)
    there, here = Transformer.on_meta(source.config), Transformer.on_meta(config)
    _check_complete(source, there)
    taken = frozenset(_names(here)) & {name for name in _names(there) if _means_the_same(name, there, here)}
    of_solver = [name for name in _names(there) if ".solver." in name]
    counts = (
        _elements(here, taken),
        _elements(here, set(_names(here)) - taken),
        _elements(there, set(of_solver) - taken),
    )
    return WarmStart(source, taken, counts)


def open_teacher(config: RunConfig) -> WarmStart | None:
    """All weights of ``distillation.teacher``, checked against the student; None if it is empty.

    Raises:
        ValueError: (and its subclass ConfigError) there is no such thing, it is damaged, of another shape,
            has itself been reduced, or is what the student is already.
    """
    path = config.distillation.teacher
    if not path:
        return None
    source = open_source(path, TEACHER)
    check_fits(source, config, TEACHER, path)
    iterations = iterations_per_layer(source.config)
    if why := why_reduced(source.config):
        raise ConfigError(f"{TEACHER} is {path}, which {why}; give the full model it was made from")
    ours = iterations_per_layer(config)
    if source.config.solver.kind == config.solver.kind and max(ours) > iterations[0]:
        raise ConfigError(
            f"{TEACHER} is {path}, which iterates {iterations[0]} times a layer, but the student up to "
            f"{max(ours)} times; give solver.iterations a plan made for this teacher"
        )
    if source.config.solver.kind == config.solver.kind and ours == iterations:
        raise ConfigError(
            f"{TEACHER} is {path}, which the student equals: {config.solver.kind} with {iterations[0]} "
            "iterations a layer; give a plan with fewer (--plan, short for solver.iterations; 0: lower "
            "bound) or another solver.kind"
        )
    there = Transformer.on_meta(source.config)
    _check_complete(source, there)
    names = frozenset(_names(there))
    return WarmStart(source, names, (_elements(there, names), 0, 0))


def why_reduced(config: RunConfig) -> str:
    """What tells that a model has lost iterations already; empty if nothing does."""
    if config.distillation.teacher:
        return f"was distilled from {config.distillation.teacher}"
    iterations = iterations_per_layer(config)
    return f"has the iterations {iterations}" if len(set(iterations)) > 1 else ""


def _check_complete(source: Source, there: Transformer) -> None:
    missing = sorted(set(_names(there)) - set(source.weights))
    if missing:
        raise ConfigError(
            f"{source.words} has no {missing[0]}, which its configuration asks for; convert it again"
        )


def open_source(path: str, key: str = INITIAL_WEIGHTS) -> Source:
    """The model at ``path``, of whichever of the :data:`KINDS`; ``key``: the setting that messages name.

    Raises:
        ValueError: (and its subclass ConfigError) it is none of them, or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{key} is {path}, which {found}; give {KINDS}")
    if (folder / "checkpoints").is_dir():
        folder = find_checkpoint(folder, None)
    if (folder / "state.json").is_file():
        return Source(f"checkpoint {folder}", *model_of_checkpoint(folder))
    if all((folder / file).is_file() for file in (portable.CONFIG_FILE, portable.WEIGHTS_FILE)):
        stored = portable.StoredModel(folder)
        return Source(f"model {folder}", stored.config, stored)
    if (folder / llama.CONFIG_FILE).is_file():
        kind = "IIET" if llama.is_iiet(folder) else "LLaMA"
        return Source(f"{kind} {folder}", *llama.open_folder(folder))
    raise ConfigError(f"{key} is {path}, which is none of what it may be; give {KINDS}")


def check_fits(source: Source, config: RunConfig, key: str, path: str) -> None:
    """Refuse a model of another shape or another embedding scale; ``key`` is the setting that names it.

    Raises:
        ConfigError: naming every difference.
    """
    there, here = source.config.model, config.model
    differences = [
        f"model.{_CONFIG_KEYS.get(k, k)} is {getattr(there, k)} there and {getattr(here, k)} here"
        for k in _SHAPE
        if getattr(there, k) != getattr(here, k)
    ]
    if differences:
        raise ConfigError(
            f"{key} is {path}, a model of another shape: {'; '.join(differences)}; "
            "give this run the same values, or another model"
        )
    scale, ours = there.resolved_embedding_scale, here.resolved_embedding_scale
    if scale != ours:
        raise ConfigError(
            f"{key} is {path}, whose embedding is scaled by {_number(scale)}, but here it is by "
            f"{_number(ours)} (model.embedding_scale {here.embedding_scale}); add --model.embedding_scale "
            f"{_number(scale)}"
        )


def _means_the_same(name: str, there: Transformer, here: Transformer) -> bool:
    """Whether a parameter of ``there`` can be one of that name ``here``: all of the decoder's, and those of a
    solver whose formula the other's is, or is a case of (DLCL is IIET without corrector)."""
    if ".solver." not in name:
        return True
    layer = int(name.split(".")[1])
    one, other = there.solvers[layer], here.solvers[layer]
    shapes = [dict(solver.named_parameters()).get(name.split(".solver.")[1]) for solver in (one, other)]
    related = isinstance(one, type(other)) or isinstance(other, type(one))
    return related and _scale_of_history(one) == _scale_of_history(other) and _same_shape(*shapes)


def _scale_of_history(solver: Solver) -> object:
    """In what unit a solver's merge coefficients are, if it has a choice."""
    return getattr(solver, "history_norm", None)


def _same_shape(one: nn.Parameter | None, other: nn.Parameter | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape


def _number(value: float) -> str:
    """As short as it reads back exactly: 1, not 1.0."""
    return repr(value).removesuffix(".0")


def _names(model: Transformer) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _elements(model: Transformer, names: set[str] | frozenset[str]) -> int:
    """Elements of the named parameters, without the vocabulary's padding."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    return sum(portable.without_padding(model.config, name, p).numel() for name, p in parameters.items())
