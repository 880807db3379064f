"""Process grid. This version has one axis, data parallelism."""

from megatron_iiet.parallel.context import ParallelContext

__all__ = ["ParallelContext"]
