"""The Hugging Face side: our models for transformers, exports and text from them.

Nothing here imports the training stack, and importing this package does not import transformers.
"""

__all__ = ["register"]


def register() -> None:
    """Let transformers' Auto classes load ``model_type`` 'iiet' without ``trust_remote_code``."""
    import transformers

    from megatron_iiet.hf import modeling_iiet

    transformers.AutoConfig.register("iiet", modeling_iiet.IIETConfig, exist_ok=True)
    for auto, named in modeling_iiet.AUTO_MAP.items():
        model = getattr(modeling_iiet, named.rpartition(".")[2])
        if auto != "AutoConfig":
            getattr(transformers, auto).register(modeling_iiet.IIETConfig, model, exist_ok=True)
