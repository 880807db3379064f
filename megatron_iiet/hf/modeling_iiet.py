"""IIET and its relatives as Hugging Face models: one file that needs only torch and transformers (of the
versions that ``TRANSFORMERS`` names).

A model is LLaMA's decoder layer as a function F (its output minus its input) and a *solver* that integrates
it from y_n to y_{n+1}: ``euler`` (the plain LLaMA layer), ``dlcl``, ``weight-sharing``, ``rk2``, ``rk4``,
``pcformer`` and ``iiet`` (Iterative Implicit Euler Transformer, arXiv 2509.22463), which evaluates F r_n + 1
times in layer n. ``config.json`` has LLaMA's fields, ``embedding_scale``, ``solver``, ``kv_cache``,
``qkv_bias`` and ``qk_norm``; weights have LLaMA's and Qwen's names, and ``model.layers.N.solver.*`` for what
the solver has.

Keys and values are kept in transformers' own caches, one set ("virtual layer") for each evaluation of F,
which attends to its own of earlier tokens. ``kv_cache`` has two cheaper ways, see :class:`IIETConfig`.

The same weights with fewer iterations draft for the full model (self-speculative decoding)::

    draft = model.with_iterations(0)
    model.generate(**inputs, assistant_model=draft)

Shapes: B batch, T new tokens, D hidden size, H query heads, G key/value heads, K head width, N layers.
"""

import copy
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

TRANSFORMERS = ((4, 57), (5, 25))
"""The versions of transformers with which this file was seen to compute what the model was trained to
compute: from the first one on, below the second."""


def _check_transformers(version: str) -> None:
    """Refuse a transformers that was not run before anything is computed with it: one renamed the cache among
    the arguments, and a model that did not know would have decoded without its past.

    Raises:
        ImportError: with the versions that work.
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    if not TRANSFORMERS[0] <= found < TRANSFORMERS[1]:
        first, last = (".".join(map(str, bound)) for bound in TRANSFORMERS)
        raise ImportError(
            f"this model's code (modeling_iiet.py) computes what it should with transformers >= {first}, "
            f"< {last}, but {version} is installed; pip install 'transformers>={first},<{last}'"
        )


_check_transformers(transformers.__version__)  # before names are imported that other versions do not have

from transformers.cache_utils import Cache, DynamicCache  # noqa: E402
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402
from transformers.modeling_layers import (  # noqa: E402
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel  # noqa: E402
from transformers.models.llama.configuration_llama import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple  # noqa: E402

# What versions of transformers call otherwise.
_PAST = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The cache, in outputs and arguments: ``cache`` from 5.24 on."""
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_TELLS_PLACES = "cache_kwargs" in inspect.signature(Cache.update).parameters
"""Whether caches have to be told where new tokens go: before 5.4."""
_ONE_ROTARY_BASE = "rope_theta" in inspect.signature(LlamaConfig.__init__).parameters
"""Whether the rotary embedding is configured by ``rope_theta`` and ``rope_scaling``: before 5.0."""
_OWN_DRAFTS = not transformers.__version__.startswith("5.15.")
"""Whether assisted generation says how many tokens to take out of a draft's cache by what is in it."""

LAYER_NORM_EPS = 1e-5
"""Epsilon of the LayerNorms that solvers have, as in the IIET authors' code."""

KEPT_MERGED = 3
"""Increments of earlier layers in PCformer's corrector."""

KV_CACHES = ("all", "last", "first")
"""Values of ``IIETConfig.kv_cache``."""

_ENGINES = ("vllm", "sglang")
"""How attention functions of engines begin that keep one set of keys and values a layer."""
_OF_ENGINES = ("attention_instances", "forward_batch")
"""What such engines hand through the model to their attention function."""

_READ_FOR_A_DRAFT = (
    *("input_ids", "generation_config", "logits_processor", _PAST),
    *("min_new_tokens", "max_new_tokens"),
)
_OF_A_DRAFT = {*_READ_FOR_A_DRAFT, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
"""What assisted generation gives its assistant."""

AUTO_MAP = {
    "AutoConfig": "modeling_iiet.IIETConfig",
    "AutoModel": "modeling_iiet.IIETModel",
    "AutoModelForCausalLM": "modeling_iiet.IIETForCausalLM",
    "AutoModelForSequenceClassification": "modeling_iiet.IIETForSequenceClassification",
}
"""The classes of this file that the Auto classes load, as ``config.json`` names them."""

_ITERATING: dict[str, Any] = {"iterations": 3, "key_values": "every"}
_SOLVER_KEYS: dict[str, dict[str, Any]] = {
    "euler": {"output_norm": "none"},
    "dlcl": {"coefficient_init": "identity", "history_norm": "rms"},
    "weight-sharing": {"repeats": 4, "key_values": "every"},
    "rk2": {"stage_coefficients": "learned", "key_values": "every"},
    "rk4": {"stage_coefficients": "learned", "key_values": "every"},
    "pcformer": {"predictor_order": 2, "coefficient_init": "identity", "key_values": "every"},
    "paper": {
        "merge": True,
        "predictor": "merged",
        "coefficient_init": "identity",
        "history_norm": "rms",
        "damping": 1.0,
        **_ITERATING,
    },
    "released": {"readout": "separate", "coefficient_init": "average", **_ITERATING},
}
"""The keys of a solver with their defaults, by kind; of kind iiet by variant."""
_VARIANTS = {"iiet": ("paper", "released")}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "merge": (True, False),
    "predictor": ("merged", "euler"),
    "coefficient_init": ("identity", "average"),
    "history_norm": ("none", "rms"),
    "readout": ("separate", "shared"),
    "output_norm": ("none", "layer"),
    "stage_coefficients": ("fixed", "learned", "full", "gated"),
    "predictor_order": (2, 4),
    "key_values": ("every", "first"),
}
_NOT_OF_KIND = {("rk4", "stage_coefficients"): ("gated",)}
"""Choices that a kind does not have."""
_KINDS = tuple(name for name in _SOLVER_KEYS if name not in _VARIANTS["iiet"]) + tuple(_VARIANTS)
_KNOWN_KEYS = ("kind", "variant", *dict.fromkeys(key for keys in _SOLVER_KEYS.values() for key in keys))


