"""A plugin that lets vLLM run models of model_type 'iiet', as megatron_iiet exports them (docs/vllm.md)."""

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes, any number of times.

    The configuration is this package's own ``IIETConfig``, not the folder's, so that ``trust_remote_code`` is
    not needed and no code of the folder runs.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_iiet.checks import Checks
    from vllm_iiet.modeling_iiet import IIETConfig

    AutoConfig.register("iiet", IIETConfig, exist_ok=True)
    if "IIETForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("IIETForCausalLM", "vllm_iiet.model:IIETForCausalLM")
    MODELS_CONFIG_MAP["IIETForCausalLM"] = Checks
