"""Whether a run may go on from its newest checkpoint: what changed since, what of that is refused or accepted
by name, and whether there is anything left to do. All of it before anything is built or written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import ConfigError, RunConfig, config_to_dict, iterations_per_layer
from megatron_iiet.config.changes import ACCEPT_CHANGES, Change
from megatron_iiet.config.keys import key_changes, section_names
from megatron_iiet.config.schema import KINDS
from megatron_iiet.config.solvers import Iterating, Merging, one_per_layer
from megatron_iiet.data.corpora.identity import identity_difference
from megatron_iiet.data.loader.blend import Blend
from megatron_iiet.data.loader.validation import FIRST
from megatron_iiet.models.iterations import iterations_at
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.integrity import REMEDY, DamagedError, digest_of, misfit
from megatron_iiet.storage.selection import Candidates
from megatron_iiet.storage.source import Source, open_model

CONTENTS = "contents"
"""Where the state of the sample reader in a checkpoint has what its corpora and tokenizer hold."""
RULE = "validation_rule"
"""Where those contents have which windows the run validates on, so that a curve is over one set of them."""
_MODELS = {"distillation.teacher": "teacher", "training.initial_weights": "initial_weights"}
"""Keys that name other models, and where their contents have what those compute: by that they are known, by
their paths only where the checkpoint does not say it."""
_ADDED: dict[str, Any] = {
    "model.head_dim": None,
    "model.attention_bias": "none",
    "model.qk_norm": False,
    "model.rope_scaling": None,
}
"""Keys that models of older versions had not, and what these computed: it stays out of their digests."""
_CORPUS = {"tokens": int, "documents": int, "sampled": str, "listed": (None, str)}
_CONTENTS = {
    "train": [_CORPUS],
    "validation": (None, _CORPUS),
    "tokenizer": str,
    **dict.fromkeys((*_MODELS.values(), RULE), (None, str)),
}
_PLACES = ({"samples": int, "windows": [int]}, {"epoch": int, "sample": int})
_FORM = {
    "data": tuple({CONTENTS: (None, _CONTENTS), **place} for place in _PLACES),
    "layout": {"data": int, "zero_stage": int},
}
"""What a state without a digest is asked for, see :func:`megatron_iiet.storage.integrity.misfit`."""
_DIFFERS = {
    Change.FUNCTION: "the parameters there compute something else",
    Change.ORDER: "samples there are others or in another order",
}


class NothingToDo(Exception):  # noqa: N818  (no error)
    """The run has taken all its steps; the message is a sentence for the user."""


@dataclass(frozen=True)
class Difference:
    """A key that has another value than in the checkpoint."""

    key: str
    old: Any
    new: Any
    change: Change
    """What that means here."""
    note: str = ""
    """What follows from it, if that is why it is refused."""

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"

    def as_data(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"key": self.key, "old": self.old, "new": self.new}


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run goes on from."""

    folder: Path
    state: checkpoint.TrainState
    changed: list[Difference] = field(default_factory=list)
    """What is told: the course that training takes from here on."""
    accepted: list[Difference] = field(default_factory=list)
    """What would be refused, had the start not named it."""
    notes: list[str] = field(default_factory=list)
    """What else there is to say."""

    @property
    def validation_rule(self) -> str:
        """Which windows the run validates on; one that does not say began before there was another rule."""
        return str((self.state.data.get(CONTENTS) or {}).get(RULE) or FIRST)

    def describe(self) -> str:
        """The lines of a start, the layout apart."""
        return "\n".join(
            [
                f"resuming from {self.folder}",
                *(f"  changed since then: {difference}" for difference in self.changed),
                *(f"  accepted by --{ACCEPT_CHANGES}: {difference}" for difference in self.accepted),
                *(f"  {note}" for note in self.notes),
            ]
        )


def check_may_resume(config: RunConfig, candidates: Candidates) -> None:
    """Refuse a folder with checkpoints where ``checkpoint.resume`` says not to go on from one; none is read.

    Raises:
        ConfigError: there are some.
    """
    if candidates.began and not config.checkpoint.resume:
        named = f"checkpoint {candidates.tags[0]}" if candidates.tags else "checkpoints"
        raise ConfigError(
            f"{config.output_dir} already holds {named} and checkpoint.resume is false; set it to true to "
            "continue, or choose another output_dir"
        )