def resolve_solver(solver: Mapping[str, Any] | None, num_layers: int) -> dict[str, Any]:
    """The ``solver`` object of a configuration, checked and complete: the keys of its kind and no others.
    ``iterations`` becomes a list with a number for each layer. A key of the kind's other variant that has its
    default, as older versions wrote it, is left out with a warning.

    Raises:
        ValueError: an unknown key, or a key or value that no solver or not this kind has.
    """
    given = {} if solver is None else dict(solver)
    unknown = sorted(set(given) - set(_KNOWN_KEYS))
    if unknown:
        raise ValueError(f"solver has the unknown key {unknown[0]!r}; the keys are {', '.join(_KNOWN_KEYS)}")
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("kind", "iiet")
    _check_choice("kind", kind, _KINDS)
    names, described, keys = {"kind": kind}, f"solver.kind {kind!r}", _SOLVER_KEYS.get(kind)
    if keys is None:
        variant = given.pop("variant", _VARIANTS[kind][0])
        _check_choice("variant", variant, _VARIANTS[kind])
        names["variant"], described, keys = variant, f"solver.variant {variant!r}", _SOLVER_KEYS[variant]
    for name in [name for name in given if name not in keys]:
        value = given.pop(name)
        what = f"solver.{name} is {value!r}, which {described} does not have"
        if all(_SOLVER_KEYS[variant].get(name) != value for variant in _VARIANTS.get(kind, ())):
            raise ValueError(f"{what}; remove it")
        warnings.warn(f"{what}; it is left out", stacklevel=2)
    resolved = {**names, **keys, **given}
    for name, value in resolved.items():
        if name in _CHOICES:
            lacking = _NOT_OF_KIND.get((kind, name), ())
            _check_choice(name, value, tuple(choice for choice in _CHOICES[name] if choice not in lacking))
    _check_numbers(resolved)
    if "iterations" in resolved:
        resolved["iterations"] = _per_layer(resolved["iterations"], num_layers, "solver.iterations")
    return resolved


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
        shown = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"solver.{name} is {value!r}; supported are {shown}")


def _check_numbers(solver: Mapping[str, Any]) -> None:
    repeats, damping = solver.get("repeats", 1), solver.get("damping", 1.0)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"solver.repeats is {repeats!r}; give a whole number of at least 1")
    if not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 < damping <= 1:
        raise ValueError(f"solver.damping is {damping!r}; give a number above 0 and at most 1")


def _per_layer(iterations: Any, num_layers: int, source: str) -> list[int]:
    """Iteration counts as they are written, one number or one a layer, as a list with one a layer."""
    counts = list(iterations) if isinstance(iterations, list | tuple) else [iterations] * num_layers
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
        raise ValueError(f"{source} is {iterations!r}; iteration counts are whole numbers of at least 0")
    if len(counts) != num_layers:
        raise ValueError(
            f"{source} lists {len(counts)} numbers, but num_hidden_layers is {num_layers}; give one a layer"
        )
    return counts


_OF_OTHER_MODELS = (
    *("per_layer_config", "layer_types", "sliding_window", "attention_chunk_size"),
    *("num_kv_shared_layers", "mtp_num_layers"),
)
"""Fields that change what other models' layers compute, and that these layers would not read."""


class IIETConfig(LlamaConfig):
    """LLaMA's configuration and:

    * ``solver``: how each layer is integrated, an object with ``kind`` and the keys its kind reads
      (:func:`resolve_solver`); ``iterations``: the corrector iterations r_n of each layer of kind ``iiet``.
    * ``embedding_scale``: factor on the embedding output (and on ``inputs_embeds``).
    * ``kv_cache``: which evaluations of F keep keys and values.

      ``all`` (default): each. Exact: decoding token by token equals the full forward pass. Per token
      2 · (G·K) · bytes · Σ evaluations.

      ``last``: the last evaluation of each layer, a set a layer. The first forward pass on an empty cache
      is exact (as is one without a cache); after it, every evaluation attends to the *last* evaluation's
      keys and values for the tokens in the cache, and to its own for the new ones. It is an approximation,
      good where the iteration converges and exact for layers with one evaluation. It depends on how many
      tokens come at once, so that assisted generation may choose other tokens than plain decoding.

      ``first``: the first evaluation of each layer, a set a layer; the later ones compute queries alone and
      attend to the first one's keys and values, with and without a cache. It is *another function* of the
      weights: exact in itself (decoding equals the full forward pass), meant for models trained with it.
      Those say so by ``solver.key_values`` 'first', for which this is the only value and the default.
    * ``qkv_bias``: biases of queries, keys and values (``attention_bias``: of the output as well).
    * ``qk_norm``: RMSNorm of every head's query and key before they are rotated.

    Raises:
        ValueError: a field has a value that is not supported, or solver.iterations does not fit the layers.
    """

    model_type = "iiet"
    # No pipeline: a layer reads what all earlier ones kept, not only the residual stream.
    base_model_pp_plan = None  # type: ignore[assignment]

    def __init__(
        self,
        embedding_scale: float = 1.0,
        solver: dict[str, Any] | None = None,
        kv_cache: str = "all",
        qkv_bias: bool = False,
        qk_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in _OF_OTHER_MODELS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is given, but all layers of an IIET model have one shape and attend to all "
                    "earlier tokens; remove it"
                )
        if _ONE_ROTARY_BASE and kwargs.get("rope_parameters"):
            rope = dict(kwargs.pop("rope_parameters"))
            kwargs["rope_theta"] = rope.pop("rope_theta", kwargs.get("rope_theta", 10000.0))
            kwargs["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        super().__init__(**kwargs)
        self.embedding_scale = embedding_scale
        self.solver = solver
        self.kv_cache = kv_cache
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.resolve()
        if not getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)

    def resolve(self) -> None:
        """Check the fields that are not LLaMA's and complete them; models do it once more, for what was set
        since."""
        self.solver = resolve_solver(self.solver, self.num_hidden_layers)
        if self.kv_cache not in KV_CACHES:
            raise ValueError(
                f"kv_cache is {self.kv_cache!r}; supported are {', '.join(map(repr, KV_CACHES))}"
            )
        if self.solver.get("key_values") == "first":
            if self.kv_cache == "last":
                raise ValueError(
                    "kv_cache is 'last', but solver.key_values is 'first': the model was trained to attend "
                    "to keys and values of first evaluations; set kv_cache to 'first'"
                )
            self.kv_cache = "first"
        scale = self.embedding_scale
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < float("inf"):
            raise ValueError(f"embedding_scale is {scale!r}; give a number above 0")
        for name in ("qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give true or false")
        if self.qkv_bias and self.attention_bias:
            raise ValueError("qkv_bias and attention_bias are both true; keep the one that is meant")

    @property
    def layers(self) -> int:
        """N, the layers of the model, also of a configuration that shows caches another number."""
        return cast(int, vars(self)["num_hidden_layers"])

    @property
    def iterations(self) -> list[int]:
        """Corrector iterations r_n of each layer; zeros for kinds without a corrector to iterate."""
        return cast(dict[str, Any], self.solver).get("iterations", [0] * self.layers)

    @property
    def evaluations(self) -> list[int]:
        """Evaluations of F in each layer for one token."""
        solver = cast(dict[str, Any], self.solver)
        fixed = {"rk2": 2, "rk4": 4, "pcformer": solver.get("predictor_order", 0) + 1}
        fixed["weight-sharing"] = solver.get("repeats", 1)
        if solver["kind"] in fixed:
            return [fixed[solver["kind"]]] * self.layers
        return [r + 1 for r in self.iterations]

    @property
    def num_cache_sets(self) -> int:
        """Sets of keys and values that a cache holds."""
        return sum(self.evaluations) if self.kv_cache == "all" else self.layers

    @property
    def one_set_serves_a_layer(self) -> bool:
        """Whether a cache that knows of layers only, not of their evaluations, is enough."""
        return self.kv_cache == "first" or max(self.evaluations) == 1

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LlamaConfig:
        """This; for ``decoder``, what transformers' caches ask for and count the layers of, a configuration
        with a layer for each set of keys and values."""
        made = "kv_cache" in vars(self)  # transformers asks while it makes one
        return _CacheConfig.of(self) if decoder and not encoder and made else self


