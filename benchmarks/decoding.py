#!/usr/bin/env python
"""What do drafts with fewer iterations save, and cheaper caches cost? On a trained model and real text.

    decoding.py --model runs/iiet --text valid.jsonl.zst [--draft 0 --draft 1 --draft plan.json]

Drafts: greedy continuations of the beginnings of documents, plain and with the model's own weights at fewer
iterations as assistant (transformers' assisted generation, its draft length adapting); the output must be the
same, token for token. Printed: tokens a second against plain decoding in the same run; how many tokens each
pass of the full model yields; and how many times fewer passes through layers (drafts' included, whatever the
number of tokens in a pass) a token takes: the speed-up where reading weights is what costs. Rounds are
interleaved and the best of each is taken.

Caches: mean cross-entropy of the rest of each document, fed token by token behind its beginning, and bytes of
cache a token, for each value of kv_cache.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from megatron_iiet.data.reading.text import iter_documents
from megatron_iiet.hf.generation import TextGenerator, open_generator


def beginnings(generator: TextGenerator, path: str, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of documents that have as many, [count, length]."""
    rows: list[list[int]] = []
    for text in iter_documents([path]):
        ids = generator.codec.encode(text[: 12 * length])
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows)
    raise SystemExit(f"error: {path} has only {len(rows)} documents of {length} tokens; ask for fewer")


class Counted:
    """A model whose forward passes are counted."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0
        model.lm_head.register_forward_pre_hook(self._count)  # drafts do without the model's forward

    def _count(self, *_: Any) -> None:
        self.calls += 1

    @property
    def evaluations(self) -> int:
        """Of layers, in all passes counted."""
        return self.calls * sum(self.model.config.evaluations)


@torch.no_grad()
def continued(
    full: Counted, draft: Counted | None, prompts: Tensor, new_tokens: int
) -> tuple[list[Tensor], float]:
    """Greedy continuations one by one, and seconds."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    started = time.perf_counter()
    made = [
        full.model.generate(
            row[None],
            attention_mask=torch.ones_like(row[None]),
            generation_config=settings,
            assistant_model=None if draft is None else draft.model,
        )[0]
        for row in prompts
    ]
    return made, time.perf_counter() - started


def measure_drafts(generator: TextGenerator, drafts: list[str], prompts: Tensor, arguments: Any) -> None:
    assistants: dict[str, Counted | None] = {"plain": None}
    for spec in drafts:
        for threshold in (0.4, 0.2):
            view = generator.model.with_iterations(int(spec) if spec.isdecimal() else spec)
            view.generation_config.assistant_confidence_threshold = threshold
            assistants[f"draft {spec}, stops below {threshold}"] = Counted(view)
    full = Counted(generator.model)  # now: views take a model's hooks over
    seconds = dict.fromkeys(assistants, float("inf"))
    counts: dict[str, tuple[int, int]] = {}
    expected: list[Tensor] = []
    for _ in range(arguments.rounds):
        for name, draft in assistants.items():
            full.calls = 0
            if draft is not None:
                draft.calls = 0
            made, took = continued(full, draft, prompts, arguments.new_tokens)
            seconds[name] = min(seconds[name], took)
            counts[name] = full.calls, full.evaluations + (0 if draft is None else draft.evaluations)
            expected = expected or made
            assert all(map(torch.equal, made, expected)), f"{name}: another text than plain decoding"
    total = len(prompts) * arguments.new_tokens
    print(
        "| decoding | tokens/s | against plain | tokens a pass of the full model | fewer passes of layers |"
    )
    print("|---|---|---|---|---|")
    for name, took in seconds.items():
        passes, evaluations = counts[name]
        cells = [f"{total / took:.1f}", f"{seconds['plain'] / took:.2f}x", f"{total / passes:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {counts['plain'][1] / evaluations:.2f}x |")


@torch.no_grad()
def loss_by_token(model: Any, tokens_BT: Tensor, start: int) -> tuple[float, int]:
    """Mean cross-entropy of the tokens behind ``start``, in nats, and bytes of cache for one token."""
    out = model(tokens_BT[:, :start], use_cache=True)
    cache, losses = out.past_key_values, []
    for t in range(start, tokens_BT.shape[1]):
        losses.append(F.cross_entropy(out.logits[:, -1].float(), tokens_BT[:, t]))
        out = model(tokens_BT[:, t : t + 1], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return torch.stack(losses).mean().item(), held // tokens_BT.numel()


def measure_caches(arguments: Any, tokens: Tensor) -> None:
    print("\n| kv_cache | cross-entropy | − all | bytes a token |\n|---|---|---|---|")
    exact = 0.0
    for kind in ("all", "last", "first"):
        model = open_generator(arguments.model, tokenizer=arguments.tokenizer, kv_cache=kind).model
        loss, held = loss_by_token(model, tokens, arguments.prompt)
        exact = exact or loss
        print(f"| {kind} | {loss:.4f} | {loss - exact:+.4f} | {held:,} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--text", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the model's")
    parser.add_argument("--draft", action="append", metavar="N|FILE", help="default: 0")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    generator = open_generator(arguments.model, tokenizer=arguments.tokenizer)
    length = arguments.prompt + arguments.new_tokens
    tokens = beginnings(generator, arguments.text, arguments.prompts, length)
    measure_drafts(generator, arguments.draft or ["0"], tokens[:, : arguments.prompt], arguments)
    measure_caches(arguments, tokens)


if __name__ == "__main__":
    main()
