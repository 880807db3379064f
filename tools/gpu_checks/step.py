"""A training step: Transformer++ against transformers' LlamaForCausalLM, and IIET against its FLOPs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpu_checks.base import Figure, Setting, race, synchronize
from megatron_iiet.config import RunConfig, config_from_file
from megatron_iiet.models import Transformer
from megatron_iiet.ops import resolve_backend
from megatron_iiet.training.utilisation import step_flops

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
TOY_SHAPE = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.num_attention_heads": 2,
    "model.vocab_size": 512,
    "model.max_position_embeddings": 64,
    "data.sequence_length": 64,
}
TOY = [word for key, value in TOY_SHAPE.items() for word in (f"--{key}", str(value))]
MICRO_BATCH = {"55m": 16, "340m": 8}
RECOMPUTE = ("off", "evaluation", "layer")
MODEL_OF_MEMORY = "<= 1.15"
"""Of the estimate that the presets' sizes rest on: what a preset says fits must fit."""


def preset(name: str, setting: Setting, *options: str) -> RunConfig:
    """A preset of examples/configs, or its toy."""
    return config_from_file(CONFIGS / f"{name}.yaml", [*options, *(TOY if setting.toy else ())])


def ours(config: RunConfig, device: str) -> Transformer:
    """As training has it: matrices in bf16, what is marked so in fp32."""
    backend, reason = resolve_backend("auto", device)
    print(f"merge_norm: {backend} ({reason})")
    with torch.device(device):
        model = Transformer(config, backend=backend)
    model.initialise(0)  # drawn on the CPU, whatever the device
    for parameter in model.parameters():
        if not hasattr(parameter, "keep_fp32"):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def llama(config: RunConfig, device: str) -> nn.Module:
    """transformers' model of the same shape, with the same SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    fields: dict[str, Any] = {
        "hidden_size": shape.hidden_size, "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_kv_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings, "tie_word_embeddings": shape.tie_embeddings,
        "attn_implementation": "sdpa", "use_cache": False,
    }  # fmt: skip
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**fields))
        model.to(torch.bfloat16)
    return cast(nn.Module, model)


def step_of(model: nn.Module, loss: Callable[[Tensor], Tensor], batch: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW, the same fused one for both."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def our_step(
    config: RunConfig, device: str, batch: Tensor, change: Callable[[Any], Any] = lambda m: m
) -> Any:
    model = ours(config, device)
    called = change(model)
    return step_of(model, lambda tokens: called(tokens[:, :-1], tokens[:, 1:]), batch)


def their_step(
    config: RunConfig, device: str, batch: Tensor, change: Callable[[Any], Any] = lambda m: m
) -> Any:
    model = llama(config, device)
    called = change(model)
    return step_of(model, lambda tokens: called(tokens[:, :-1], labels=tokens[:, :-1]).loss, batch)


def batch_of(config: RunConfig, setting: Setting, micro_batch: int) -> Tensor:
    shape = (1 if setting.toy else micro_batch, config.data.sequence_length + 1)
    return torch.randint(config.model.vocab_size, shape, device=setting.device)


def product_rate(setting: Setting) -> float:
    """FLOP/s of a product of two square matrices in bf16, the limit of this machine."""
    n = 256 if setting.toy else 8192
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times = race({"product": lambda: [a @ b for _ in range(5)]}, setting.device, 8)
    return 5 * 2 * n**3 / times["product"]


def peak_of(make: Callable[[], Callable[[], None]], device: str) -> int:
    """Bytes that a step needs at most, with weights and optimizer."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    run(), run()
    synchronize(device)
    return torch.cuda.max_memory_allocated()


def check(setting: Setting) -> Iterator[Figure]:
    """Sizes from small to large, as far as the time goes."""
    rate = product_rate(setting)
    yield Figure("product of matrices, bf16", rate / 1e12, "TFLOP/s")
    for size in ("55m",) if setting.toy else ("55m", "340m"):
        if setting.time_for(f"{size} against LlamaForCausalLM", 15):
            yield from _against_llama(setting, size, rate)
        if setting.time_for(f"{size} against FLOPs", 15):
            yield from _against_flops(setting, size)
    if setting.device == "cuda":
        yield from _memory(setting)


