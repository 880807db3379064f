"""Distillation's losses are those of plain torch on whole logits.

Under tensor and sequence parallelism they are compared in tests/distributed/test_distillation.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_iiet.parallel import TensorParallel
from megatron_iiet.parallel.distillation_loss import hidden_mse, prediction_loss
from megatron_iiet.parallel.vocabulary import IGNORED

B, T, D, VOCABULARY, PADDED = 2, 13, 24, 90, 96


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student's states and head, teacher's, and targets of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (PADDED, D), (B, T, D), (PADDED, D))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    targets = torch.randint(VOCABULARY, (B, T), generator=generator)
    targets[0, 3:5] = IGNORED
    return (*(x.requires_grad_() for x in tensors), targets)  # type: ignore[return-value]


def plain(inputs: tuple[Tensor, ...], kl_weight: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    student, weight, teacher, teacher_weight, targets = inputs
    counts = targets != IGNORED
    mine = (student.float() @ weight.float().t())[..., :VOCABULARY][counts]
    taught = (teacher.float() @ teacher_weight.float().t())[..., :VOCABULARY][counts].detach()
    ce = F.cross_entropy(mine, targets[counts], reduction="sum")
    logs = [(z / temperature).log_softmax(-1) for z in (mine, taught)]
    kl = F.kl_div(*logs, reduction="sum", log_target=True) * temperature**2
    return ce + kl_weight * kl, ce, kl


def ours(
    inputs: tuple[Tensor, ...], kl_weight: float, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return prediction_loss(
        *inputs,
        vocab_size=VOCABULARY,
        kl_weight=kl_weight,
        temperature=temperature,
        parallel=TensorParallel(),
        chunk_tokens=chunk,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients(temperature: float, kl_weight: float, chunk: int, dtype: torch.dtype) -> None:
    found, wanted = drawn(dtype), drawn(dtype)
    results = ours(found, kl_weight, temperature, chunk), plain(wanted, kl_weight, temperature)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == torch.float32
        assert mine.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert [x.requires_grad for x in results[0]] == [True, False, False]
    for total, *_ in results:
        (total * 0.3).backward()
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == dtype
        assert (mine.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()
    assert all(x.grad is None for x in found[2:4])
    assert (found[1].grad[VOCABULARY:] == 0).all()  # type: ignore[index]
    assert (found[0].grad[0, 3:5] == 0).all()  # type: ignore[index]


def test_a_student_near_its_teacher() -> None:
    """The divergence is a small difference of large numbers; its rounding is not larger than theirs."""
    student, weight, _, _, targets = drawn()
    near = student.detach() + 1e-3 * torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
    inputs = student, weight, near, weight.detach(), targets
    exact = plain(tuple(x.double() if x.is_floating_point() else x for x in inputs), 1.0, 1.0)[2].item()
    assert ours(inputs, 1.0, 1.0, 5)[2].item() == pytest.approx(exact, abs=2e-6 * B * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_mse(dtype: torch.dtype) -> None:
    student, _, teacher, _, targets = drawn(dtype)
    counts = targets != IGNORED
    value = hidden_mse(student, teacher, counts, TensorParallel())
    (value * 3).backward()
    again = student.detach().float().requires_grad_()
    wanted = ((again - teacher.detach().float()).square().mean(-1) * counts).sum()
    (wanted * 3).backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert teacher.grad is None
    assert again.grad is not None
    assert student.grad is not None
    assert (student.grad - again.grad).norm() <= (
        1e-6 if dtype == torch.float32 else 4e-3
    ) * again.grad.norm()