def check_resumable(
    folder: Path, config: RunConfig, contents: Mapping[str, Any], accept: Sequence[str] = ()
) -> Resumption:
    """The checkpoint to continue from, checked against this run.

    ``contents``: what corpora, tokenizer and other models hold; ``accept``: keys whose change this start
    accepts.

    Raises:
        ConfigError: it is of another format, function or order of samples; every difference is named.
    """
    state = checkpoint.read_state(folder)
    notes = []
    if lacks := checkpoint.lacks(folder):
        if wrong := misfit({"data": state.data, "layout": state.layout}, _FORM):
            raise DamagedError(f"{folder / checkpoint.STATE} is damaged: {wrong}; {REMEDY}")
        notes.append(f"it is {lacks}")
    before = checkpoint.read_config(folder)
    done = nothing_to_do(config, state.step)
    there = state.data.get(CONTENTS) or {}
    known = [key for key, name in _MODELS.items() if done or there.get(name)]  # if it matters at all
    found = [
        one
        for one in differences(before, config, state.step)
        if not (one.key in known and one.old and one.new)  # other paths, which say nothing
    ]
    if not there:
        notes.append("the checkpoint does not say what its corpora held; they are taken to be the same")
    else:
        found += content_differences(there, contents, before, config)
        weights = config.training.initial_weights
        if weights and there.get("initial_weights") and not contents.get("initial_weights"):
            notes.append(f"training.initial_weights {weights} holds no model now; only step 0 needed it")
    critical = [difference for difference in found if difference.change.refused]
    refused = [difference for difference in critical if difference.key not in accept]
    if refused:
        raise ConfigError(_refusal(folder, config, refused))
    notes += [
        f"--{ACCEPT_CHANGES} names {key}, which needs none of it: it has not changed, or may"
        for key in dict.fromkeys(accept)
        if key not in [difference.key for difference in critical]
    ]
    changed = [difference for difference in found if not difference.change.refused]
    return Resumption(folder, state, changed, critical, notes)


