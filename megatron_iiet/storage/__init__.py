"""Models on disk: checkpoints, portable and Hugging Face folders, and one way to open them all."""

from megatron_iiet.storage.portable import load, save
from megatron_iiet.storage.source import Source, open_model

__all__ = ["Source", "load", "open_model", "save"]