class _CacheConfig(IIETConfig):
    """A model's configuration as caches should see it: ``num_hidden_layers`` is the number of their sets. All
    else is read from and written to the model's."""

    @classmethod
    def of(cls, config: IIETConfig) -> "_CacheConfig":
        seen = object.__new__(cls)
        seen.__dict__ = config.__dict__
        return seen

    @property  # type: ignore[misc]
    def num_hidden_layers(self) -> int:  # type: ignore[override]
        return self.num_cache_sets

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LlamaConfig:
        return self


class History:
    """What the layers so far kept for later ones to merge: F̃_0, F̃_1, …, or the embedding and L_1, L_2, … .

    As a tuple of tensors [B, T, D] where autograd or a compiler looks on. Else as one fp32 buffer
    [entries, B, T, D], from which a merge is one matrix-vector product.
    """

    def __init__(self, entries: tuple[Tensor, ...] = (), buffer: Tensor | None = None) -> None:
        self.entries = entries
        self.buffer = buffer
        self.count = 0

    def append(self, entry_BTD: Tensor) -> None:
        if self.buffer is None:
            self.entries = (*self.entries, entry_BTD)
        else:
            self.buffer[self.count].copy_(entry_BTD)
            self.count += 1

    def merge(self, residual_BTD: Tensor, row: Tensor, first: int, count: int) -> Tensor:
        """``residual + Σ_{j<count} row[j] · entry_{first+j}``, [B, T, D]; summed in fp32, in its type."""
        if count == 0:
            return residual_BTD
        if self.buffer is None:
            entries = self.entries[first : first + count]
            return combine(residual_BTD, entries, row[:count].unbind())
        flat = self.buffer[first : first + count].view(count, -1).t()
        merged = torch.addmv(residual_BTD.float().reshape(-1), flat, row[:count])
        return merged.view(residual_BTD.shape).to(residual_BTD.dtype)

    def weighted_sums(self, rows: Sequence[Tensor], count: int, like_BTD: Tensor) -> Sequence[Tensor]:
        """``Σ_{j<count} row[j] · entry_j`` for each row, [B, T, D] in the type of ``like``, sums in fp32."""
        if self.buffer is None:
            zero = torch.zeros_like(like_BTD)
            return [combine(zero, self.entries[:count], row[:count].unbind()) for row in rows]
        flat = self.buffer[:count].view(count, -1)
        sums = torch.mm(torch.stack([row[:count] for row in rows]), flat)
        return sums.view(len(rows), *like_BTD.shape).to(like_BTD.dtype).unbind()


