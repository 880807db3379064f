"""IIET and its relatives in vLLM's own layers; what a solver computes is modeling_iiet.py's.

Every evaluation of F attends to its own keys and values of earlier tokens, so each has an ``Attention`` of
its own, which is what vLLM allocates a cache for. With ``kv_cache`` 'first' a layer has one cache, and its
later evaluations compute queries alone.

Shapes: T tokens of all requests, D hidden size, G key/value heads of this rank, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_iiet.checks import check_engine, checked
from vllm_iiet.modeling_iiet import History, IIETConfig, Solver, Step, build_solver


class IIETAttention(nn.Module):
    """The projections of a layer, and an ``Attention`` for each of its evaluations."""

    def __init__(self, config: IIETConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        width, head_dim, biased = config.hidden_size, config.head_dim, config.attention_bias
        bias = biased or getattr(config, "qkv_bias", False)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.shared = config.kv_cache == "first"
        self.q_size, self.kv_size = heads // ranks * head_dim, max(1, kv_heads // ranks) * head_dim
        if self.shared:  # queries are computed more often than keys and values
            self.q_proj = ColumnParallelLinear(width, heads * head_dim, bias, prefix=f"{prefix}.q_proj")
            self.kv_proj = QKVParallelLinear(width, head_dim, 0, kv_heads, bias, prefix=f"{prefix}.kv_proj")
        else:
            self.qkv_proj = QKVParallelLinear(
                width, head_dim, heads, kv_heads, bias, prefix=f"{prefix}.qkv_proj"
            )
        self.o_proj = RowParallelLinear(heads * head_dim, width, biased, prefix=f"{prefix}.o_proj")
        self.head_dim, self.q_norm, self.k_norm = head_dim, None, None
        if getattr(config, "qk_norm", False):
            self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.rotary = get_rope(
            head_dim, config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        first = sum(config.evaluations[:layer])
        # vLLM reads one number from a name and takes it for the layer: here it counts evaluations.
        names = [f"evaluations.{first + i}.attn" for i in range(config.evaluations[layer])]
        self.attend = nn.ModuleList(
            Attention(
                heads // ranks,
                head_dim,
                head_dim**-0.5,
                num_kv_heads=max(1, kv_heads // ranks),
                cache_config=vllm_config.cache_config,
                prefix=name,
                kv_sharing_target_layer_name=names[0] if self.shared and name != names[0] else None,
            )
            for name in names
        )

    def forward(
        self, positions_T: Tensor, x_TD: Tensor, evaluation: int, earlier: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention output [T, D] of an evaluation, and keys and values, each [T, G·K]; ``earlier``: those of
        the layer's first evaluation, if there is one set for all."""
        if not self.shared:
            qkv, _ = self.qkv_proj(x_TD)
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        else:
            q, _ = self.q_proj(x_TD)
            if earlier is None:
                k, v = self.kv_proj(x_TD)[0].split([self.kv_size, self.kv_size], dim=-1)
        q = self._normed(q, self.q_norm)
        if earlier is None:
            q, k = self.rotary(positions_T, q, self._normed(k, self.k_norm))
        else:
            q, _ = self.rotary(positions_T, q, None)
            k, v = earlier
        out, _ = self.o_proj(self.attend[evaluation](q, k, v))
        return out, (k, v)

    def _normed(self, heads_TN: Tensor, norm: RMSNorm | None) -> Tensor:
        """Each head of [T, heads · K] normed, if there is a norm."""
        if norm is None:
            return heads_TN
        return norm(heads_TN.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class IIETMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: IIETConfig, prefix: str) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner, inner], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, width, bias=False, prefix=f"{prefix}.down_proj")
        self.act = SiluAndMul()

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        return self.down_proj(self.act(self.gate_up_proj(x_TD)[0]))[0]


class IIETDecoderLayer(nn.Module):
    """One layer of LLaMA as the function F, and the solver that integrates it (the same on every rank)."""

    def __init__(self, config: IIETConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = IIETAttention(config, layer, vllm_config, f"{prefix}.self_attn")
        self.mlp = IIETMLP(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.solver = build_solver(config, layer)  # its parameters are fp32 whatever the model's type is
        self.solver.iterations = config.iterations[layer]

    def forward(self, positions_T: Tensor, y_TD: Tensor, history: History) -> Step:
        """y_{n+1} [T, D] and what later layers may merge."""
        first: tuple[Tensor, Tensor] | None = None

        def increment(y_TD: Tensor, evaluation: int) -> Tensor:
            nonlocal first
            a_TD, used = self.self_attn(positions_T, self.input_layernorm(y_TD), evaluation, first)
            if self.self_attn.shared:
                first = used
            return a_TD + self.mlp(self.post_attention_layernorm(y_TD + a_TD))

        return self.solver(y_TD, increment, history)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class IIETModel(nn.Module):
    """Embedding, integrated layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = checked(vllm_config.model_config.hf_config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            IIETDecoderLayer(config, n, vllm_config, f"{prefix}.layers.{n}")
            for n in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The final norm's output [T, D] of token ids [T], or of embeddings [T, D], not yet scaled."""
        y_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        scale = self.config.embedding_scale
        if scale != 1:
            y_TD = y_TD * scale
        solver, buffer = cast(Solver, self.layers[0].solver), None
        if solver.merges_all and not torch.compiler.is_compiling():
            shape = (len(self.layers) + solver.roots, *y_TD.shape)
            buffer = torch.empty(shape, dtype=torch.float32, device=y_TD.device)
        history = History(buffer=buffer)
        if solver.roots:
            history.append(y_TD)
        for layer in self.layers:
            y_TD, kept = layer(positions, y_TD, history)
            if solver.keeps:
                history.append(kept)
        return self.norm(y_TD)


class IIETForCausalLM(nn.Module):
    """:class:`IIETModel` with a language-model head, as vLLM wants it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_engine(vllm_config)
        self.model = IIETModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.config = config = self.model.config
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D], not yet scaled."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of token ids [T] at positions [T]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, D] → [T, V], on the ranks that want them."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of an export.

        Raises:
            ValueError: a tensor that the model has no place for (vLLM's loader would pass over a bias), or a
                parameter for which there is none.
        """
        stacked: dict[str, tuple[str, str | int]]
        stacked = {".k_proj": (".kv_proj", "k"), ".v_proj": (".kv_proj", "v")}
        if self.config.kv_cache != "first":
            stacked = {f".{name}_proj": (".qkv_proj", name) for name in "qkv"}
        stacked |= {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
        mapper = WeightsMapper(orig_to_new_stacked=stacked)
        places = {name for name, _ in self.named_parameters(remove_duplicate=False)}

        def with_a_place() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if mapper.map_name(name) not in places:
                    raise ValueError(
                        f"the export has the tensor {name}, which its config.json has no place for"
                    )
                yield name, tensor

        return AutoWeightsLoader(self).load_weights(with_a_place(), mapper=mapper)
