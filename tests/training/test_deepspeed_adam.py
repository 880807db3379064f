"""DeepSpeed's own AdamW, which counts its steps in an int and is compiled at first use."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config


@pytest.mark.long  # a minute, which is the compiler's
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Early enough for the bias correction of the moments, which is by the count, to matter."""
    data = make_data(tmp_path)
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    ds_path = ds_json(tmp_path, 1, zero_optimization=zero, optimizer={"type": "AdamW"})
    for name, stops in (("whole", (None,)), ("parts", (3, None))):
        for stop in stops:
            config = tiny_config(data, tmp_path / name, training={"steps": 6, "stop_after": stop})
            run_ranks(pretrain_rank, 1, as_data(config), ds_path, timeout=400.0)
    whole, parts = (
        {step: values["loss"].hex() for step, values in read_log(tmp_path / name).items() if step}
        for name in ("whole", "parts")
    )
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert parts == whole