def with_own_split(config: RunConfig, folder: Path, accept: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """A configuration without a test share, as the default is, for a run whose checkpoint in ``folder`` has
    one: nothing reads it, so the run keeps its split; and what to tell ("": nothing)."""
    before, split = checkpoint.read_config(folder).data.split, config.data.split
    if "data.split" in accept or before[0] != split[0] or split[2] or not before[2]:
        return config, ""
    told = f"data.split stays {before}, as this run began: validation goes on over the same documents"
    return replace(config, data=replace(config.data, split=before)), told


def _refusal(folder: Path, config: RunConfig, refused: Sequence[Difference]) -> str:
    reasons = []
    for change, description in _DIFFERS.items():
        of_it = [
            f"{one.key} is {one.old} there and {one.new} here{one.note}"
            for one in refused
            if one.change is change
        ]
        reasons += [f"{description} ({'; '.join(of_it)})"] if of_it else []
    keys = ",".join(dict.fromkeys(difference.key for difference in refused))
    return (
        f"checkpoint {folder} does not fit: {', and '.join(reasons)}; restore what it was made with, start "
        f"anew from its weights with --training.initial_weights {config.output_dir} and another "
        f"output_dir, or, where you mean it, add --{ACCEPT_CHANGES} {keys} to this one start"
    )


def nothing_to_do(config: RunConfig, step: int) -> str:
    """Of a run that has taken its steps, all of them or those up to ``training.stop_after``, a sentence that
    says so, and what to do instead; "" of any other."""
    steps, stop = config.training.steps, config.training.stop_after
    if step >= steps:
        way_on = (
            f"to go on from here, give --training.initial_weights {config.output_dir} and another output_dir"
            if _stages(config) is not None
            else "raise training.steps or choose another output_dir"
        )
        return f"complete: {step} of {steps} steps; {way_on}"
    if stop is not None and step >= stop:
        return (
            f"complete up to training.stop_after = {stop}: {step} of {steps} steps; raise it, or set it to "
            "null to go on to the end"
        )
    return ""


def differences(before: RunConfig, config: RunConfig, step: int) -> list[Difference]:
    """What distinguishes two configurations for a run that has taken ``step`` steps under the first, in the
    order of the schema; keys that are free to change apart."""
    old, new = _in_force(before), _in_force(config)
    shown_old, shown_new = _shown(before), _shown(config)
    found = [
        Difference(key, shown_old[key], shown_new[key], key_changes()[key])
        for key in old
        if key in new and old[key] != new[key] and key_changes()[key] is not Change.FREE
    ]
    for section in KINDS:
        kind = f"{section}.kind"
        if any(one.key == kind for one in found):  # the other keys there mean something else then
            found = [one for one in found if one.key == kind or not one.key.startswith(f"{section}.")]
    judged: dict[str, Callable[..., Difference]] = {
        "training.steps": _refused_if_another_stage,
        "data.skip_steps": _refused_if_behind,
    }
    return [judged[one.key](one, before, config, step) if one.key in judged else one for one in found]


def _refused_if_another_stage(
    difference: Difference, before: RunConfig, config: RunConfig, step: int
) -> Difference:
    """Stages are fractions of the steps: with another number of them the next one may be in another stage."""
    moved = replace(before, training=replace(before.training, steps=config.training.steps))
    there, here = (_number_or_list(iterations_at(each, step)[0]) for each in (before, moved))
    if there == here:
        return difference
    note = f", which moves step {step} into another stage, from r = {there} to r = {here}"
    return replace(difference, change=Change.FUNCTION, note=note)


def _refused_if_behind(difference: Difference, before: RunConfig, config: RunConfig, step: int) -> Difference:
    """What was left out, and what was not, is past; of the steps ahead it may be said anew."""
    changed = before.data.skipped ^ config.data.skipped
    behind = sorted(number for number in changed if number <= step)
    if not behind:
        return replace(difference, change=Change.COURSE)
    return replace(difference, note=f", which differ in step {behind[0]} of the {step} that are done")


def content_differences(
    there: Mapping[str, Any], here: Mapping[str, Any], before: RunConfig, config: RunConfig
) -> list[Difference]:
    """What corpora, tokenizer and models hold that they did not when the checkpoint was written."""
    corpora = zip(before.data.weights, config.data.weights, there["train"], here["train"], strict=False)
    pairs = [("data.blend" if config.data.blend else "data.prefix", *each) for each in corpora]
    if there.get("validation") and here.get("validation"):
        paths = before.data.validation_prefix, config.data.validation_prefix
        pairs.append(("data.validation_prefix", *paths, there["validation"], here["validation"]))
    found = []
    for key, path_there, path_here, held_there, held_here in pairs:
        if differing := identity_difference(held_there, held_here):
            old, new = differing
            found.append(Difference(key, f"{path_there} with {old}", f"{path_here} with {new}", Change.ORDER))
    for key in ("data.tokenizer", *_MODELS):
        section, name = key.split(".")
        digests = there.get(name), here.get(name)
        if all(digests) and digests[0] != digests[1]:
            old, new = (
                f"{getattr(getattr(c, section), name)} of digest {digest:.8}"
                for c, digest in zip((before, config), digests, strict=True)
            )
            found.append(Difference(key, old, new, Change.FUNCTION))
    return found


def model_identity(model: Source) -> str:
    """A digest of what a model computes: of the keys that decide it, and of its weights' first rows."""
    function = {
        key: value
        for key, value in _in_force(model.config).items()
        if key.startswith(("model.", "solver."))
        and key_changes()[key] is Change.FUNCTION
        and not (key in _ADDED and value == _ADDED[key])
    }
    return digest_of(f"{sorted(function.items())} {model.digest()}".encode())


def initial_identity(config: RunConfig) -> str | None:
    """The identity of ``training.initial_weights``; None without such, and where no model is any more."""
    if not config.training.initial_weights:
        return None
    try:
        return model_identity(open_model(config.training.initial_weights, "training.initial_weights"))
    except (ValueError, OSError):  # a start that needs it has opened it before
        return None


def _shown(config: RunConfig) -> dict[str, Any]:
    """Every key's value as messages and records have it: as written, but for what null and 'unit' mean."""
    values: dict[str, Any] = {}
    for name, value in config_to_dict(config).items():
        values |= (
            {f"{name}.{leaf}": v for leaf, v in value.items()} if name in section_names() else {name: value}
        )
    values |= {f"model.{name}": value for name, value in config.model.resolved().items()}
    values["data.blend"] = list(config.data.weights.values())
    if isinstance(config.solver, Merging):
        values["solver.coefficient_init"] = config.solver.resolved_coefficient_init
    return values


def _in_force(config: RunConfig) -> dict[str, Any]:
    """Every key's value as it is compared: equal where it means the same, absent where it means nothing."""
    data = config.data
    values = _shown(config)
    values |= {
        "data.blend": Blend(values["data.blend"]).shares,
        # Corpora are compared by what they hold.
        "data.validation_prefix": bool(data.validation_prefix),
        "data.skip_steps": data.skipped,
    }
    if isinstance(config.solver, Iterating):
        values["solver.iterations"] = _number_or_list(iterations_per_layer(config))
        values["solver.schedule"] = _stages(config)
    for key in _MODELS:
        values[key] = values[key] and os.path.realpath(values[key])
    without_effect = []
    for decisive in ("guidance.interval", "distillation.teacher"):
        section = f"{decisive.split('.')[0]}."
        if not values[decisive]:
            without_effect += [key for key in values if key.startswith(section) and key != decisive]
    if config.guards.spike == "off":
        without_effect += ["guards.window", "guards.deviations"]
    if data.validation_prefix:
        without_effect.append("data.split")
    return {key: value for key, value in values.items() if key not in without_effect}


def _stages(config: RunConfig) -> list[tuple[float, int | list[int]]] | None:
    """The stages of a schedule; None if there is but one."""
    schedule = config.solver.schedule if isinstance(config.solver, Iterating) else None
    if not schedule or len(schedule) == 1:
        return None
    layers = config.model.num_layers
    return [(fraction, _number_or_list(one_per_layer(r, layers))) for fraction, r in schedule]


def _number_or_list(iterations: list[int]) -> int | list[int]:
    return iterations[0] if len(set(iterations)) == 1 else iterations
