"""How an fp16 run scales its loss: the section fp16 of the DeepSpeed JSON, names and defaults DeepSpeed's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.keys import did_you_mean, join_words

LARGEST = 2.0**32
"""Scale that a run starts with or comes to."""


@dataclass(frozen=True)
class LossScaling:
    """A scale, and what moves it."""

    initial: float
    dynamic: bool
    window: int
    """Steps without an overflow after which it is doubled."""
    hysteresis: int
    """Overflows after which it is halved."""
    consecutive: bool
    """Whether a step without an overflow restores the hysteresis."""
    least: float
    """What an overflow does not lower it below: there it is judged as in other precisions."""


@dataclass(frozen=True)
class _Setting:
    default: Any
    fits: Callable[[Any], bool]
    words: str


def _is_int(value: Any, least: int, most: float = float("inf")) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


_SETTINGS = {
    "enabled": _Setting(True, lambda value: type(value) is bool, 'true, false or "auto"'),
    "loss_scale": _Setting(0, _is_number, "0, for a scale that adapts, or a number up to 2^32"),
    "initial_scale_power": _Setting(16, lambda value: _is_int(value, 0, 32), "an integer from 0 to 32"),
    "loss_scale_window": _Setting(1000, lambda value: _is_int(value, 1), "an integer from 1 on"),
    "hysteresis": _Setting(2, lambda value: _is_int(value, 1), "an integer from 1 on"),
    "consecutive_hysteresis": _Setting(False, lambda value: type(value) is bool, "true or false"),
    "min_loss_scale": _Setting(1, lambda v: _is_number(v) and v > 0, "a number above 0, up to 2^32"),
    # Refused where they are true, in the table of combinations.
    "auto_cast": _Setting(False, lambda value: type(value) is bool, "true or false"),
    "fp16_master_weights_and_grads": _Setting(False, lambda value: type(value) is bool, "true or false"),
}


def complete(section: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The section with DeepSpeed's defaults; ``source`` is how messages name the file.

    Raises:
        ConfigError: a key is not known, or a value is none that it can have.
    """
    for key, value in section.items():
        if key not in _SETTINGS:
            hint = did_you_mean(key, _SETTINGS) or f"; it has {join_words(list(_SETTINGS))}"
            raise ConfigError(f"unknown key 'fp16.{key}' in {source}{hint}")
        if value != "auto" and not _SETTINGS[key].fits(value):
            raise ConfigError(
                f"fp16.{key} is {json.dumps(value)} in {source}, but must be {_SETTINGS[key].words}"
            )
    given = {key: value for key, value in section.items() if value != "auto"}
    whole = {key: setting.default for key, setting in _SETTINGS.items()} | given
    power, least = whole["initial_scale_power"], whole["min_loss_scale"]
    if not whole["loss_scale"] and 2**power < least:
        raise ConfigError(
            f"fp16.initial_scale_power is {power} in {source}, so that the first scale is {2**power}, but "
            f"fp16.min_loss_scale is {least}; raise the one or lower the other"
        )
    return whole


def loss_scaling(ds: Mapping[str, Any]) -> LossScaling:
    """What a reconciled DeepSpeed configuration of an fp16 run says."""
    section = ds["fp16"]
    fixed = float(section["loss_scale"])
    return LossScaling(
        initial=fixed or 2.0 ** section["initial_scale_power"],
        dynamic=not fixed,
        window=section["loss_scale_window"],
        hysteresis=section["hysteresis"],
        consecutive=section["consecutive_hysteresis"],
        least=min(float(section["min_loss_scale"]), fixed or LARGEST),
    )
