"""training.compile: the same training, of one graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_iiet.config import ConfigError
from megatron_iiet.training.compiling import FOLDER, prepare_compiling
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config

LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # ranks, ZeRO stage, sections
    "alone, in two stages": (1, 1, {"solver": {"iterations": 2, "schedule": [[0.5, 0], [0.5, 2]]}}),
    "ZeRO-2": (2, 2, {}),
    "tensor and sequence": (2, 1, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline": (2, 1, {"parallel": {"pipeline": 2}}),
    "recomputed": (1, 1, {"training": {"recompute": "evaluation"}}),
    "keys of the first": (1, 1, {"solver": {"key_values": "first"}}),
}


NOTHING = {"graphs": 0, "breaks": 0, "found": 0}


def trained(config: dict[str, Any], path: Path) -> dict[str, int]:
    """What was compiled for a run."""
    torch.compiler.reset()
    counters.clear()
    pretrain_rank(config, path)
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "found": counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", long_but(LAYOUTS, "alone, in two stages"))
def test_it_trains_as_without(layout: str, tmp_path: Path) -> None:
    """And a restart finds what was compiled."""
    ranks, stage, sections = LAYOUTS[layout]
    data, path = make_data(tmp_path), ds_json(tmp_path, stage)

    def compiled(run: str, stop_after: int) -> list[dict[str, int]]:
        training = {"steps": 6, "stop_after": stop_after, "compile": run} | sections.get("training", {})
        config = tiny_config(data, tmp_path / run, **(sections | {"training": training}))
        return run_ranks(trained, ranks, as_data(config), path)

    assert compiled("off", 6) == [NOTHING] * ranks
    for stop_after in (4, 6):
        for each in compiled("layer", stop_after):
            assert each["graphs"] >= 1
            if "tensor" not in layout:  # collectives lie within F
                assert each["breaks"] == 0
                assert each["graphs"] <= (4 if "keys" in layout else 2), "with gradients and without"
            assert each["found"] >= each["graphs"] or stop_after == 4
    losses = {}
    for run in ("off", "layer"):
        log = (tmp_path / run / "log.jsonl").read_text().splitlines()
        losses[run] = [each["loss"] for each in map(json.loads, log) if "loss" in each]
    assert len(losses["layer"]) == 6
    assert losses["layer"] == pytest.approx(losses["off"], rel=1e-5)
    assert (tmp_path / "layer" / FOLDER).is_dir()
    assert not (tmp_path / "off" / FOLDER).exists()


def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = tiny_config(make_data(tmp_path), tmp_path / "run", training={"compile": "layer"})
    with pytest.raises(ConfigError, match="there is no C\\+\\+ compiler 'no-such-compiler'"):
        prepare_compiling(config, torch.device("cpu"))
