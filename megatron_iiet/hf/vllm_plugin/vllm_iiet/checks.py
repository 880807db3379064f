"""What the plugin runs, and refuses in one sentence before anything is loaded."""

from __future__ import annotations

from typing import Any

import vllm
from transformers import LlamaConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_iiet.modeling_iiet import IIETConfig

VLLM = "0.32"
"""The release of vLLM with which this was run; another one may keep keys and values in another way."""
FIELDS = ("embedding_scale", "solver", "kv_cache", "qkv_bias", "qk_norm")
"""Fields that IIETConfig has and LLaMA's has not, which the model here computes."""
_ALSO_WRITTEN = ("auto_map", "vocab_multiple", "use_cache", "torch_dtype", "rope_theta", "rope_scaling")
"""Names in a config.json that change nothing that is computed, or come in under another name."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that were compared with transformers' own."""
_NEUTRAL = {"hidden_act": "silu", "pretraining_tp": 1, "mlp_bias": False}
"""LLaMA's fields with the one value that the model here computes."""


class Checks(VerifyAndUpdateConfig):
    """vLLM's hook for the architecture: refuses in the process of the user's call."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """See :func:`check_engine` and :func:`checked`."""
        check_engine(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """See :func:`checked`."""
        checked(model_config.hf_config)


def checked(config: Any) -> IIETConfig:
    """A configuration as vLLM has it (``hf_overrides`` are put in unchecked), checked and resolved again.

    Raises:
        ValueError: a field or a value that the model here does not compute.
    """
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    defaults = IIETConfig().to_dict()
    computed = {*LlamaConfig().to_dict(), *FIELDS, *_ALSO_WRITTEN}
    for name, value in values.items():
        if value is not None and name not in computed and value != defaults.get(name):
            raise ValueError(
                f"config.json has {name} {value!r}, which the plugin vllm-iiet does not know; install the "
                "plugin of the version that wrote the export"
            )
    for name, neutral in _NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            raise ValueError(
                f"config.json has {name} {values[name]!r}; the plugin vllm-iiet runs {neutral!r} only"
            )
    resolved = IIETConfig(**values)
    if resolved.kv_cache == "last":
        raise ValueError(
            "kv_cache is 'last', an approximation that depends on how many tokens come at once, which vLLM "
            "decides; set kv_cache to 'all' (hf_overrides={'kv_cache': 'all'})"
        )
    rope_type = (resolved.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_parameters.rope_type is {rope_type!r}; the plugin vllm-iiet runs {', '.join(_ROPE_TYPES)}"
        )
    return resolved


def check_engine(config: VllmConfig) -> None:
    """Refuse what vLLM can do and the model here was not run with.

    Raises:
        ValueError: naming the option, its value and what to do.
    """
    if not vllm.__version__.startswith(f"{VLLM}."):
        raise ValueError(
            f"the plugin vllm-iiet was run with vLLM {VLLM}, but {vllm.__version__} is installed; install "
            f"vLLM {VLLM}.*"
        )
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    drafts, plain = config.speculative_config, ("auto", str(model.dtype).removeprefix("torch."))
    tensor = "a layer reads what all earlier ones kept; use tensor_parallel_size"
    given: dict[str, tuple[Any, tuple[Any, ...], str]] = {  # value, those that are right, advice
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,), tensor),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, (1,), tensor),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, (1,), tensor),
        "enable_dbo": (parallel.use_ubatching, (False,), "leave it out"),
        "quantization": (model.quantization, (None,), "leave it out"),
        "kv_cache_dtype": (cache.cache_dtype, plain, "leave it out"),
        "kv_sharing_fast_prefill": (
            *(cache.kv_sharing_fast_prefill, (False,)),
            "later layers read what shared evaluations compute of every token; leave it out",
        ),
        "enable_lora": (config.lora_config is not None, (False,), "merge the adapter into the weights first"),
        "speculative_config.method": (drafts and drafts.method, (None, "ngram"), "use 'ngram'"),
        "kv_transfer_config": (config.kv_transfer_config is not None, (False,), "leave it out"),
        "runner": (model.runner_type, ("generate",), "the model generates text only"),
    }
    for name, (value, right, advice) in given.items():
        if value not in right:
            raise ValueError(f"{name} is {value!r}, which the plugin vllm-iiet does not run: {advice}")
