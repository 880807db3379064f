#!/usr/bin/env python
"""What does inference cost? Table 3 of the paper: every system at one size, and transformers' own LLaMA.

    inference.py [--size 340m] [--precision fp32] [--batch 1] [--new-tokens 24] [--prompt 64] [--rounds 3]

Random weights (the cost does not depend on them), `generate()` of transformers with a DynamicCache and greedy
decoding. Printed for each system: decoded tokens a second (by the time between two tokens, its lower quartile
over interleaved rounds: a machine shared with others has slow moments), tokens a second of the prompt (in the
fastest round), time a token against Transformer++ and against transformers' LlamaForCausalLM, how many times
faster than the full IIET, FLOPs of 512 tokens by the paper's formula and as torch counts them, and
bytes of cache a token against 2 · d_kv · bytes · Σ(r_n + 1).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from megatron_iiet.config import RunConfig, config_from_file
from megatron_iiet.hf.export import DTYPES, TOKEN_FIELDS, config_fields
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.models import Transformer

CONFIGS = Path(__file__).resolve().parents[1] / "examples/configs"
LENGTH = 512
"""Tokens that FLOPs are counted for, as in the paper."""
THEIRS = "LlamaForCausalLM of transformers"
KEPT = 16
"""Iterations that E-IIET keeps, of 72 at 24 layers; other depths in proportion."""


def systems(size: str) -> dict[str, RunConfig]:
    """Configurations by name, the baseline first."""
    found = {
        name: config_from_file(CONFIGS / f"{file}-{size}.yaml")
        for name, file in {
            "Transformer++": "transformer-pp",
            "ODE Transformer, RK2": "rk2",
            "PCformer": "pcformer",
            "IIET r = 3": "iiet",
        }.items()
    }
    full = found["IIET r = 3"]
    layers = full.model.num_layers
    kept = round(KEPT / 72 * 3 * layers)
    # The paper's E-IIET keeps iterations in some layers and none in most.
    spread = [0] * layers
    for k in range(kept):
        spread[(k * layers // kept) % layers] += 1
    for name, iterations in {f"E-IIET, {kept} of {3 * layers}": spread, "IIET r = 1": [1] * layers}.items():
        found[name] = config_from_file(
            CONFIGS / f"iiet-{size}.yaml", ["--solver.iterations", str(iterations).replace(" ", "")]
        )
    found["IIET r = 0 (Lower Bound)"] = config_from_file(
        CONFIGS / f"iiet-{size}.yaml", ["--solver.iterations", "0"]
    )
    return found


def llama(config: RunConfig, precision: str) -> LlamaForCausalLM:
    """transformers' own model of the same shape."""
    fields = config_fields(config, dict.fromkeys(TOKEN_FIELDS), precision, as_llama=True)
    fields |= {"tie_word_embeddings": config.model.tie_embeddings}
    return LlamaForCausalLM(LlamaConfig(**fields)).to(DTYPES[precision]).eval()


def ours(config: RunConfig, precision: str) -> IIETForCausalLM:
    """A model with random weights, its coefficients in fp32."""
    fields = config_fields(config, dict.fromkeys(TOKEN_FIELDS), precision, as_llama=False)
    model = IIETForCausalLM(IIETConfig(**fields))
    for name, parameter in model.named_parameters():
        if ".solver." not in name:
            parameter.data = parameter.data.to(DTYPES[precision])
    return model.eval()


class Clock(BaseStreamer):
    """When ``generate`` hands out the prompt and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def seconds_of(model: Any, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Of the first token and of each one after it, greedily, and no fewer tokens."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    clock = Clock()
    model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        generation_config=settings,
        streamer=clock,
    )
    first, *others = [end - start for start, end in itertools.pairwise(clock.times)]
    return first, others


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Of one token of one sequence, counted in the cache of a forward pass."""
    cache = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 8


@torch.no_grad()
def counted_flops(model: Any) -> int:
    """Of the forward pass of :data:`LENGTH` tokens, by torch's counter; on the meta device, which counts
    without computing."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        twin = type(model)(model.config).eval()
        twin.set_attn_implementation("eager")  # the counter sees its products
        mask = torch.zeros(1, 1, LENGTH, LENGTH)  # a finished one: making one looks at values
        with counter:
            twin(torch.zeros(1, LENGTH, dtype=torch.long), attention_mask=mask, use_cache=False)
    return int(counter.get_total_flops())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="340m", choices=("55m", "340m", "740m"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    configs = systems(arguments.size)
    base = next(iter(configs.values()))
    models: dict[str, Any] = {THEIRS: llama(base, arguments.precision)}
    models |= {name: ours(config, arguments.precision) for name, config in configs.items()}
    prompt_BT = torch.randint(base.model.vocab_size, (arguments.batch, arguments.prompt))

    prompts = {name: float("inf") for name in models}
    tokens: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.rounds + 1):  # the first warms up, and can only be slower
        for name, model in models.items():
            first, others = seconds_of(model, prompt_BT, arguments.new_tokens)
            prompts[name] = min(prompts[name], first)
            tokens[name] += others

    def a_token(name: str) -> float:
        return sorted(tokens[name])[len(tokens[name]) // 4]

    print(
        f"{arguments.size}, {arguments.precision}, batch {arguments.batch}, prompt {arguments.prompt}, "
        f"{arguments.new_tokens} new tokens, {arguments.threads} threads, torch {torch.__version__}\n"
    )
    columns = ["system", "tokens/s", "prompt tokens/s", "time a token", "against LLaMA", "against IIET"]
    columns += ["TFLOPs", "counted", "cache bytes a token", "of the formula"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, model in models.items():
        config = configs.get(name, base)
        shape, formula = config.model, Transformer.on_meta(config)
        evaluations = sum(solver.evaluations for solver in formula.solvers.values())
        bytes_each = DTYPES[arguments.precision].itemsize
        expected = 2 * shape.num_kv_heads * shape.head_dim * bytes_each * evaluations
        measured = cache_bytes(model)
        cells = [
            name,
            f"{arguments.batch / a_token(name):.2f}",
            f"{arguments.batch * arguments.prompt / prompts[name]:.0f}",
            f"{a_token(name) / a_token('Transformer++'):.2f}x",
            f"{a_token(name) / a_token(THEIRS):.2f}x",
            f"{a_token('IIET r = 3') / a_token(name):.2f}x faster",
            f"{formula.forward_flops(LENGTH) / 1e12:.3f}",
            f"{counted_flops(model) / 1e12:.3f}",
            f"{measured:,}",
            f"{measured / expected:.3f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
