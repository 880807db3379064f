"""Which tensors of a Hugging Face folder our parameters are, in both directions: those of LLaMA and its
relatives, under their names, and what a solver has as ``model.layers.N.solver.…``."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.config.hugging_face import CONFIG_FILE, Family
from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.solvers import build_solver
from megatron_iiet.storage.hugging_face.shards import ShardReader
from megatron_iiet.storage.parameters import RowSource, StoredParameters
from megatron_iiet.storage.safetensors_stream import Shape, TensorToWrite

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_COMPARED_ROWS = 4096


def tensor_map(config: RunConfig, *, solver: bool) -> dict[str, dict[str, Shape]]:
    """Our parameters → the tensors, with their shapes, whose rows make them up in order. The order is that of
    the files written.

    ``solver``: with what the solvers have; without it is a LlamaForCausalLM.
    """
    model = config.model
    table = (model.vocab_size, model.hidden_size)
    found: dict[str, dict[str, Shape]] = {"embedding.weight": {EMBEDDING: table}}
    for n in range(model.num_layers):
        for name, tensors in _layer_tensors(model, n).items():
            found[f"layers.{n}.increment.{name}"] = tensors
        if solver:
            with torch.device("meta"):
                built = build_solver(config, n, "reference")
            for name, parameter in built.named_parameters():
                ours = f"layers.{n}.solver.{name}"
                found[ours] = {f"model.{ours}": tuple(parameter.shape)}
    found["norm.weight"] = {"model.norm.weight": (model.hidden_size,)}
    if not model.tie_embeddings:
        found["head.weight"] = {HEAD: table}
    return found


def tensors_to_write(
    config: RunConfig, weights: RowSource, dtype: torch.dtype, *, as_llama: bool
) -> dict[str, TensorToWrite]:
    """The tensors of a folder by name, made of ``weights`` when their turn comes.

    What solvers have is fp32 whatever the rest is: merge coefficients near 1 are too coarse in bf16.
    ``as_llama``: without solver, and with the embedding's scale in the embedding.
    """
    scale = config.model.resolved_embedding_scale if as_llama else 1.0
    found = {}
    for ours, tensors in tensor_map(config, solver=not as_llama).items():
        above = 0
        for name, shape in tensors.items():
            kind = torch.float32 if ".solver." in name else dtype
            factor = scale if name == EMBEDDING else 1.0
            found[name] = TensorToWrite.of_rows(shape, kind, partial(_rows, weights, ours, above, factor))
            above += shape[0]
    return found


def _rows(weights: RowSource, name: str, above: int, factor: float, first: int, last: int) -> Tensor:
    rows = weights.rows(name, above + first, above + last)
    return rows if factor == 1 else rows * factor


class HFWeights(StoredParameters):
    """The parameters of a folder under our names.

    Raises:
        ValueError: files or tensors are missing, superfluous, damaged or of the wrong shape.
    """

    def __init__(self, folder: Path, config: RunConfig, family: Family) -> None:
        """Check everything that can be checked without reading the weights; an IIET's folder has what the
        solvers have."""
        self._tensors = tensor_map(config, solver=family.has_solver)
        self.shapes = {
            name: (sum(shape[0] for shape in tensors.values()), *next(iter(tensors.values()))[1:])
            for name, tensors in self._tensors.items()
        }
        self._reader = ShardReader(folder)
        known: set[str] = set()
        for tensors in self._tensors.values():
            self._reader.check(tensors, CONFIG_FILE)
            known |= tensors.keys()
        if config.model.tie_embeddings and HEAD in self._reader:
            self._check_tied_head(config.model)
            known.add(HEAD)
        # Only rotary tables, which old files store, may be lost.
        left = sorted(n for n in set(self._reader) - known if not n.endswith("rotary_emb.inv_freq"))
        if left:
            raise ValueError(
                f"{self._reader.path(left[0])}: tensor {left[0]} has no place in the model that "
                f"{CONFIG_FILE} describes ({len(left)} such tensors); supported are the tensors of its "
                f"{family.architectures[0]}"
            )

    def rows(self, name: str, first: int, last: int) -> Tensor:
        result = torch.empty(last - first, *self.shapes[name][1:])
        above = 0
        for tensor, shape in self._tensors[name].items():
            low, high = max(first, above), min(last, above + shape[0])
            if low < high:
                self._reader.read_rows(tensor, low - above, result[low - first : high - first])
            above += shape[0]
        return result

    def holding(self, name: str, row: int) -> str:
        ends = accumulate(shape[0] for shape in self._tensors[name].values())
        tensor = next(t for t, end in zip(self._tensors[name], ends, strict=True) if row < end)
        return f"tensor {tensor} in {self._reader.path(tensor)}"

    def _check_tied_head(self, model: ModelConfig) -> None:
        """Old files store a tied head as well; another one than the embedding would be lost."""
        shape = (model.vocab_size, model.hidden_size)
        self._reader.check({HEAD: shape}, CONFIG_FILE)
        for first in range(0, shape[0], _COMPARED_ROWS):
            parts = [torch.empty((min(_COMPARED_ROWS, shape[0] - first), shape[1])) for _ in range(2)]
            for name, part in zip((EMBEDDING, HEAD), parts, strict=True):
                self._reader.read_rows(name, first, part)
            if not torch.equal(*parts):
                raise ValueError(
                    f"{self._reader.folder / CONFIG_FILE}: tie_word_embeddings is true, but {HEAD} differs "
                    f"from {EMBEDDING}; set it to false to use both, or remove the head"
                )


class WithInitialSolvers(StoredParameters):
    """The parameters of a LLaMA folder, and the initial values of what solvers have besides."""

    def __init__(self, llama: HFWeights, config: RunConfig) -> None:
        self._llama = llama
        self._solvers: dict[str, Tensor] = {}
        for n in range(config.model.num_layers):
            for name, value in build_solver(config, n, "reference").state_dict().items():
                self._solvers[f"layers.{n}.solver.{name}"] = value
        self.shapes = {**llama.shapes, **{name: tuple(value.shape) for name, value in self._solvers.items()}}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        if name in self._solvers:
            return self._solvers[name].view(-1, *self._solvers[name].shape[1:])[first:last]
        return self._llama.rows(name, first, last)

    def holding(self, name: str, row: int) -> str:
        return self._llama.holding(name, row)


def _layer_tensors(model: ModelConfig, layer: int) -> dict[str, dict[str, Shape]]:
    d, m = model.hidden_size, model.ffn_hidden_size
    q, kv = model.num_attention_heads * model.head_width, model.num_kv_heads * model.head_width
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    qkv = {f"{attention}.{part}_proj": rows for part, rows in (("q", q), ("k", kv), ("v", kv))}
    found: dict[str, dict[str, Shape]] = {
        "attention.qkv.weight": {f"{name}.weight": (rows, d) for name, rows in qkv.items()},
        "attention.output.weight": {f"{attention}.o_proj.weight": (d, q)},
    }
    if model.attention_bias != "none":
        found["attention.qkv.bias"] = {f"{name}.bias": (rows,) for name, rows in qkv.items()}
    if model.attention_bias == "qkvo":
        found["attention.output.bias"] = {f"{attention}.o_proj.bias": (d,)}
    for norm in ("q_norm", "k_norm") if model.qk_norm else ():
        found[f"attention.{norm}.weight"] = {f"{attention}.{norm}.weight": (model.head_width,)}
    return {
        "input_norm.weight": {f"model.layers.{layer}.input_layernorm.weight": (d,)},
        **found,
        "post_attention_norm.weight": {f"model.layers.{layer}.post_attention_layernorm.weight": (d,)},
        "mlp.gate_up.weight": {f"{mlp}.gate_proj.weight": (m, d), f"{mlp}.up_proj.weight": (m, d)},
        "mlp.down.weight": {f"{mlp}.down_proj.weight": (d, m)},
    }