def combine(residual_BTD: Tensor, increments: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """``residual + Σ_i weights[i] · increments[i]``, summed in fp32 in this order, in the residual's type."""
    total = residual_BTD.float()
    for increment_BTD, weight in zip(increments, weights, strict=True):
        if isinstance(weight, Tensor):  # [1], not a scalar: a scalar would be rounded to the increment's type
            total = torch.addcmul(total, increment_BTD, weight.reshape(1))
        else:
            total = torch.add(total, increment_BTD, alpha=weight)
    return total.to(residual_BTD.dtype)


IncrementFn = Callable[[Tensor, int], Tensor]
"""F as a solver sees it: (y [B, T, D], which evaluation) → F(y) [B, T, D]."""
Step = tuple[Tensor, Tensor | None]
"""What a solver makes of a layer: (y_{n+1}, what later layers may merge, or None), [B, T, D]."""


def _fp32_parameter(*shape: int) -> nn.Parameter:
    """Coefficients stay fp32 in a bf16 model: they live near 1, where bf16 values are 0.0078 apart."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def _initial_row(length: int, coefficient_init: str) -> Tensor:
    """``identity``: own increment 1, others 0; ``average``: all 1 / length."""
    if coefficient_init == "average":
        return torch.full((length,), 1.0 / length)
    return torch.eye(length)[-1]


class _NeverHalf(nn.Module):
    """Parameters and buffers follow to other devices and to fp64, but keep type and bits where a model is
    cast to a half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            there = fn(tensor)
            halved = there.dtype in (torch.bfloat16, torch.float16) and there.dtype != tensor.dtype
            return tensor.to(there.device) if halved else there

        return super()._apply(moved, recurse)


class SolverLayerNorm(_NeverHalf, nn.LayerNorm):
    """LayerNorm with fp32 weights and arithmetic whatever the type of the stream."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS, dtype=torch.float32)

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x_BTD.float(), self.normalized_shape, weight, bias, self.eps).to(x_BTD.dtype)


class Solver(_NeverHalf):
    """Integrates one layer, by ``forward(y, F, history)``, as ``declared``, the configuration's ``solver``,
    says."""

    keeps = False
    """Whether later layers merge what this one returns."""
    roots = False
    """Whether the embedding output is entry 0 of the history."""
    merges_all = False
    """Whether a layer merges all that was kept (and not only the latest entries)."""

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__()
        self.declared = cast(dict[str, Any], config.solver)
        self.layer = layer
        self.iterations = 0
        self.never_read: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Any:
        """As any module's; but what nothing reads asks for no gradient: data parallel training would wait for
        it. Loading makes every parameter anew, and ends with this."""
        for name in self.never_read:
            self.get_parameter(name).requires_grad_(False)
        return super().train(mode)

    def initial(self) -> dict[str, Tensor]:
        """Initial values of the solver's own parameters."""
        return {}

    def unused(self, iterations: int) -> tuple[str, ...]:
        """Names of parameters that nothing reads with so many iterations: they are stored, not trained."""
        return ()


class Euler(Solver):
    """y_{n+1} = y_n + F(y_n), a LLaMA layer; ``output_norm`` 'layer': the LayerNorm of that."""

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__(config, layer)
        normed = self.declared["output_norm"] == "layer"
        self.output_norm = SolverLayerNorm(config.hidden_size) if normed else None

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        y_BTD = y_BTD + increment(y_BTD, 0)
        return (y_BTD if self.output_norm is None else self.output_norm(y_BTD)), None


class WeightSharing(Solver):
    """``repeats`` Euler steps in a row with the weights of one layer."""

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        for i in range(self.declared["repeats"]):
            y_BTD = y_BTD + increment(y_BTD, i)
        return y_BTD, None


_STEP_LENGTHS = {2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""By order of a Runge-Kutta step: how far along the stage before the stages after the first are evaluated."""


def _runge_kutta_stages(
    order: int, y_BTD: Tensor, increment: IncrementFn, inner: Tensor | None = None
) -> list[Tensor]:
    """F_1 … F_order: F(y), F(y + F_1) of order 2; F(y), F(y + F_1/2), F(y + F_2/2), F(y + F_3) of order 4; or
    with β_21, β_31, β_32, … in ``inner`` F_i = F(y + Σ_{j<i} β_ij F_j)."""
    stages = [increment(y_BTD, 0)]
    for i, length in enumerate(_STEP_LENGTHS[order], start=1):
        if inner is None:
            x_BTD = torch.add(y_BTD, stages[-1], alpha=length)
        else:
            first = i * (i - 1) // 2
            x_BTD = combine(y_BTD, stages, inner.float()[first : first + i].unbind())
        stages.append(increment(x_BTD, i))
    return stages


class RungeKutta(Solver):
    """Runge-Kutta steps of order 2 and 4 (ODE Transformer, arXiv 2203.09176): y + Σ γ_i F_i, with γ fixed at
    the classic values, learned (``full``: and at what each stage is evaluated), or (order 2) computed for
    each token: g F_1 + (1 - g) F_2 with g = sigmoid(W [F_1; F_2] + b)."""

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.order = int(self.declared["kind"][-1])
        self.classic = [0.5, 0.5] if self.order == 2 else [1 / 6, 1 / 3, 1 / 3, 1 / 6]
        self.coefficients = self.inner_coefficients = self.gate_weight = self.gate_bias = None
        learned = self.declared["stage_coefficients"]
        if learned == "full":
            self.inner_coefficients = _fp32_parameter(self.order * (self.order - 1) // 2)
        if learned in ("learned", "full"):
            self.coefficients = _fp32_parameter(self.order)
        elif learned == "gated":
            self.gate_weight = _fp32_parameter(1, 2 * config.hidden_size)
            self.gate_bias = _fp32_parameter(1)

    def initial(self) -> dict[str, Tensor]:
        values = {name: torch.zeros(gate.shape) for name, gate in self.named_parameters()}
        if self.coefficients is not None:
            values["coefficients"] = torch.ones(2) if self.order == 2 else torch.tensor(self.classic)
        if self.inner_coefficients is not None:
            lengths = enumerate(_STEP_LENGTHS[self.order])
            rows = [F.pad(torch.tensor([length]), (i, 0)) for i, length in lengths]
            values["inner_coefficients"] = torch.cat(rows)
        return values

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        stages = _runge_kutta_stages(self.order, y_BTD, increment, self.inner_coefficients)
        if self.gate_weight is not None and self.gate_bias is not None:
            first, second = stages
            of_first, of_second = self.gate_weight.float().chunk(2, dim=1)
            logits_BT1 = F.linear(first.float(), of_first, self.gate_bias.float())
            gate_BT1 = (logits_BT1 + F.linear(second.float(), of_second)).sigmoid().to(y_BTD.dtype)
            return y_BTD + torch.lerp(second, first, gate_BT1), None
        weights: Sequence[Tensor | float] = self.classic
        if self.coefficients is not None:
            weights = self.coefficients.float().unbind()
        return combine(y_BTD, stages, weights), None


class PCformer(Solver):
    """Predictor-corrector step (arXiv 2411.03042): y_p = y + Σ γ (1-γ)^{o-i} F_i over Runge-Kutta stages,
    then y + α F(y_p) + Σ β_i F̃_i over the increments that the three layers before kept."""

    keeps = True

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.order = self.declared["predictor_order"]
        self.first = max(0, layer - KEPT_MERGED)
        self.gamma = _fp32_parameter(1)
        self.coefficients = _fp32_parameter(layer - self.first + 1)

    def initial(self) -> dict[str, Tensor]:
        row = _initial_row(len(self.coefficients), self.declared["coefficient_init"])
        return {"gamma": torch.full((1,), 0.5), "coefficients": row}

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        stages = _runge_kutta_stages(self.order, y_BTD, increment)
        gamma, row = self.gamma.float(), self.coefficients.float()
        weights = [gamma * (1 - gamma) ** (self.order - i) for i in range(1, self.order + 1)]
        f = increment(combine(y_BTD, stages, weights), self.order)
        count = self.layer - self.first
        base = history.merge(y_BTD, row, self.first, count)
        return combine(base, (f,), (row[count:],)), f


class ImplicitEuler(Solver):
    """Iterative implicit Euler, Algorithm 1 of arXiv 2509.22463::

        base = y_n + Σ_{j<n} α_{n,j} F̃_j
        y^i  = base + α_{n,n} f^i,   f^0 = F(y_n),   f^i = (1 − ω) f^{i-1} + ω F(y^{i-1})
        y_{n+1} = y^r,   F̃_n = f^r (``history_norm`` 'rms': f^r / rms(f^r))

    ``predictor`` 'euler': y^0 = y_n + F(y_n). ``dlcl`` is r = 0. ω is ``damping``. Without ``merge``:
    y^i = y_n + f^i, and no coefficients (Eq. 9).
    """

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__(config, layer)
        solver = self.declared
        self.normed_history = solver["history_norm"] == "rms"
        self.euler_predictor = solver.get("predictor") == "euler"  # dlcl has none
        self.damping = solver.get("damping", 1.0)
        self.keeps = self.merges_all = solver.get("merge", True)
        self.coefficients = _fp32_parameter(layer + 1) if self.keeps else None

    def initial(self) -> dict[str, Tensor]:
        row = _initial_row(self.layer + 1, self.declared["coefficient_init"])
        return {"coefficients": row} if self.keeps else {}

    def unused(self, iterations: int) -> tuple[str, ...]:
        return ("coefficients",) if self.keeps and self.euler_predictor and iterations == 0 else ()

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        f = increment(y_BTD, 0)
        if self.euler_predictor and self.iterations == 0:
            return y_BTD + f, self._kept(f)  # there is no corrector to merge in
        base, own = y_BTD, cast(Tensor | float, 1.0)
        if self.coefficients is not None:
            row = self.coefficients.float()
            base, own = history.merge(y_BTD, row, 0, self.layer), row[self.layer :]
        iterate = y_BTD + f if self.euler_predictor else combine(base, (f,), (own,))
        for i in range(1, self.iterations + 1):
            new = increment(iterate, i)
            f = new if self.damping == 1 else torch.lerp(f, new, self.damping)
            iterate = combine(base, (f,), (own,))
        return iterate, self._kept(f)

    def _kept(self, f_BTD: Tensor) -> Tensor:
        return F.rms_norm(f_BTD, f_BTD.shape[-1:]) if self.normed_history else f_BTD


class ReleasedImplicitEuler(Solver):
    """Implicit Euler as the IIET authors' released code computes it, with G(h) = h + F(h), the history L_0 =
    embedding, L_1, …, and layers counted n = 1..N::

        L_n = LN^a(G(h))
        repeat r times:  h' = Σ_{j≤n} W[n,j] L_j ;  L_n = LN^b(G(h'))
        h = Σ_{j≤n} Wc[n,j] L_j                      (``readout`` 'shared': Wc = W)
    """

    keeps = True
    roots = True
    merges_all = True

    def __init__(self, config: IIETConfig, layer: int) -> None:
        super().__init__(config, layer + 1)  # the formula counts from 1
        self.shared = self.declared["readout"] == "shared"
        width = config.num_hidden_layers + 1
        self.predictor_norm = SolverLayerNorm(config.hidden_size)
        self.corrector_norm = SolverLayerNorm(config.hidden_size)
        self.coefficients = _fp32_parameter(width)
        if not self.shared:
            self.readout_coefficients = _fp32_parameter(width)
        if layer == 0:
            self.unused_row_0 = _fp32_parameter(2, width)

    def initial(self) -> dict[str, Tensor]:
        width = len(self.coefficients)

        def padded(n: int) -> Tensor:
            return F.pad(_initial_row(n + 1, self.declared["coefficient_init"]), (0, width - n - 1))

        values = {"coefficients": padded(self.layer)}
        if not self.shared:
            values["readout_coefficients"] = padded(self.layer)
        if self.layer == 1:
            values["unused_row_0"] = torch.stack((padded(0), padded(0)))
        return values

    def unused(self, iterations: int) -> tuple[str, ...]:
        names = ["unused_row_0"] if self.layer == 1 else []
        if iterations == 0:
            names += ["corrector_norm.weight", "corrector_norm.bias"]
            names += [] if self.shared else ["coefficients"]
        return tuple(names)

    def forward(self, y_BTD: Tensor, increment: IncrementFn, history: History) -> Step:
        n = self.layer
        output = self.predictor_norm(y_BTD + increment(y_BTD, 0))
        row = self.coefficients.float()
        readout = row if self.shared else self.readout_coefficients.float()
        rows = [readout] if self.shared or self.iterations == 0 else [row, readout]
        bases = history.weighted_sums(rows, n, y_BTD)
        for i in range(1, self.iterations + 1):
            h_BTD = combine(bases[0], (output,), (row[n : n + 1],))
            output = self.corrector_norm(h_BTD + increment(h_BTD, i))
        return combine(bases[-1], (output,), (readout[n : n + 1],)), output


def build_solver(config: IIETConfig, layer: int) -> Solver:
    """The solver of layer ``layer`` (0-based)."""
    solver = cast(dict[str, Any], config.solver)
    kinds: dict[str, type[Solver]] = {
        "euler": Euler,
        "dlcl": ImplicitEuler,
        "weight-sharing": WeightSharing,
        "rk2": RungeKutta,
        "rk4": RungeKutta,
        "pcformer": PCformer,
        "iiet": ReleasedImplicitEuler if solver.get("variant") == "released" else ImplicitEuler,
    }
    return kinds[solver["kind"]](config, layer)


class IIETRMSNorm(LlamaRMSNorm):
    """LLaMA's norm as one operation; the weight is applied before rounding to the stream's type."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class IIETRotaryEmbedding(_NeverHalf, LlamaRotaryEmbedding):
    """LLaMA's, with frequencies in fp32 whatever the model is cast to."""


