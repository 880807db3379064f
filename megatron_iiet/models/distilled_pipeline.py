"""One pipeline stage of a student and its teacher, side by side.

Two tensors go to the next stage: the student's packed stream, which gets a gradient back, and the teacher's,
whose bits travel as integers, so that no gradient is expected of it.

The squared differences of a stage's layers don't travel. What a loss is multiplied by on its way through the
pipeline is known beforehand, so their gradient joins that of the stream where they arise: one message each
way, and one walk through the stage's graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron_iiet.models.distilled import Distilled, LossParts, Streams
from megatron_iiet.models.pipeline import PipelineStage
from megatron_iiet.models.transformer import Transformer


class Prediction(NamedTuple):
    """What the last stage makes its loss of."""

    streams: Streams
    hidden_mse: Tensor


class DistilledStage(nn.Module):
    """As :class:`PipelineStage`, in training mode with the teacher."""

    def __init__(
        self, student: PipelineStage, teacher: Transformer, meta_teacher: Transformer, accumulation: int
    ) -> None:
        """``accumulation``: micro-batches a step, over which the loss is averaged."""
        super().__init__()
        self.student = student
        self.teacher = PipelineStage(teacher, student.sequence_length)
        self.teacher.resize(meta_teacher)
        self.pair = Distilled(student.model, teacher)
        self.accumulation = accumulation

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
        weight = self.pair.weights.alpha / self.accumulation
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
    def forward(ctx: Any, stream: Tensor, term: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(term)
        ctx.weight = weight
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (term,) = ctx.saved_tensors
        return gradient, torch.full_like(term, ctx.weight), None
