"""DeepSpeed's own AdamW, which counts its steps in an int and is compiled at first use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import ConfigError
from megatron_iiet.training.engine.deepspeed_internals import check_own_adam
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config

ON_CPU = {"offload_optimizer": {"device": "cpu"}}
CPU_ADAM, FUSED = "DeepSpeedCPUAdam", "FusedAdam"


def losses(folder: Path) -> list[float]:
    return [values["loss"] for step, values in read_log(folder).items() if step]


@pytest.mark.long  # a minute, which is the compiler's
@pytest.mark.parametrize("zero", [{}, ON_CPU], ids=[FUSED, CPU_ADAM])
def test_resumed_equals_uninterrupted(zero: dict[str, Any], tmp_path: Path) -> None:
    """Early enough for the bias correction of the moments, which is by the count, to matter."""
    data = make_data(tmp_path)
    ds_path = ds_json(tmp_path, 1, zero_optimization={"stage": 1} | zero, optimizer={"type": "AdamW"})
    for name, stops in (("whole", (None,)), ("parts", (3, None))):
        for stop in stops:
            config = tiny_config(data, tmp_path / name, training={"steps": 6, "stop_after": stop})
            run_ranks(pretrain_rank, 1, as_data(config), ds_path, timeout=400.0)
    whole, parts = (losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == 6
    assert parts == whole


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "zero", "name", "precision"),
    [
        *((0, {}, FUSED, "fp32"), (1, {}, FUSED, "bf16"), (2, {}, FUSED, "fp32"), (3, {}, FUSED, "fp32")),
        *((1, ON_CPU, CPU_ADAM, "fp32"), (3, ON_CPU, CPU_ADAM, "bf16")),
    ],
)
def test_its_steps_are_torchs(
    stage: int,
    zero: dict[str, Any],
    name: str,
    precision: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Both step fp32 masters by one formula. What is left is rounding, which bf16 weights make larger."""
    data = make_data(tmp_path)
    ds_path = ds_json(tmp_path, stage, zero_optimization={"stage": stage} | zero)
    for implementation in ("torch", "deepspeed"):
        config = tiny_config(
            data,
            tmp_path / implementation,
            training={"steps": 6, "precision": precision},
            optimizer={"implementation": implementation, "weight_decay": 0.1},
        )
        run_ranks(pretrain_rank, 1, as_data(config), ds_path, timeout=400.0)
    assert f".{name}" in capfd.readouterr().out
    found, wanted = losses(tmp_path / "deepspeed"), losses(tmp_path / "torch")
    assert found[0] == wanted[0]
    assert wanted[-1] < wanted[0]
    assert found == pytest.approx(wanted, rel=1e-6 if precision == "fp32" else 1e-4)


@pytest.mark.parametrize("offloaded", [False, True])
def test_where_it_cannot_be_compiled(
    offloaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither without a compiler nor, where one was killed, without the end of it."""
    ds: dict[str, Any] = {"optimizer": {"type": "AdamW"}, "zero_optimization": ON_CPU if offloaded else {}}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / ("cpu_adam" if offloaded else "fused_adam") / "lock"
    lock.parent.mkdir()
    lock.touch()
    with pytest.raises(ConfigError) as refusal:
        check_own_adam(ds)
    name = "CPU Adam" if offloaded else "FusedAdam"
    assert str(refusal.value).startswith(
        f"DeepSpeed's {name}, which optimizer.implementation 'deepspeed' or "
    )
    assert "ninja" in str(refusal.value)
    assert str(refusal.value).count("\n") == 0
    said = f"waiting for the compiler that {lock} belongs to; if none runs, remove the file"
    assert said in capsys.readouterr().out.splitlines()
    assert os.listdir(lock.parent) == ["lock"]
    check_own_adam({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    check_own_adam({})
