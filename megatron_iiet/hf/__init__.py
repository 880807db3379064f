"""The Hugging Face side: our models for transformers, exports and text from them.

Nothing here imports the training stack, and importing this package does not import transformers.
"""

__all__ = ["register"]


def register() -> None:
    """Let transformers' Auto classes load ``model_type`` 'iiet' without ``trust_remote_code``."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM, IIETModel

    AutoConfig.register("iiet", IIETConfig, exist_ok=True)
    AutoModel.register(IIETConfig, IIETModel, exist_ok=True)
    AutoModelForCausalLM.register(IIETConfig, IIETForCausalLM, exist_ok=True)
