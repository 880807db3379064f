"""Distillation's losses over tensor-parallel ranks: values, gradients and collectives against plain torch.

Shapes: B batch, T sequence, S a rank's part of it, D hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel import ParallelContext, TensorParallel
from megatron_iiet.parallel.distillation_loss import hidden_mse, prediction_loss
from megatron_iiet.parallel.head_loss import head_cross_entropy
from megatron_iiet.parallel.vocabulary import IGNORED
from tests.distributed.harness import run_ranks
from tests.distributed.test_collectives import CollectivesOfTorch

B, T, STUDENT_D, TEACHER_D = 2, 12, 24, 16
VOCABULARY, PADDED = 70, 96  # on 4 ranks of 24 rows the third is padded in part, the last holds padding only
KL_WEIGHT, UPSTREAM = 0.7, 0.3


@dataclass(frozen=True)
class Setting:
    """One call of the losses."""

    sequence: bool
    temperature: float = 1.0
    chunk: int = 5
    """Tokens; of the 24 tokens the last chunk of 5 has 4."""
    dtype: torch.dtype = torch.float32


SETTINGS = [
    Setting(sequence, temperature, chunk)
    for sequence in (False, True)
    for temperature in (1.0, 2.0)
    for chunk in (1, 5, 1000)
]
BF16 = [Setting(sequence, 2.0, dtype=torch.bfloat16) for sequence in (False, True)]


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole inputs, the same on every rank: states, heads and targets."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "student": normal(B, T, STUDENT_D).to(dtype),
        "weight": 0.5 * normal(PADDED, STUDENT_D).to(dtype),
        "teacher": normal(B, T, TEACHER_D).to(dtype),
        "teacher_weight": 0.5 * normal(PADDED, TEACHER_D).to(dtype),
        "other": normal(B, T, STUDENT_D).to(dtype),  # states to compare with the student's
        "targets": torch.randint(VOCABULARY, (B, T), generator=generator),
    }
    inputs["targets"][0, 3:5] = IGNORED
    inputs["targets"][1, 0] = IGNORED
    inputs["targets"][1, -1] = VOCABULARY - 1  # the last column that is no padding
    return inputs


def plain(setting: Setting) -> dict[str, Tensor]:
    """In fp32, by autograd through whole logits."""
    inputs = {
        key: value.float() if value.is_floating_point() else value
        for key, value in drawn(setting.dtype).items()
    }
    student, weight = inputs["student"].requires_grad_(), inputs["weight"].requires_grad_()
    counts = inputs["targets"] != IGNORED
    mine = (student @ weight.t())[..., :VOCABULARY]
    taught = (inputs["teacher"] @ inputs["teacher_weight"].t())[..., :VOCABULARY]
    ce = F.cross_entropy(mine[counts], inputs["targets"][counts], reduction="sum")
    of_mine, of_taught = ((logits[counts] / setting.temperature).log_softmax(-1) for logits in (mine, taught))
    kl = F.kl_div(of_mine, of_taught, reduction="sum", log_target=True) * setting.temperature**2
    total = ce + KL_WEIGHT * kl
    squares = ((student - inputs["other"]).square().mean(-1) * counts).sum()
    gradients = torch.autograd.grad(UPSTREAM * total, (student, weight), retain_graph=True)
    of_ce = torch.autograd.grad(UPSTREAM * ce, (student, weight))
    (of_states,) = torch.autograd.grad(UPSTREAM * squares, student)
    results = {"total": total, "ce": ce, "kl": kl, "mse": squares, "ce alone": ce}
    results |= {"for student": gradients[0], "for weight": gradients[1], "for states": of_states}
    results |= {"for student, ce alone": of_ce[0], "for weight, ce alone": of_ce[1]}
    return {key: value.detach() for key, value in results.items()}


def losses_of_rank(
    size: int, settings: list[Setting]
) -> list[tuple[dict[str, Tensor], dict[str, Counter[str]]]]:
    """This rank's values, gradients and collectives for each setting."""
    with ParallelContext.start(ParallelConfig(tensor=size)) as context:
        return [ours(setting, TensorParallel(context.tensor, setting.sequence)) for setting in settings]


