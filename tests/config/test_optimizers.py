"""What an optimizer declares, and what follows for a section with several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, RunConfig, config_from_dict
from megatron_iiet.config.changes import Change, key
from megatron_iiet.config.deepspeed import reconcile
from megatron_iiet.config.kind_section import Setting, settle
from megatron_iiet.config.kinds import Kinds, name_of_kind, own_keys
from megatron_iiet.config.optimizers import OPTIMIZERS, AdamW, OptimizerConfig


@dataclass
class Momentum(OptimizerConfig):
    """One that there is not."""

    kind: str = name_of_kind("momentum")
    momentum: float = key(0.9, Change.COURSE)
    """Decay of the velocity."""


BOTH = Kinds("optimizer", "an optimizer", (AdamW, Momentum), default=AdamW)


def settled(*settings: tuple[str, Any, str]) -> Any:
    return settle(BOTH, [Setting(f"optimizer.{name}", value, f"in {s}", s) for name, value, s in settings])


def test_each_has_a_module() -> None:
    for declared in OPTIMIZERS:
        assert callable(import_module(f"megatron_iiet.training.optimizers.{declared().kind}").prepare)


def test_the_kind_decides_which_keys_there_are() -> None:
    declared, settings, _ = settled(("kind", "momentum", "a"), ("momentum", 0.5, "a"), ("lr", 1.0, "a"))
    assert declared is Momentum
    assert [setting.key for setting in settings] == ["optimizer.momentum", "optimizer.lr"]
    assert settled(("lr", 1.0, "a"))[0] is AdamW
    assert own_keys(Momentum).keys() - own_keys(OptimizerConfig).keys() == {"momentum"}


def test_a_key_of_another_kind() -> None:
    message = (
        r"optimizer\.beta1 is 0\.8 in a, but the optimizer is of kind momentum, which has no such key; leave "
        "it out, or take an optimizer of kind adamw"
    )
    with pytest.raises(ConfigError, match=message):
        settled(("kind", "momentum", "a"), ("beta1", 0.8, "a"))
    *_, notes = settled(("beta1", 0.8, "base"), ("kind", "momentum", "a"))
    assert notes == ["without effect for kind momentum: optimizer.beta1"]
    with pytest.raises(ConfigError, match=r"'adamv'.*must be 'adamw'; did you mean 'adamw'"):
        config_from_dict({"optimizer": {"kind": "adamv"}})


def test_a_section_of_deepspeeds_for_one_that_it_does_not_have() -> None:
    config = RunConfig(optimizer=Momentum())
    ds: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    with pytest.raises(ConfigError, match=r"^ds\.json has an 'optimizer' section, but DeepSpeed has no "):
        reconcile(ds, config, 1, "ds.json")
    del ds["optimizer"]
    assert reconcile(ds, config, 1, "ds.json")["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in reconcile({**ds, "optimizer": {}}, RunConfig(), 1)