class _OfSet:
    """An attention module as caches of servers see it: they tell their sets apart by its ``layer_idx``."""

    def __init__(self, attention: nn.Module, cache_set: int) -> None:
        self._attention = attention
        self.layer_idx = cache_set

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class IIETAttention(LlamaAttention):
    """LLaMA's attention for one evaluation of F, on the set of keys and values that belongs to it."""

    def __init__(self, config: IIETConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features))
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = IIETRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = IIETRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Callable[..., tuple[Tensor, Tensor | None]],
        attention_mask: Any,
        past: Cache | None,
        paged: Any,
        places: Tensor | None,
        cache_set: int,
        keep: bool,
        earlier: tuple[Tensor, Tensor] | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Attention output [B, T, D], its weights (eager) and the keys and values attended to.

        ``cache_set``: the set of ``past`` or ``paged``, a server's cache, to attend to and to extend;
        ``keep=False`` takes the new tokens out of it again. ``earlier``: keys and values to attend to instead
        of computing any. ``places`` of the new tokens [T], for caches that have to be told.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BHTK = _rotate(_normed(self.q_proj(hidden_states).view(shape), self.q_norm), rotary)
        module: Any = self
        if earlier is None:
            k_BGTK = _rotate(_normed(self.k_proj(hidden_states).view(shape), self.k_norm), rotary)
            v_BGTK = self.v_proj(hidden_states).view(shape).transpose(1, 2)
            if past is not None:
                told = {} if places is None else {"cache_kwargs": {"cache_position": places}}
                k_BGTK, v_BGTK = past.update(k_BGTK, v_BGTK, cache_set, **told)
                if not keep:
                    _take_back(past, cache_set, hidden_states.shape[1])
        else:
            k_BGTK, v_BGTK = earlier
        used = k_BGTK, v_BGTK
        if paged is not None:
            module = _OfSet(self, cache_set)
            if _PAST == "cache":
                k_BGTK, v_BGTK = paged.update(k_BGTK, v_BGTK, cache_set, kwargs=kwargs)
            else:  # the attention function does it
                kwargs["cache"] = paged
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            module, q_BHTK, k_BGTK, v_BGTK, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights, used


def _normed(x_BTHK: Tensor, norm: nn.Module | None) -> Tensor:
    """Each head normed if there is a norm, [B, H, T, K]."""
    return (x_BTHK if norm is None else norm(x_BTHK)).transpose(1, 2)


