"""Models on disk: checkpoints of any layout, portable folders, Hugging Face folders, and one way to open them
all. Knows nothing of training, and not transformers."""

from megatron_iiet.storage.portable import load, save
from megatron_iiet.storage.source import Source, open_model

__all__ = ["Source", "load", "open_model", "save"]
