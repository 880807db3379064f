"""Runs of which a rank stands still: which one is named, and all end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import LoadedConfig, config_from_dict
from megatron_iiet.training.pretrain import pretrain
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json
from tests.marks import long_but
from tests.tiny import make_data, tiny_config

pytestmark = pytest.mark.slow


def pretrain_watched(config: dict[str, Any], ds_path: Path) -> int:
    return pretrain(LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path))


@pytest.mark.parametrize("rank", long_but([0, 1], 0))
def test_a_stopped_rank_is_named_and_its_run_ends(rank: int, tmp_path: Path) -> None:
    run, bound = tmp_path / "run", 8.0
    config = tiny_config(
        make_data(tmp_path),
        run,
        training={"steps": 1000},
        debug={"inject": [f"stop@step=4,rank={rank}"]},
        parallel={"timeouts": {"step": bound}},
    )
    with pytest.raises(RanksFailedError, match="died without a word"):
        run_ranks(pretrain_watched, 2, as_data(config), ds_json(tmp_path, 1), timeout=120.0)
    written = list((run / "hangs").glob("step_*_of_process_*/rank_*.txt"))
    assert [path.name for path in written] == [f"rank_{1 - rank:05d}.txt"]
    text = written[0].read_text()
    named = rf"rank {rank} \(process \d+ on \S+\) gave no sign of life for \d+ s"
    assert re.match(named, text), text.splitlines()[0]
    assert re.search(r"in state T, ", text)
    assert "gloo:" in text
    assert "in train" in text
