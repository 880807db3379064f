"""Parameters that drift apart are found, and the rank that holds others is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_iiet.training.replicas import checksum
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4099])
def test_every_bit_counts(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype)
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    before = checksum(x).tolist()
    for element in {0, size // 2, size - 1}:
        for bit in range(8 * x.element_size() - 1):
            bits[element] ^= 1 << bit
            assert checksum(x).tolist() != before, (element, bit)
            bits[element] ^= 1 << bit
    assert checksum(x).tolist() == before


def test_neighbours_that_change_places_count() -> None:
    x = torch.arange(10.0)
    assert checksum(x).tolist() != checksum(x[[1, 0, *range(2, 10)]]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "grid"), [(0, {}), (1, {"tensor": 2})])
def test_a_weight_that_drifts_ends_the_run(stage: int, grid: dict[str, int], tmp_path: Path) -> None:
    config = tiny_config(
        make_data(tmp_path),
        tmp_path / "run",
        training={"steps": 6},
        guards={"replicas": 2},
        parallel=grid,
        debug={"inject": ["drift@step=3,rank=0"]},
    )
    expected = (
        r"after step 4 replicas have drifted apart: rank [01] on \S+ holds other values of \S+norm\.weight "
        r"than most of \[0, 1\]; after step 2 they were equal"
    )
    with pytest.raises(RanksFailedError, match=expected):
        run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, stage))
