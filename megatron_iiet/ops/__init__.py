"""Kernels with a fixed contract and interchangeable backends."""

from megatron_iiet.ops.backends import chosen_backend, resolve_backend
from megatron_iiet.ops.merge_norm import MergeNorm, merge_norm
from megatron_iiet.ops.transposed import TransposedMerge

__all__ = ["MergeNorm", "TransposedMerge", "chosen_backend", "merge_norm", "resolve_backend"]
