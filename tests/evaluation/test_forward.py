"""What a stage of a model without its training expects of the one before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet.data.loader.inputs import Inputs
from megatron_iiet.evaluation import forward
from megatron_iiet.evaluation.forward import ForwardModel
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import TensorParallel
from tests.tiny import tiny_config
from tests.training.bare_run import alone


@pytest.mark.parametrize(("sequence", "length"), [(False, 16), (True, 8)])
def test_a_stage_receives_its_part_of_the_sequences(
    sequence: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream and two entries of 3 sequences of 16 tokens, 32 wide, from the stage before."""
    received: list[tuple[int, ...]] = []

    def recv(packed: torch.Tensor, source: int, group: str) -> None:
        received.append((source, *packed.shape))

    monkeypatch.setattr(forward, "dist", SimpleNamespace(recv=recv))
    tensor, pipeline = Group((2, 3), 0, "nobody"), Group((0, 2), 1, "is met")
    told = SimpleNamespace(
        context=replace(
            alone(4), tensor=tensor, pipeline=pipeline, tensor_parallel=TensorParallel(tensor, sequence)
        ),
        config=tiny_config({}, Path("run")),
        dtype=torch.float32,
        _stage=SimpleNamespace(entries_received=[0, 1]),
    )
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    ForwardModel._receive(cast(Any, told), Inputs(tokens, tokens, None, 1.0))
    assert received == [(0, 3, 3, length, 32)]
