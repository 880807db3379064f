"""The systems whose inference benchmarks/inference.py measures: configurations by size, models with random
weights, and what can be said of them without a clock: FLOPs, bytes of weights and of caches."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_iiet.config import RunConfig, config_from_file, iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.hf.export import DTYPES, TOKEN_FIELDS, config_fields
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.models import Transformer

CONFIGS = Path(__file__).resolve().parents[1] / "examples/configs"
LENGTH = 512
"""Tokens that FLOPs are counted for, as in the paper."""
SIZES = ("55m", "340m", "740m", "1.3b")
TOY = "toy"
"""A size for tests: 2 layers of width 64. Its head is not the embedding, or the text would be one token over
and over; and its weights make F no small step, or a wrong cache would hardly be seen."""
_TOY_KEYS = {
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 160,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.vocab_size": 512,
    "model.max_position_embeddings": LENGTH,
    "model.tie_embeddings": False,
    "model.init_std": 0.125,
    "data.sequence_length": LENGTH,
}
PAPER_KEPT = {"340m": 16, "740m": 23}
"""Iterations that E-IIET keeps, of 3 in each of 24 layers: what its FLOPs in Table 3 of arXiv 2509.22463
amount to. Other sizes keep the share of 340m."""
_FULL = 3
"""Corrector iterations a layer of the paper's IIET."""

LLAMA = "LlamaForCausalLM of transformers"
BASELINE = "Transformer++"
FULL = f"IIET r = {_FULL}"
_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("transformer-pp", {"kind": "euler"}),
    "ODE Transformer, RK2": ("rk2", {"kind": "rk2", "stage_coefficients": "learned"}),
    "PCformer": ("pcformer", {"kind": "pcformer", "predictor_order": 2}),
}
"""File in examples/configs, and the solver's keys for a size that has no such file."""


@dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str
    config: RunConfig
    note: str = ""
    """Where its configuration comes from, if not from a file of its size."""

    @property
    def is_llama(self) -> bool:
        """Whether it is transformers' own model."""
        return self.name == LLAMA

    @property
    def iterations(self) -> list[int] | None:
        """Corrector iterations of each layer; None for what has no corrector to iterate."""
        if self.config.solver.kind != "iiet":
            return None
        return iterations_per_layer(self.config)

    def build(self, precision: str, device: torch.device) -> Any:
        """The model with random weights on the device, coefficients in fp32; made there, so that nothing of
        it is elsewhere."""
        fields = config_fields(self.config, dict.fromkeys(TOKEN_FIELDS), precision, as_llama=self.is_llama)
        with device:
            model = LlamaForCausalLM(LlamaConfig(**fields)) if self.is_llama else _iiet(fields)
        for name, parameter in model.named_parameters():
            if ".solver." not in name:
                parameter.data = parameter.data.to(DTYPES[precision])
        return model.eval()


def _iiet(fields: dict[str, Any]) -> IIETForCausalLM:
    return IIETForCausalLM(IIETConfig(**fields))


def systems(size: str, iterations: Sequence[int], plan: Path | None = None) -> list[System]:
    """LLaMA, Transformer++, the other solvers, IIET by falling r, E-IIET.

    Raises:
        ValueError: the plan is none, or none for this size.
    """
    found = [_peer(name, size) for name in _PEERS]
    found.insert(0, System(LLAMA, found[0].config))
    layers = found[0].config.model.num_layers
    for r in sorted(set(iterations), reverse=True):
        found.append(
            System(f"IIET r = {r}" + " (Lower Bound)" * (r == 0), _read("iiet", size, {"iterations": r}))
        )
    kept = round(PAPER_KEPT.get(size, PAPER_KEPT["340m"]) / 24 * layers)
    of_paper = _read("iiet", size, {"iterations": spread(kept, layers)})
    found.append(System(f"E-IIET, {kept} of {_FULL * layers}", of_paper))
    if plan is not None:
        read = IterationPlan.read(plan, layers=layers)
        name = f"E-IIET by {plan.name}, {sum(read.iterations)} of {read.full * layers}"
        found.append(System(name, _read("iiet", size, {"iterations": list(read.iterations)})))
    return found


def spread(kept: int, layers: int) -> list[int]:
    """``kept`` iterations, evenly over the layers: what a token costs depends on their sum."""
    counts = [0] * layers
    for k in range(kept):
        counts[(k * layers // kept) % layers] += 1
    return counts


def _peer(name: str, size: str) -> System:
    file, solver = _PEERS[name]
    if size == TOY or (CONFIGS / f"{file}-{size}.yaml").is_file():
        return System(name, _read(file, size, {}))
    flags = " ".join(f"--solver.{key} {value}" for key, value in solver.items())
    return System(name, _read("iiet", size, solver), f"{name}: from iiet-{size}.yaml with {flags}")


def _read(file: str, size: str, solver: dict[str, Any]) -> RunConfig:
    """A configuration of examples/configs with other keys of its solver."""
    keys = {f"solver.{key}": value for key, value in solver.items()} | (_TOY_KEYS if size == TOY else {})
    words = [
        word
        for key, value in keys.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    with warnings.catch_warnings():  # iterations of iiet, which the other kinds do without
        warnings.filterwarnings("ignore", message=".* without effect for kind")
        return config_from_file(CONFIGS / f"{file}-{'55m' if size == TOY else size}.yaml", words)


def weight_bytes(model: Any) -> int:
    """Of a model's parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Of one token of one sequence, counted in the cache of a forward pass."""
    tokens = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    cache = model(tokens, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 8


def evaluations(config: RunConfig) -> int:
    """Of F for a token, over all layers."""
    return sum(solver.evaluations for solver in Transformer.on_meta(config).solvers.values())


def cache_formula(config: RunConfig, precision: str) -> int:
    """Bytes of a token: 2 · d_kv · bytes · Σ evaluations."""
    width = config.model.num_kv_heads * config.model.head_width
    return 2 * width * DTYPES[precision].itemsize * evaluations(config)


def flops_formula(config: RunConfig) -> int:
    """Of the forward pass of :data:`LENGTH` tokens, as the paper counts them."""
    return Transformer.on_meta(config).forward_flops(LENGTH)


@torch.no_grad()
def flops_counted(model: Any) -> int:
    """Of the same, by torch's counter; on the meta device, which counts without computing."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).eval()  # its attention is chosen in the config
        twin.set_attn_implementation("eager")  # the counter sees its products
        mask = torch.zeros(1, 1, LENGTH, LENGTH)  # a finished one: making one looks at values
        with counter:
            twin(torch.zeros(1, LENGTH, dtype=torch.long), attention_mask=mask, use_cache=False)
    return int(counter.get_total_flops())