def _rotate(x_BHTK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding; the sign of the half that is negated sits in the sines."""
    cos_B1TK, signed_sin_B1TK = rotary
    return torch.addcmul(x_BHTK * cos_B1TK, x_BHTK.roll(x_BHTK.shape[-1] // 2, -1), signed_sin_B1TK)


def _take_back(cache: Cache, cache_set: int, tokens: int) -> None:
    """Let a set of the cache forget its latest tokens; what ``update`` returned stays valid."""
    layer = cache.layers[cache_set]
    length = getattr(layer, "cumulative_length", None)
    if isinstance(length, Tensor):  # a static layer, which writes to these places next
        length.sub_(tokens)
    elif type(layer).__name__ == "DynamicLayer":
        cast(Any, layer).crop(-tokens)
    elif not (_TELLS_PLACES and type(layer).__name__ == "StaticLayer"):  # this one is told to, next time
        raise ValueError(
            f"kv_cache is 'last', which a {type(layer).__name__} cannot do; use a DynamicCache or "
            "StaticCache, or kv_cache 'all'"
        )


class IIETDecoderLayer(GradientCheckpointingLayer):
    """One layer of LLaMA as the function F, and the solver that integrates it."""

    def __init__(self, config: IIETConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = IIETAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = IIETRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = IIETRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.solver = build_solver(config, layer_idx)
        self.configure(config)
        self.solver.never_read = self.solver.unused(self.solver.iterations)
        self.solver.train()  # a model that is made and not loaded asks for no gradient of them either

    def configure(self, config: IIETConfig) -> None:
        """Take over iterations and cache sets of a configuration that is otherwise this layer's."""
        self.solver.iterations = config.iterations[self.layer_idx]
        self.kv_cache = config.kv_cache
        self.last_evaluation = config.evaluations[self.layer_idx] - 1
        before = config.evaluations[: self.layer_idx]
        self.first_set = sum(before) if self.kv_cache == "all" else self.layer_idx

    def forward(
        self,
        y_BTD: Tensor,
        *entries: Tensor,
        history: History | None = None,
        attentions: list[Tensor | None] | None = None,
        **context: Any,
    ) -> Step:
        """Integrate the layer. What earlier layers kept comes as ``entries`` or as ``history``;
        ``attentions`` collects the attention weights of each evaluation."""
        earlier: tuple[Tensor, Tensor] | None = None
        attention, mlp, shared = self.self_attn, self.mlp, self.kv_cache == "first"

        def increment(y_BTD: Tensor, evaluation: int) -> Tensor:
            nonlocal earlier
            a_BTD, weights, used = attention(
                self.input_layernorm(y_BTD),
                cache_set=self.first_set + (evaluation if self.kv_cache == "all" else 0),
                keep=self.kv_cache != "last" or evaluation == self.last_evaluation,
                earlier=earlier,
                **context,
            )
            if shared:
                earlier = used
            if attentions is not None:
                attentions.append(weights)
            return a_BTD + mlp(self.post_attention_layernorm(y_BTD + a_BTD))

        return self.solver(y_BTD, increment, History(entries) if history is None else history)


class IIETPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of the models of this file."""

    config: IIETConfig
    config_class = IIETConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IIETDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def __init__(self, config: IIETConfig, *inputs: Any, **kwargs: Any) -> None:
        config.resolve()
        super().__init__(config, *inputs, **kwargs)

    def post_init(self) -> None:
        if any(".solver." in name for name, _ in self.named_parameters()):
            self._keep_in_fp32_modules_strict = ["solver"]
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Solver):
            for name, value in module.initial().items():
                parameter = module.get_parameter(name)
                if not getattr(parameter, "_is_hf_initialized", False):  # it was loaded
                    parameter.copy_(value)

    def with_iterations(self, iterations: int | Sequence[int] | Mapping[str, Any] | str | os.PathLike) -> Any:
        """A model of the same class that shares every parameter and buffer with this one, has its own
        ``config`` and evaluates its layers as often as ``iterations`` says.

        It follows this model wherever its weights go (devices, types, training steps); modules that are put
        in place of others later (adapters, for example) it does not see. Its caches belong to it alone.

        Args:
            iterations: r_n of each layer, or one number for all; or a plan, the object or the .json file of
                it, with such a list under ``iterations``.

        Raises:
            ValueError: counts that do not fit the model, or a model whose solver has none, or whose layers a
                library has given other ``forward`` functions.
        """
        solver = cast(dict[str, Any], self.config.solver)
        if isinstance(iterations, str | os.PathLike):
            with open(iterations, encoding="utf-8") as file:
                iterations = json.load(file)
        if isinstance(iterations, Mapping):
            if "iterations" not in iterations:
                raise ValueError("the plan has no 'iterations'; give r_n of each layer under that name")
            iterations = iterations["iterations"]
        counts = _per_layer(iterations, self.config.num_hidden_layers, "iterations")
        iterates = "iterations" in solver
        if not iterates and any(counts):
            raise ValueError(
                f"iterations is {counts}, but solver.kind is '{solver['kind']}', which has no iterations"
            )
        config = copy.deepcopy(self.config)
        if iterates:
            cast(dict[str, Any], config.solver)["iterations"] = counts
        view = _sharing_copy(self, self.config, config, {})
        for module in view.modules():
            if isinstance(module, IIETDecoderLayer):
                module.configure(config)
            elif isinstance(module, IIETModel):
                module.made_of = copy.deepcopy(_made_of(config))
        return view


def _sharing_copy(module: nn.Module, old: IIETConfig, new: IIETConfig, made: dict[int, nn.Module]) -> Any:
    """A copy of a module tree with the same tables of parameters and buffers, and ``new`` for ``old``."""
    if id(module) in made:
        return made[id(module)]
    if "forward" in vars(module):
        raise ValueError(
            f"a {type(module).__name__} has a forward function of its own (set by a library that spreads the "
            "model over devices, or by hand), which would run this model's layers; make the view before that"
        )
    made[id(module)] = twin = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            value = {
                key: child if child is None else _sharing_copy(child, old, new, made)
                for key, child in value.items()
            }
        elif "hooks" in name and isinstance(value, dict):
            value = value.copy()
        elif name == "generation_config":
            value = copy.deepcopy(value)
        elif value is old:
            value = new
        elif name in ("_compiled_call", "_compiled_call_impl", "_previous_max_cache_length"):
            continue
        twin.__dict__[name] = value
    return twin


def _made_of(config: IIETConfig) -> tuple[Any, ...]:
    """What layers take over of a configuration when they are made."""
    return config.num_hidden_layers, config.kv_cache, config.solver


class IIETModel(IIETPreTrainedModel):
    """Embedding, integrated layers and final norm."""

    def __init__(self, config: IIETConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([IIETDecoderLayer(config, n) for n in range(config.num_hidden_layers)])
        self.norm = IIETRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = IIETRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.made_of = copy.deepcopy(_made_of(config))
        self._check_engine({})
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The final norm's output [B, T, D] of token ids [B, T] (or of embeddings [B, T, D], not yet scaled).

        ``cache`` is what newer versions of transformers call ``past_key_values``.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, a cache made for another
                model or other iterations, one under another name or beside gradient checkpointing, an engine
                that cannot keep what this model needs, a configuration that was changed after the model was
                made, or hidden states or attentions of some layers only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if (now := _made_of(self.config)) != self.made_of:
            raise ValueError(
                f"the configuration was changed after the model was made, from {self.made_of} to {now} "
                "(num_hidden_layers, kv_cache, solver), which its layers do not follow; make a model with "
                "with_iterations(), or load one with these values"
            )
        for name, asked in (("attentions", output_attentions), ("hidden_states", output_hidden_states)):
            if asked is not None and not isinstance(asked, bool):
                raise ValueError(f"output_{name} is {asked!r}; give True for those of all layers, or False")
        self._check_engine(kwargs)
        past, paged = self._given_cache(past_key_values, cache, kwargs)
        y_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing and past is not None:
            raise ValueError(
                "a cache is given, but gradient checkpointing computes the layers again and would write to "
                "it twice; leave the cache out, or turn gradient checkpointing off"
            )
        if use_cache and past is None and paged is None and not checkpointing:
            past = DynamicCache(config=self.config)
        places = kwargs.pop("cache_position", None)
        if position_ids is None or (_TELLS_PLACES and places is None):
            seen = 0 if past is None else past.get_seq_length()
            places = torch.arange(y_BTD.shape[1], device=y_BTD.device) + seen
        if position_ids is None:
            position_ids = places.unsqueeze(0)
        recorded: dict[str, list[Any]] = {}
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            recorded["hidden_states"] = []
        if self.config.output_attentions if output_attentions is None else output_attentions:
            recorded["attentions"] = []
        context = {**kwargs, "paged": paged, "places": places if _TELLS_PLACES else None}
        hidden_BTD = self._hidden(y_BTD, position_ids, past, attention_mask, context, recorded)
        outputs: dict[str, Any] = {name: tuple(values) for name, values in recorded.items()}
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, **{_PAST: past}, **outputs)

    def _check_engine(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse engines that keep one set of keys and values a layer where evaluations need their own."""
        attention = self.config._attn_implementation or ""
        found = [f"attention {attention!r}"] if attention.startswith(_ENGINES) else []
        found += [f"the argument {name}" for name in _OF_ENGINES if kwargs.get(name) is not None]
        if found and not self.config.one_set_serves_a_layer:
            evaluations = self.config.evaluations
            raise ValueError(
                f"{found[0]} is of an engine that keeps one set of keys and values for each of "
                f"{len(evaluations)} layers, but this model has {sum(evaluations)} evaluations, each with "
                "its own, and would be decoded wrongly; use generate(), or for vLLM the plugin vllm-iiet"
            )

    def _given_cache(self, past_key_values: Any, cache: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The cache that was given, as (transformers' own, or a server's paged one)."""
        for name, value in kwargs.items():
            if isinstance(value, Cache) or _is_paged(value):
                raise ValueError(
                    f"the argument {name} is a {type(value).__name__}, which this model would not read; give "
                    "caches as past_key_values or cache"
                )
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("past_key_values and cache are two names of one argument; give one")
        given = cache if past_key_values is None else past_key_values
        if given is None:
            return None, None
        if isinstance(given, Cache):
            self._check_cache(given)
            return given, None
        if not _is_paged(given):
            raise ValueError(
                f"the cache is a {type(given).__name__}; give a transformers Cache, as DynamicCache"
            )
        if self.config.kv_cache == "last" and not self.config.one_set_serves_a_layer:
            raise ValueError(
                "kv_cache is 'last', which continuous batching cannot do; load the model with kv_cache 'all'"
            )
        known: Any = getattr(given, "layer_to_allocator", None)
        if known is None:  # before 5.18
            known = getattr(given, "layer_index_to_group_indices", ())
        if len(known) != self.config.num_cache_sets:
            raise ValueError(
                f"the paged cache holds {len(known)} sets of keys and values, but this model has "
                f"{self.config.num_cache_sets}, one for each evaluation of a layer; use generate_batch() or "
                "init_continuous_batching() of the model itself, which make one that fits"
            )
        return None, given

    def continued(self, ids_1T: Tensor, cache: Cache) -> Tensor:
        """The final norm's output [1, T, D] of the tokens that follow those in ``cache``, of one sequence
        without padding: :meth:`forward` without what transformers wraps around it."""
        past = cache.get_seq_length()
        position_ids = torch.arange(past, past + ids_1T.shape[1], device=ids_1T.device).unsqueeze(0)
        context = {"paged": None, "places": position_ids[0] if _TELLS_PLACES else None}
        return self._hidden(self.embed_tokens(ids_1T), position_ids, cache, None, context, {})

    def _hidden(
        self,
        y_BTD: Tensor,
        position_ids: Tensor,
        past: Cache | None,
        attention_mask: Any,
        context: dict[str, Any],
        recorded: dict[str, list[Any]],
    ) -> Tensor:
        """The final norm's output [B, T, D] of embeddings [B, T, D]."""
        for_mask = {
            "config": self.config,
            **dict.fromkeys(_MASK_ARGUMENTS & {"inputs_embeds", "input_embeds"}, y_BTD),
            "attention_mask": attention_mask,
            **({"cache_position": context["places"]} if _TELLS_PLACES else {}),
            _PAST: past,
            "position_ids": position_ids,
        }
        cos_BTK, sin_BTK = self.rotary_emb(y_BTD, position_ids=position_ids)
        low, high = sin_BTK.chunk(2, dim=-1)
        attention = self.config._attn_implementation
        context |= {
            "rotary": (cos_BTK.unsqueeze(1), torch.cat((-low, high), dim=-1).unsqueeze(1)),
            "attend": eager_attention_forward
            if attention in (None, "eager")
            else ALL_ATTENTION_FUNCTIONS[attention],
            "attention_mask": create_causal_mask(**for_mask),
            "position_ids": position_ids,
            "past": past,
            "attentions": recorded.get("attentions"),
        }
        if self.config.embedding_scale != 1:
            y_BTD = y_BTD * self.config.embedding_scale
        states = recorded.get("hidden_states")
        hidden_BTD = self.norm(self._integrate(y_BTD, context, states))
        if states is not None:
            states.append(hidden_BTD)
        return hidden_BTD

    def _integrate(self, y_BTD: Tensor, context: dict[str, Any], states: list[Tensor] | None) -> Tensor:
        """Run the layers on y_0, [B, T, D]; ``states`` collects what goes into each."""
        solver = cast(Solver, self.layers[0].solver)
        buffer = None
        if solver.merges_all and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            entries = len(self.layers) + solver.roots
            buffer = torch.empty((entries, *y_BTD.shape), dtype=torch.float32, device=y_BTD.device)
        history = History(buffer=buffer)
        if solver.roots:
            history.append(y_BTD)
        for layer in self.layers:
            if states is not None:
                states.append(y_BTD)
            if buffer is None:  # tensors among the arguments: gradient checkpointing has to see them
                y_BTD, kept = layer(y_BTD, *history.entries, **context)
            else:
                y_BTD, kept = layer(y_BTD, history=history, **context)
            if solver.keeps:
                history.append(kept)
        return y_BTD

    def _check_cache(self, cache: Cache) -> None:
        sets = len(cache.layers) if hasattr(cache, "layers") else 0
        if sets not in (0, self.config.num_cache_sets):
            raise ValueError(
                f"past_key_values holds {sets} sets of keys and values, but this model has "
                f"{self.config.num_cache_sets} (one for each evaluation of a layer, kv_cache "
                f"'{self.config.kv_cache}'); make the cache from this model's config"
            )
        if any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                "past_key_values forgets tokens outside a sliding window, but this model attends to all; "
                "make the cache from this model's config"
            )


def _is_paged(value: Any) -> bool:
    """Whether this is the cache of transformers' continuous batching, which is no :class:`Cache`."""
    return type(value).__name__ == "PagedAttentionCache"


class IIETForCausalLM(IIETPreTrainedModel, GenerationMixin):
    """:class:`IIETModel` with a language-model head."""

    _tied_weights_keys = cast(Any, LlamaForCausalLM._tied_weights_keys)
    _tp_plan = LlamaForCausalLM._tp_plan

    def __init__(self, config: IIETConfig) -> None:
        super().__init__(config)
        self.model = IIETModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (``logits_to_keep``: of the last tokens, or of these places), and with ``labels``
        [B, T] (ids, or -100 to leave a token out; shifted there) the mean cross-entropy in nats.

        Raises:
            ValueError: as :meth:`IIETModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, places, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_PAST: outputs.get(_PAST)},
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; but drafts of one sequence without padding, which assisted generation
        asks of its assistant every few tokens, are made in a loop of few words: what the general one does
        besides takes as long as a small model's layers.

        Raises:
            ValueError: drafts of the first layers alone (``assistant_early_exit``), or a prompt in portions
                (``prefill_chunk_size``) where kv_cache 'last' makes the result depend on them.
        """
        self._check_generation(kwargs)
        drafts = getattr(kwargs.get("generation_config"), "is_assistant", False)
        if _OWN_DRAFTS and drafts and not args and set(kwargs) <= _OF_A_DRAFT:
            ids_BT, mask_BT = kwargs["input_ids"], kwargs.get("attention_mask")
            if len(ids_BT) == 1 and (mask_BT is None or bool(mask_BT.all())):
                request: dict[str, Any] = {name: kwargs.get(name) for name in _READ_FOR_A_DRAFT}
                return self._draft(past=request.pop(_PAST), **request)
        return cast(Any, super()).generate(*args, **kwargs)

    def _check_generation(self, kwargs: Mapping[str, Any]) -> None:
        def asked(name: str) -> Any:
            settings = (kwargs.get("generation_config"), self.generation_config)
            values = [kwargs.get(name), *(getattr(setting, name, None) for setting in settings)]
            return next((value for value in values if value is not None), None)

        if asked("assistant_early_exit") is not None:
            raise ValueError(
                f"assistant_early_exit is {asked('assistant_early_exit')}, but later layers of an IIET model "
                "are no refinement of what the head reads; use assistant_model=model.with_iterations(0)"
            )
        size = asked("prefill_chunk_size")
        if size is not None and self.config.kv_cache == "last" and max(self.config.evaluations) > 1:
            raise ValueError(
                f"prefill_chunk_size is {size} and kv_cache is 'last', whose result depends on how many "
                "tokens come at once; leave prefill_chunk_size out, or load the model with kv_cache 'all'"
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with a paged cache that has a set of keys and values for each evaluation."""
        if isinstance(self.config, _CacheConfig):
            return cast(Any, super()).init_continuous_batching(*args, **kwargs)
        view = _sharing_copy(self, self.config, _CacheConfig.of(self.config), {})
        view.model.made_of = copy.deepcopy(_made_of(view.config))
        return view.init_continuous_batching(*args, **kwargs)

    @torch.no_grad()
    def _draft(
        self,
        past: Cache | None,
        input_ids: Tensor,
        generation_config: Any,
        logits_processor: Sequence[Any],
        min_new_tokens: int,
        max_new_tokens: int,
    ) -> GenerateDecoderOnlyOutput:
        """At most ``max_new_tokens``, fewer behind an end of text or an improbable token."""
        cache = DynamicCache(config=self.config) if past is None else past
        ends = generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        least = generation_config.assistant_confidence_threshold or 0.0
        scores: list[Tensor] = []
        while len(scores) < max_new_tokens:
            hidden_1TD = self.model.continued(input_ids[:, cache.get_seq_length() :], cache)
            score_1V = self.lm_head(hidden_1TD[:, -1]).float()
            for processor in logits_processor:
                score_1V = processor(input_ids, score_1V)
            if len(scores) < min_new_tokens:
                score_1V[:, ends] = -torch.inf
            scores.append(score_1V)
            p_1V = score_1V.softmax(-1)
            token_11 = p_1V.multinomial(1) if generation_config.do_sample else p_1V.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token_11], dim=1)
            token = int(token_11)
            if token in ends or p_1V[0, token] < least:
                break
        made: dict[str, Any] = {"sequences": input_ids, "scores": tuple(scores), _PAST: cache}
        return GenerateDecoderOnlyOutput(**made)


class IIETForSequenceClassification(GenericForSequenceClassification, IIETPreTrainedModel):
    """:class:`IIETModel` and a linear score of the last token that is not padding: a classifier, or with one
    label a reward model. Logits [B, labels]; with ``labels`` the loss that ``problem_type`` says."""

    def __init__(self, config: IIETConfig) -> None:
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = IIETModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = [
    "IIETConfig",
    "IIETForCausalLM",
    "IIETForSequenceClassification",
    "IIETModel",
    "IIETPreTrainedModel",
]

# What save_pretrained writes loads anywhere: it copies this file into the folder.
IIETConfig.register_for_auto_class()
IIETModel.register_for_auto_class("AutoModel")
IIETForCausalLM.register_for_auto_class("AutoModelForCausalLM")
IIETForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
