"""Hugging Face folders (``config.json``, safetensors) as files: names, shapes and fields; no transformers."""

from megatron_iiet.storage.hugging_face.llama import import_llama, tokenizer_files

__all__ = ["import_llama", "tokenizer_files"]
