"""Kernels with a fixed contract and interchangeable backends."""

from megatron_iiet.ops.merge_norm import MergeNorm, merge_norm, resolve_backend

__all__ = ["MergeNorm", "merge_norm", "resolve_backend"]
