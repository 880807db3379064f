"""How fast a model decodes, with which caches, in how much memory, and whether all caches give the same text.

A clock is read only when the device has done what it was asked for before.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from inference_systems import System
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

COMPILED = "static, compiled"
CACHES = ("dynamic", "static", COMPILED)
"""transformers' DynamicCache and StaticCache; and the latter with each token's forward pass compiled, as CUDA
graphs where there is CUDA."""
BACKEND = "inductor"
LARGEST_DIFFERENCE = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05}
"""Of logits with two kinds of cache, ‖Δ‖ / ‖logits‖ over all tokens. On a CPU at 55m rounding makes 2.5e-7 of
it in fp32 and 0.005 in bf16, and a cache that has lost a third of the prompt's values 0.15. The text alone
would not tell: where the head is the embedding, random weights repeat the last token with any cache."""


class Clock(BaseStreamer):
    """When ``generate`` hands out the prompt and then each token, all of the device's work for it done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Comparison:
    """Text decoded with a kind of cache beside that of a DynamicCache."""

    tokens_equal: bool
    parts_at: int | None
    """New token, from 1, at which a first sequence parts."""
    difference: float
    """‖Δ logits‖ / ‖logits‖ over what both computed from the same tokens."""
    passed: bool
    """Equal tokens and logits as near as rounding allows; below fp32 the latter is enough, since where two
    tokens are about as probable rounding chooses."""

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.passed and self.tokens_equal:
            return "equal"
        where = "tokens equal" if self.tokens_equal else f"tokens part at {self.parts_at}"
        size = f"logits {self.difference:.1e} apart"
        return f"equal up to rounding: {where}, {size}" if self.passed else f"UNEQUAL: {where}, {size}"


@dataclass
class Decoding:
    """What was seen of one system with one kind of cache."""

    tokens: list[float] = field(default_factory=list)
    """Seconds between two tokens of a sequence."""
    prompt: float = float("inf")
    """Seconds to the first token, in the fastest round."""
    peak_bytes: int | None = None
    """Most that torch gave out on the device while it decoded; None on a CPU."""
    refused: str = ""
    """Why there are no figures."""
    compiled: dict[str, int] | None = None
    """Of :data:`COMPILED`: graphs, breaks between graphs, graphs that did not become CUDA graphs."""
    comparison: Comparison | None = None

    @property
    def seconds(self) -> float:
        """Of a token: the lower quartile, since a machine shared with others has slow moments."""
        return sorted(self.tokens)[len(self.tokens) // 4]


@dataclass
class Subject:
    """A system with its model, while it is measured."""

    system: System
    model: Any
    decodings: dict[str, Decoding]

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device


def settings(cache: str, new_tokens: int, *, logits: bool = False) -> GenerationConfig:
    """Greedy decoding of exactly so many tokens. A static cache without ``disable_compile`` would be compiled
    on CUDA unasked."""
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        COMPILED: {"cache_implementation": "static", "compile_config": _compile_config()},
    }
    ways[cache] |= {"return_dict_in_generate": True, "output_logits": True} if logits else {}
    return GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **ways[cache]
    )


def _compile_config() -> CompileConfig:
    chosen = CompileConfig(mode="reduce-overhead", backend=BACKEND)
    chosen._compile_all_devices = True  # type: ignore[assignment]  # on a CPU as well, where there are no CUDA graphs
    return chosen


@torch.no_grad()
def decode(model: Any, prompt_BT: Tensor, config: GenerationConfig, clock: Clock | None = None) -> Any:
    """transformers' ``generate``; a compiled pass that would quietly run uncompiled is an error instead."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=config, streamer=clock
        )


def measure(subjects: Sequence[Subject], prompt_BT: Tensor, new_tokens: int, rounds: int) -> None:
    """Time all subjects in interleaved rounds; the first warms up, and can only be slower. One kind of cache
    after the other, compiled last: CUDA graphs keep memory for good."""
    for cache in subjects[0].decodings:
        for _ in range(rounds + 1):
            for subject in subjects:
                if not subject.decodings[cache].refused:
                    _measure(subject, cache, prompt_BT, new_tokens)


def _measure(subject: Subject, cache: str, prompt_BT: Tensor, new_tokens: int) -> None:
    decoding, device, clock = subject.decodings[cache], subject.device, Clock(subject.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if cache == COMPILED and not decoding.tokens:
        counters.clear()
    try:
        decode(subject.model, prompt_BT, settings(cache, new_tokens), clock)
        if cache == COMPILED:
            decoding.compiled = _compilation()
    except Exception as error:  # the other rows are worth having
        print(f"{subject.system.name}, {cache} cache, refused:", file=sys.stderr)
        traceback.print_exc()
        decoding.refused = reason(error)
        return
    first, *others = [end - start for start, end in itertools.pairwise(clock.times)]
    decoding.prompt = min(decoding.prompt, first)
    decoding.tokens += others
    if device.type == "cuda":
        decoding.peak_bytes = max(decoding.peak_bytes or 0, torch.cuda.max_memory_allocated(device))


def _compilation() -> dict[str, int]:
    """What the compiler counted since the counters were cleared.

    Raises:
        RuntimeError: it did nothing.
    """
    found = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
    if not found["graphs"]:
        raise RuntimeError("transformers ran the pass uncompiled")
    return found


def reason(error: Exception) -> str:
    """The beginning of an error, fit for a cell of a table; the compiler's second line says what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join((f"{type(error).__name__}:", *lines[:2]))
    return words.replace("|", "/").removesuffix(":")[:200]


def compare(subject: Subject, prompt_BT: Tensor, new_tokens: int, precision: str) -> None:
    """Hold the text of every other cache against that of a DynamicCache."""
    others = [name for name, found in subject.decodings.items() if name != "dynamic" and not found.refused]
    if not others:
        return
    expected = decode(subject.model, prompt_BT, settings("dynamic", new_tokens, logits=True))
    for cache in others:
        found = decode(subject.model, prompt_BT, settings(cache, new_tokens, logits=True))
        one, other = (output.sequences[:, prompt_BT.shape[1] :] for output in (expected, found))
        subject.decodings[cache].comparison = compared(one, other, expected.logits, found.logits, precision)


def compared(
    expected_BT: Tensor, found_BT: Tensor, expected: Sequence[Tensor], found: Sequence[Tensor], precision: str
) -> Comparison:
    """Compare new tokens [B, T] and the logits [B, V] that each was chosen by, T of them."""
    same_BT = expected_BT == found_BT
    before_BT = same_BT.long().cumprod(dim=1).roll(1, dims=1).bool()  # all tokens before this one equal
    before_BT[:, 0] = True
    apart = size = 0.0
    for t, (expected_BV, found_BV) in enumerate(zip(expected, found, strict=True)):
        rows = before_BT[:, t]
        apart += (found_BV[rows].double() - expected_BV[rows].double()).square().sum().item()
        size += expected_BV[rows].double().square().sum().item()
    difference = (apart / size) ** 0.5
    equal = bool(same_BT.all())
    parts_at = None if equal else int((~same_BT).any(dim=0).long().argmax()) + 1
    near = difference <= LARGEST_DIFFERENCE[precision]  # false for NaN
    return Comparison(equal, parts_at, difference, near and (equal or precision != "fp32"))