def ours(setting: Setting, parallel: TensorParallel) -> tuple[dict[str, Tensor], dict[str, Counter[str]]]:
    group, inputs = parallel.group, drawn(setting.dtype)

    def part(key: str, dim: int) -> Tensor:
        return inputs[key].chunk(group.size, dim)[group.rank].clone()

    def states(key: str) -> Tensor:
        return part(key, 1) if parallel.cuts_sequence else inputs[key]

    student, weight = states("student").requires_grad_(), part("weight", 0).requires_grad_()
    teacher, teacher_weight = states("teacher").requires_grad_(), part("teacher_weight", 0).requires_grad_()
    other = states("other").requires_grad_()
    sent: dict[str, Counter[str]] = {}
    with CollectivesOfTorch() as seen:

        def note(name: str) -> None:
            sent[name] = Counter(seen.counts)
            sent[f"{name} elements"] = Counter(seen.elements)
            seen.counts.clear()
            seen.elements.clear()

        loss = prediction_loss(
            student,
            weight,
            teacher,
            teacher_weight,
            inputs["targets"],
            vocab_size=VOCABULARY,
            kl_weight=KL_WEIGHT,
            temperature=setting.temperature,
            parallel=parallel,
            chunk_tokens=setting.chunk,
        )
        note("forward")
        leaves = student, weight, teacher, teacher_weight
        gradients = torch.autograd.grad(UPSTREAM * loss.total, leaves, allow_unused=True)
        note("backward")
        alone = head_cross_entropy(
            student,
            weight,
            inputs["targets"],
            vocab_size=VOCABULARY,
            parallel=parallel,
            chunk_tokens=setting.chunk,
        )
        note("ce forward")
        of_ce = torch.autograd.grad(UPSTREAM * alone, leaves[:2])
        note("ce backward")
        squares = hidden_mse(student, other, inputs["targets"] != IGNORED, parallel)
        note("mse forward")
        of_states = torch.autograd.grad(UPSTREAM * squares, (student, other), allow_unused=True)
        note("mse backward")
    assert gradients[2:] == (None, None), "the teacher got a gradient"
    assert of_states[1] is None, "the teacher got a gradient"
    results = {"total": loss.total, "ce": loss.cross_entropy, "kl": loss.kl_divergence, "mse": squares}
    results |= {"for student": gradients[0], "for weight": gradients[1], "for states": of_states[0]}
    results |= {"ce alone": alone, "for student, ce alone": of_ce[0], "for weight, ce alone": of_ce[1]}
    return {key: value.detach() for key, value in results.items()}, sent


def compare(size: int, settings: list[Setting], tolerance: float) -> None:
    """Against the whole: this rank's rows of the head, and its part of the sequence."""
    ranks = run_ranks(losses_of_rank, size, size, settings)
    for setting, *found in zip(settings, *ranks, strict=True):
        ignored = drawn(setting.dtype)["targets"] == IGNORED
        for key, whole in plain(setting).items():
            values = [results[key] for results, _ in found]
            if not key.startswith("for "):
                assert all(value.dtype == torch.float32 for value in values)
                assert all(torch.equal(value, values[0]) for value in values), f"{key} differs between ranks"
            else:
                assert all(value.dtype == setting.dtype for value in values)
            of_weight = key.startswith("for weight")
            if of_weight:
                values = [torch.cat(values)]
            elif key.startswith("for ") and setting.sequence:
                values = [torch.cat(values, dim=1)]
            for value in values:
                error = ((value.float() - whole).norm() / whole.norm()).item()
                assert error <= tolerance, f"{key}, {setting}: {error:.1e}"
                if of_weight:
                    assert not value[VOCABULARY:].any()
                elif key.startswith("for "):
                    assert not value[ignored].any()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_losses_are_those_of_whole_logits(size: int) -> None:
    """On 4 ranks one holds nothing but padding."""
    compare(size, SETTINGS, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_bf16_is_close_to_fp32(size: int) -> None:
    compare(size, BF16, 1e-2)


@pytest.mark.slow
def test_collectives() -> None:
    """An all-gather of seven numbers a token for each chunk, three without a teacher, and of states what
    entering a block costs."""
    chunks = {1: 24, 5: 5, 1000: 1}
    settings = [Setting(sequence, chunk=chunk) for sequence in (False, True) for chunk in chunks]
    for rank in run_ranks(losses_of_rank, 2, 2, settings):
        for setting, (_, sent) in zip(settings, rank, strict=True):
            numbers, states = 2 * 7 * B * T, B * T * STUDENT_D
            alone = {"all_gather": 2 * 3 * B * T + states * setting.sequence}
            assert sent["ce forward"] == {"all_gather": chunks[setting.chunk] + setting.sequence}
            assert sent["ce forward elements"] == alone
            assert sent["ce backward elements"] == sent["backward elements"]
            if setting.sequence:
                assert sent["forward"] == {"all_gather": chunks[setting.chunk] + 2}  # and both models' states
                assert sent["forward elements"] == {"all_gather": numbers + states + B * T * TEACHER_D}
                assert sent["backward"] == {"reduce_scatter": 1}
                assert sent["backward elements"] == {"reduce_scatter": states}
                assert sent["mse forward elements"] == {"all_reduce": 1}
            else:
                assert sent["forward"] == {"all_gather": chunks[setting.chunk]}
                assert sent["forward elements"] == {"all_gather": numbers}
                assert sent["backward"] == {"all_reduce": 1}
                assert sent["backward elements"] == {"all_reduce": states}
                assert not sent["mse forward"]
            assert not sent["mse backward"]
