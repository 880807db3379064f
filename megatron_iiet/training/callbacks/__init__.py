"""What happens around a step."""

from megatron_iiet.training.callbacks.base import Callback
from megatron_iiet.training.callbacks.checkpointing import Checkpointing
from megatron_iiet.training.callbacks.evaluation import SolverDiagnostics, Validation
from megatron_iiet.training.callbacks.guidance import Guidance
from megatron_iiet.training.callbacks.logging import MetricLogger
from megatron_iiet.training.callbacks.tasks import TaskEvaluation

__all__ = [
    "Callback",
    "Checkpointing",
    "Guidance",
    "MetricLogger",
    "SolverDiagnostics",
    "TaskEvaluation",
    "Validation",
]
