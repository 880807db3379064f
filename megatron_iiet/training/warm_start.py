"""Initial weights from another model of the same shape, whatever solver integrated it.

They go where a resumed checkpoint's go, into the fp32 masters of the optimizer: DeepSpeed makes masters from
the module's bf16 working copy, so weights put into the module would lose their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_iiet.config import ConfigError, RunConfig, iterations_per_layer
from megatron_iiet.config.changes import Change, change_of_field
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.config.solvers import Iterating
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.storage import portable
from megatron_iiet.storage.source import Source, open_model

INITIAL_WEIGHTS, TEACHER = "training.initial_weights", "distillation.teacher"
# What a model's parameters are, or are multiplied with: not how many rows pad the vocabulary; the embedding's
# scale has a sentence of its own.
_SHAPE = [
    declared.name
    for declared in fields(ModelConfig)
    if change_of_field(declared) is Change.FUNCTION
    and declared.name not in ("vocab_multiple", "embedding_scale")
]


@dataclass(frozen=True)
class WarmStart:
    """Which parameters a run takes from where."""

    source: Source
    taken: frozenset[str]
    """Names of the parameters taken over."""
    counts: tuple[int, int, int]
    """Elements taken over, of this model at initial values, of the source's solver left out."""
    changes: str
    """What the source's solver computes otherwise than this model's; empty if it is the same."""

    def describe(self) -> str:
        """The line of a run's start."""
        taken, fresh, left_out = self.counts
        kind = self.source.config.solver.kind
        lost = f"; {left_out:,} of its solver ({kind}) have no place here and are left out"
        return (
            f"initial weights: {self.source.description}: {taken:,} parameters taken over, {fresh:,} start "
            f"at their initial values{lost if left_out else ''}{self.changes}"
        )


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
    source = _open_fitting(path, key, config)
    there, here = Transformer.on_meta(source.config), Transformer.on_meta(config)
    taken = frozenset(_names(here)) & {name for name in _names(there) if _means_the_same(name, there, here)}
    of_solver = [name for name in _names(there) if ".solver." in name]
    counts = (
        _elements(here, taken),
        _elements(here, set(_names(here)) - taken),
        _elements(there, set(of_solver) - taken),
    )
    return WarmStart(source, taken, counts, _changes(source.config, config))


def _changes(there: RunConfig, here: RunConfig) -> str:
    one, other = there.solver, here.solver
    counts = [solver.iterations_per_layer(here.model.num_layers) for solver in (one, other)]
    if type(one) is not type(other):
        was, now = (solver.describe(of) for solver, of in zip((one, other), counts, strict=True))
        return f"; trained as {was}, they go on as {now}"
    keys = [f.name for f in fields(one) if change_of_field(f) is Change.FUNCTION and f.name != "schedule"]
    changed = [key for key in keys if getattr(one, key) != getattr(other, key)]
    if counts[0] == counts[1]:  # a number, a list or a plan may say the same
        changed = [key for key in changed if key != "iterations"]
    was, now = (
        join_words([f"{key} {getattr(solver, key)}" for key in changed] or [""], "and")
        for solver in (one, other)
    )
    return f"; trained with solver.{was}, they go on with {now}" if changed else ""


def open_teacher(config: RunConfig) -> Source | None:
    """The model of ``distillation.teacher``, checked against the student; None if it is empty.

    Raises:
        ValueError: (and its subclass ConfigError) there is no such thing, it is damaged, of another shape,
            has itself been reduced, or is what the student is already.
    """
    path = config.distillation.teacher
    if not path:
        return None
    source = _open_fitting(path, TEACHER, config)
    iterations = iterations_per_layer(source.config)
    if why := why_reduced(source.config):
        raise ConfigError(f"{TEACHER} is {path}, which {why}; give the full model it was made from")
    ours = iterations_per_layer(config)
    if isinstance(source.config.solver, Iterating) and max(ours) > iterations[0]:
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
    return source


def why_reduced(config: RunConfig) -> str:
    """What tells that a model has lost iterations already; empty if nothing does."""
    if config.distillation.teacher:
        return f"was distilled from {config.distillation.teacher}"
    iterations = iterations_per_layer(config)
    return f"has the iterations {iterations}" if len(set(iterations)) > 1 else ""


def _open_fitting(path: str, key: str, config: RunConfig) -> Source:
    """The model at ``path``, whole, of this one's shape and embedding scale; ``key`` names it in messages."""
    source = open_model(path, key)
    missing = sorted(set(_names(Transformer.on_meta(source.config))) - set(source.weights))
    if missing:
        raise ConfigError(
            f"{source.description} has no {missing[0]}, which its configuration asks for; convert it again"
        )
    there, here = source.config.model, config.model
    one, other = there.resolved(), here.resolved()
    differences = [f"model.{k} is {one[k]} there and {other[k]} here" for k in _SHAPE if one[k] != other[k]]
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
    return source


def _means_the_same(name: str, there: Transformer, here: Transformer) -> bool:
    """Whether a parameter of ``there`` can be one of that name ``here``: all of the decoder's, and those of a
    solver whose formula the other's is, or is a case of (DLCL is IIET without corrector)."""
    if ".solver." not in name:
        return True
    layer = int(name.split(".")[1])
    one, other = there.solvers[layer], here.solvers[layer]
    if not (isinstance(one, type(other)) or isinstance(other, type(one))):
        return False
    # In what unit merge coefficients are, where there is a choice.
    norms = [getattr(solver, "history_norm", None) for solver in (one, other)]
    parameters = [dict(solver.named_parameters()).get(name.split(".solver.")[1]) for solver in (one, other)]
    shapes = [None if parameter is None else parameter.shape for parameter in parameters]
    return norms[0] == norms[1] and None not in shapes and shapes[0] == shapes[1]


def _number(value: float) -> str:
    """As short as it reads back exactly: 1, not 1.0."""
    return repr(value).removesuffix(".0")


def _names(model: Transformer) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _elements(model: Transformer, names: set[str] | frozenset[str]) -> int:
    """Elements of the named parameters, without the vocabulary's padding."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    return sum(portable.without_padding(model.config, name, p).numel() for name, p in parameters.items())
