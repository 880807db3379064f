"""Every example configuration loads, validates, and agrees with every DeepSpeed example it can run under."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iiet.config import config_from_file
from megatron_iiet.config.deepspeed import load_ds_config, reconcile, zero_stage

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_example_is_valid(path: Path) -> None:
    config = config_from_file(path)
    for ds_path in sorted(EXAMPLES.glob("ds_configs/*.json")):
        ds_json = load_ds_config(ds_path)
        if zero_stage(ds_json) == 0 and config.training.precision == "bf16":
            continue  # refused on purpose
        reconciled = reconcile(ds_json, config, data_parallel_size=2)
        assert reconciled["train_batch_size"] == config.training.global_batch_size
        assert "auto" not in str(reconciled)
