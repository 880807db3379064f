"""The process grid, and what layers need to be spread over it."""

from megatron_iiet.parallel.context import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import TensorParallel

__all__ = ["Group", "ParallelContext", "Shard", "TensorParallel"]
