"""Models: decoder layers, the solvers that integrate them, and the Transformer they make."""

from megatron_iiet.models.portable import load, save
from megatron_iiet.models.transformer import Transformer

__all__ = ["Transformer", "load", "save"]