def _against_llama(setting: Setting, size: str, rate: float) -> Iterator[Figure]:
    config = preset(f"transformer-pp-{size}", setting)
    batch = batch_of(config, setting, MICRO_BATCH[size])
    flops = step_flops(Transformer.on_meta(config), config.data.sequence_length, "off")[0] * batch.shape[0]
    for how, change in (("eager", lambda m: m), ("torch.compile", torch.compile)):
        compiled = how == "torch.compile"
        if compiled and (setting.toy or size != "55m" or not setting.time_for(f"{size} compiled", 40)):
            continue
        try:
            contenders = {
                "ours": our_step(config, setting.device, batch, change),
                "LLaMA": their_step(config, setting.device, batch, change),
            }
            times = race(contenders, setting.device, 3 if setting.toy else 12, lambda: setting.left > 8)
        except Exception as error:  # a compiler that fails is a finding of its own
            if how == "eager":
                raise
            yield Figure(f"{size}, {how}", None, note=f"refused: {type(error).__name__}: {error}"[:200])
            continue
        bound = setting.judged(">= 1.0") if how == "eager" else ""
        milliseconds = f"{times['ours'] * 1e3:.1f} ms, {batch.shape[0]} x {batch.shape[1] - 1} tokens"
        limit, mfu = "the product above", {name: flops / seconds / rate for name, seconds in times.items()}
        peer = "LlamaForCausalLM, same SDPA and AdamW"
        faster = times["LLaMA"] / times["ours"]
        yield Figure(f"Transformer++ {size}, {how}: step", faster, "times faster", peer, bound, milliseconds)
        yield Figure(f"Transformer++ {size}, {how}: MFU", mfu["ours"], "", limit)
        yield Figure(f"LlamaForCausalLM {size}, {how}: MFU", mfu["LLaMA"], "", limit)


def _against_flops(setting: Setting, size: str) -> Iterator[Figure]:
    """What an iteration costs beside what it computes."""
    configs = {"Transformer++": preset(f"transformer-pp-{size}", setting)}
    configs |= {f"r = {r}": preset(f"iiet-{size}", setting, "--solver.iterations", str(r)) for r in (1, 3)}
    base = configs["Transformer++"]
    batch = batch_of(base, setting, MICRO_BATCH[size] // 2)
    length = base.data.sequence_length
    flops = {name: step_flops(Transformer.on_meta(c), length, "off")[0] for name, c in configs.items()}
    contenders = {name: our_step(config, setting.device, batch) for name, config in configs.items()}
    times = race(contenders, setting.device, 3 if setting.toy else 8, lambda: setting.left > 5)
    for name in list(configs)[1:]:
        measured = times[name] / times["Transformer++"]
        by_flops = flops[name] / flops["Transformer++"]
        note = f"time {measured:.3f}, FLOPs {by_flops:.3f}"
        bound = setting.judged("<= 1.05") if name == "r = 3" else ""
        label = f"IIET {size}, {name}: time ratio over FLOPs ratio"
        yield Figure(label, measured / by_flops, "", "Transformer++", bound, note)


def estimate(config: RunConfig, micro_batch: int) -> float:
    """Bytes on one GPU by the formula of examples/configs/sizes/common.yaml, without recomputation.

    But for the state: gradients and AdamW's two moments are bf16 here, and there are no master weights.
    """
    model = Transformer.on_meta(config)
    shape = config.model
    state = model.num_parameters() * (2 + 2 + 4)
    evaluations = sum(solver.evaluations for solver in model.solvers.values())
    a_token = evaluations * (36 * shape.hidden_size + 8 * shape.ffn_hidden_size) + 4 * shape.vocab_size
    if config.solver.kind != "euler":
        a_token += shape.num_layers * 2 * shape.hidden_size
    return state + micro_batch * config.data.sequence_length * a_token


def _memory(setting: Setting) -> Iterator[Figure]:
    for name, options in (("transformer-pp-55m", ()), ("iiet-55m", ("--solver.iterations", "3"))):
        for mode in RECOMPUTE:
            if not setting.time_for(f"memory of {name}, recompute {mode}", 6):
                continue
            config = preset(name, setting, *options, "--training.recompute", mode)
            batch = batch_of(config, setting, 8)
            peak = peak_of(partial(our_step, config, setting.device, batch), setting.device)
            expected = estimate(config, batch.shape[0])
            bound = setting.judged(MODEL_OF_MEMORY) if mode == "off" else ""
            note = f"{peak / 2**30:.2f} GiB, estimate without recomputation {expected / 2**30:.2f}"
            label = f"{name}, recompute {mode}: peak memory over the presets' estimate"
            yield Figure(label, peak / expected, "", "the presets' estimate", bound, note)
