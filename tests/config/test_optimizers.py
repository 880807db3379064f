"""What an optimizer declares, and what follows for a section with several kinds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, RunConfig, config_from_dict
from megatron_iiet.config.deepspeed import reconcile
from megatron_iiet.config.kind_section import Setting, settle
from megatron_iiet.config.kinds import own_keys
from megatron_iiet.config.optimizers import OPTIMIZERS, AdamW, Muon


def settled(*settings: tuple[str, Any, str]) -> Any:
    return settle(
        OPTIMIZERS, [Setting(f"optimizer.{name}", value, f"in {s}", s) for name, value, s in settings]
    )


def test_each_has_a_module() -> None:
    for declared in OPTIMIZERS:
        assert callable(import_module(f"megatron_iiet.training.optimizers.{declared().kind}").prepare)


def test_the_kind_decides_which_keys_there_are() -> None:
    declared, settings, _ = settled(("kind", "muon", "a"), ("momentum", 0.5, "a"), ("lr", 1.0, "a"))
    assert declared is Muon
    assert [setting.key for setting in settings] == ["optimizer.momentum", "optimizer.lr"]
    assert settled(("lr", 1.0, "a"))[0] is AdamW
    assert own_keys(Muon).keys() - own_keys(AdamW).keys() == {
        *("momentum", "newton_schulz_steps", "adjust_lr", "matrix_lr_ratio")
    }


def test_a_key_of_another_kind() -> None:
    message = (
        r"optimizer\.momentum is 0\.8 in a, but the optimizer is of kind adamw, which has no such key; leave "
        "it out, or take an optimizer of kind muon"
    )
    with pytest.raises(ConfigError, match=message):
        settled(("kind", "adamw", "a"), ("momentum", 0.8, "a"))
    *_, notes = settled(("momentum", 0.8, "base"), ("kind", "adamw", "a"))
    assert notes == ["without effect for kind adamw: optimizer.momentum"]
    with pytest.raises(ConfigError, match=r"'adamv'.*must be 'adamw' or 'muon'; did you mean 'adamw'"):
        config_from_dict({"optimizer": {"kind": "adamv"}})


def test_a_section_of_deepspeeds_for_one_that_it_does_not_have() -> None:
    config = RunConfig(optimizer=Muon())
    ds: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    with pytest.raises(ConfigError, match=r"^ds\.json has an 'optimizer' section, but DeepSpeed has no "):
        reconcile(ds, config, 1, "ds.json")
    del ds["optimizer"]
    assert reconcile(ds, config, 1, "ds.json")["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in reconcile({**ds, "optimizer": {}}, RunConfig(), 1)


def test_deepspeeds_adamw_by_one_key() -> None:
    ds: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    config = RunConfig(optimizer=AdamW(implementation="deepspeed"))
    assert reconcile(ds, config, 1) == reconcile({**ds, "optimizer": {"type": "AdamW"}}, RunConfig(), 1)
