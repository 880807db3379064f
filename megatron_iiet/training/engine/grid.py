"""The process grid in the words DeepSpeed asks for."""

from __future__ import annotations

from typing import Any

from megatron_iiet.parallel import ParallelContext


class ModelParallelUnit:
    """The grid in the words DeepSpeed asks for."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def get_model_parallel_group(self) -> Any:
        return self._context.tensor.handle

    def get_model_parallel_rank(self) -> int:
        return self._context.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._context.tensor.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self._context.data.handle

    def get_data_parallel_rank(self) -> int:
        return self._context.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._context.data.size


def model_parallel_unit(context: ParallelContext) -> ModelParallelUnit | None:
    """What DeepSpeed's ``mpu`` arguments want; None where all ranks are replicas."""
    return ModelParallelUnit(context) if context.tensor.size > 1 else None
