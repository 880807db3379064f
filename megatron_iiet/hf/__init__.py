"""The Hugging Face side: reading the ecosystem's checkpoints. Nothing here imports the training stack."""

from megatron_iiet.hf.llama import import_llama, tokenizer_files

__all__ = ["import_llama", "tokenizer_files"]
