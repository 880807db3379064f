"""What tensor parallelism sends: exactly what the design says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.models.distilled import Distilled
from megatron_iiet.parallel import ParallelContext
from tests.distributed.harness import run_ranks

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class CollectivesOfTorch(TorchDispatchMode):
    """Counts what reaches torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        """Of the whole tensors, those that are gathered or scattered included."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            kind = KINDS[function._schema.name.removeprefix("c10d::")]
            self.counts[kind] += 1
            self.elements[kind] += max(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def settings(iterations: Any, sequence: bool, recompute: str = "off") -> dict[str, Any]:
    return {
        "model": {
            "hidden_size": 16,
            "ffn_hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 60,
            "max_position_embeddings": 8,
        },
        "solver": {"kind": "iiet", "iterations": iterations},
        "data": {"sequence_length": 8},
        "parallel": {"tensor": 2, "sequence": sequence},
        "training": {"recompute": recompute},
    }


def count_rank(data: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Collectives of one forward and of one backward pass."""
    config = config_from_dict(data)
    with ParallelContext.start(config.parallel) as context:
        model = Transformer(config, parallel=context.tensor_parallel)
        model.initialise(0)
        tokens = torch.arange(16).view(2, 8)
        passes = []
        for step in ("forward", "backward"):
            with CollectivesOfTorch() as torch_saw:
                if step == "forward":
                    loss = model(tokens, tokens)
                else:
                    loss.backward()
            if not config.parallel.sequence:  # every one is of the whole residual stream
                calls, elements = torch_saw.counts["all_reduce"], torch_saw.elements["all_reduce"]
                assert elements == calls * tokens.numel() * config.model.hidden_size
            passes.append(torch_saw.counts)
        return passes[0], passes[1]


def count_distillation_rank(data: dict[str, Any], teacher: dict[str, Any]) -> list[Counter[str]]:
    """Collectives of one forward and one backward pass of a student beside its teacher."""
    config = config_from_dict(data)
    with ParallelContext.start(config.parallel) as context:
        models = [Transformer(config_from_dict(d), parallel=context.tensor_parallel) for d in (data, teacher)]
        for model in models:
            model.initialise(0)
        pair, passes = Distilled(*models), []
        tokens = torch.arange(16).view(2, 8)
        with CollectivesOfTorch() as torch_saw:
            loss = pair(tokens, tokens)
            passes.append(Counter(torch_saw.counts))
            torch_saw.counts.clear()
            loss.backward()
        return [*passes, torch_saw.counts]


@pytest.mark.slow
def test_a_teacher_costs_its_forward_pass_only() -> None:
    """Two all-reduces an evaluation of either model and one an embedding; one all-gather for both heads
    a chunk of tokens, of which there are two."""
    student, teacher = settings([2, 0, 1], sequence=False), settings(3, sequence=False)
    forward, backward = run_ranks(count_distillation_rank, 2, student, teacher)[0]
    assert forward == {"all_reduce": 2 * (6 + 12) + 2, "all_gather": 2}
    assert backward == {"all_reduce": 2 * 6 + 1}


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 1, 3, [2, 0, 1]])
def test_two_all_reduces_an_evaluation_each_way(iterations: Any) -> None:
    """Outside the layers: the embedding's sum forward, the head's input backward, three numbers a token of
    either chunk."""
    evaluations = 3 * (iterations + 1) if isinstance(iterations, int) else sum(iterations) + 3
    forward, backward = run_ranks(count_rank, 2, settings(iterations, sequence=False))[0]
    assert forward == {"all_reduce": 2 * evaluations + 1, "all_gather": 2}
    assert backward == {"all_reduce": 2 * evaluations + 1}


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 3])
def test_sequence_parallelism_gathers_and_scatters_instead(iterations: int) -> None:
    """And once a backward pass sums the gradient of each replicated parameter: norms and coefficients."""
    evaluations = 3 * (iterations + 1)
    forward, backward = run_ranks(count_rank, 2, settings(iterations, sequence=True))[0]
    pairs = 2 * evaluations
    assert forward == {"all_gather": pairs + 3, "reduce_scatter": pairs + 1}
    replicated = 3 * 3 + 1  # two norms and a row of coefficients a layer, the final norm
    assert backward == {"all_gather": pairs + 1, "reduce_scatter": pairs + 1, "all_reduce": replicated}


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "repeated"), [("evaluation", 6), ("layer", 2 * 6)])
def test_recomputation_repeats_the_forward_collectives(recompute: str, repeated: int) -> None:
    """Of a recomputed F only what the backward pass needs runs again: not its last sum, unless a merge that
    is recomputed with it reads the result."""
    off = run_ranks(count_rank, 2, settings(1, sequence=False))[0][1]
    on = run_ranks(count_rank, 2, settings(1, sequence=False, recompute=recompute))[0][1]
    assert on["all_reduce"] - off["all_reduce"] == repeated
