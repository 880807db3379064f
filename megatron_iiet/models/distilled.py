"""A student beside its teacher: both go through their layers in step, and are compared after each.

The loss is that of iteration influence-aware distillation (IIAD; IIET paper, section 4)::

    CE + alpha · MSE + beta · KL
    MSE   mean over layers, tokens and D of (teacher's layer output - student's)²
    KL    mean over tokens of KL(softmax(teacher's logits / t) || softmax(student's logits / t)) · t²

Tokens that are nobody's target count in none of them. No layer's outputs are kept for the comparison, and
neither model's logits are ever whole.

In a pipeline two tensors go to the next stage: the student's packed stream, which gets a gradient back, and
the teacher's, whose bits travel as integers, so that no gradient is expected of it. The squared differences
of a stage's layers don't travel: what a loss is multiplied by on its way through the pipeline is known
beforehand, so their gradient joins that of the stream where they arise. One message each way, one walk
through the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron_iiet.config import RunConfig
from megatron_iiet.config.schema import DistillationConfig
from megatron_iiet.models.history import History
from megatron_iiet.models.pipeline import PipelineStage
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel.distillation_loss import hidden_mse, prediction_loss
from megatron_iiet.parallel.vocabulary import IGNORED


class LossParts(NamedTuple):
    """The terms of the loss, fp32 scalars, unweighted."""

    cross_entropy: Tensor
    hidden_mse: Tensor
    kl_divergence: Tensor

    def total(self, weights: DistillationConfig) -> Tensor:
        """The loss."""
        return self.cross_entropy + weights.alpha * self.hidden_mse + weights.beta * self.kl_divergence


@dataclass
class Streams:
    """Where the student and the teacher are in a micro-batch: residual streams [B, T, D] and histories."""

    student: Tensor
    student_history: History
    teacher: Tensor
    teacher_history: History


def teacher_config(student: RunConfig, teacher: RunConfig) -> RunConfig:
    """The teacher as the student's run has it: its own solver, everything else the run's."""
    return replace(student, solver=teacher.solver)


class Distilled(nn.Module):
    """The student, in training mode with its teacher."""

    def __init__(self, student: Transformer, teacher: Transformer) -> None:
        """Both of the same shape and layout; the teacher's parameters get no gradient from here on."""
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.weights = student.config.distillation
        self.parts: list[LossParts] = []
        """Of the micro-batches since it was emptied, detached."""

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, with arguments as those of :meth:`Transformer.forward`: means over all targets; or, with
        a divisor, sums over those that are not IGNORED, divided by it. In evaluation mode the cross-entropy
        alone."""
        if not self.training:
            return cast(Tensor, self.student(tokens_BT, targets_BT, positions_BT, divisor))
        streams = self.embed(tokens_BT)
        mse = self.integrate(streams, targets_BT, positions_BT, divisor)
        return self.loss(streams, mse, targets_BT, divisor)

    def embed(self, tokens_BT: Tensor) -> Streams:
        """Both models' streams before their first layer."""
        with torch.no_grad():
            taught = self.teacher.embed(tokens_BT)
        return Streams(*self.student.embed(tokens_BT), *taught)

    def integrate(
        self,
        streams: Streams,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """Run the layers held here on both streams; these layers' part of the mean squared difference."""
        counts_BT = targets_BT != IGNORED
        layout = self.student.layout(targets_BT.shape[1], streams.student.dtype, positions_BT)
        taught = self.teacher.trajectory(streams.teacher, streams.teacher_history, layout)
        outputs = self.student.trajectory(streams.student, streams.student_history, layout)
        total = torch.zeros((), dtype=torch.float32, device=targets_BT.device)
        for student_BTD, teacher_BTD in zip(outputs, _without_gradient(taught), strict=True):
            total = total + hidden_mse(student_BTD, teacher_BTD, counts_BT, self.student.parallel)
            streams.student, streams.teacher = student_BTD, teacher_BTD
        layers = self.student.config.model.num_layers
        return total / (layers * (targets_BT.numel() if divisor is None else divisor))

    def loss(
        self, streams: Streams, mse: Tensor, targets_BT: Tensor, divisor: float | Tensor | None = None
    ) -> Tensor:
        """The loss from the final streams and the mean squared difference; notes its terms."""
        student, teacher = self.student, self.teacher
        assert student.norm is not None
        assert teacher.norm is not None
        count = targets_BT.numel() if divisor is None else divisor
        with torch.no_grad():
            taught_BTD = teacher.norm(streams.teacher)
        loss = prediction_loss(
            student.norm(streams.student),
            student.head_weight,
            taught_BTD,
            teacher.head_weight,
            targets_BT,
            vocab_size=student.config.model.vocab_size,
            kl_weight=self.weights.beta,
            temperature=self.weights.temperature,
            parallel=student.parallel,
            upstream=student.gradient_of_sum(count),
        )
        self.parts.append(LossParts(loss.cross_entropy / count, mse.detach(), loss.kl_divergence / count))
        return loss.total / count + self.weights.alpha * mse


def _without_gradient(outputs: Iterator[Tensor]) -> Iterator[Tensor]:
    while True:
        with torch.no_grad():  # around the step alone: a generator must not leave the mode changed
            output = next(outputs, None)
        if output is None:
            return
        yield output


class Prediction(NamedTuple):
    """What the last stage makes its loss of."""

    streams: Streams
    hidden_mse: Tensor


class DistilledStage(nn.Module):
    """As :class:`PipelineStage`, in training mode with the teacher beside it."""

    def __init__(self, student: PipelineStage, teacher: Transformer, meta_teacher: Transformer) -> None:
        super().__init__()
        self.student = student
        self.teacher = PipelineStage(teacher, student.sequence_length)
        self.teacher.resize(meta_teacher)
        self.pair = Distilled(student.model, teacher)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Prediction:
        """``x``: token ids in the first stage, both packed streams elsewhere."""
        for_student, for_teacher = (x, x) if isinstance(x, Tensor) else (x[0], x[1].view(x[0].dtype))
        with torch.no_grad():
            taught = self.teacher.unpack(for_teacher)
        streams = Streams(*self.student.unpack(for_student), *taught)
        mse = self.pair.integrate(streams, targets_BT, positions_BT, divisor)
        if self.student.model.is_last:
            return Prediction(streams, mse)
        zero = torch.zeros_like(mse)
        self.pair.parts.append(LossParts(zero, mse.detach(), zero))
        packed = self.student.pack(streams.student, streams.student_history)
        weight = self.pair.weights.alpha * self.student.model.loss_gradient
        with torch.no_grad():
            taught_packed = self.teacher.pack(streams.teacher, streams.teacher_history)
        return cast(Tensor, _JoinGradient.apply(packed, mse, weight)), taught_packed.view(torch.int32)

    def loss(
        self, prediction: Prediction, targets_BT: Tensor, divisor: float | Tensor | None = None
    ) -> Tensor:
        """The last stage's: the whole loss but for the squared differences of the other stages."""
        return self.pair.loss(prediction.streams, prediction.hidden_mse, targets_BT, divisor)


class _JoinGradient(torch.autograd.Function):
    """The stream as it is; in the backward pass a term of the loss gets its weight as gradient."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, term: Tensor, weight: float | Tensor) -> Tensor:
        ctx.save_for_backward(term)
        ctx.weight = weight
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (term,) = ctx.saved_tensors
        return gradient, torch.ones_like(term) * ctx.weight, None
