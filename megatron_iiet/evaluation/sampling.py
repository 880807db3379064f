"""Text from a model, one full forward pass a token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_iiet.data.tokenizers.loading import Tokenizer
from megatron_iiet.models.transformer import Transformer


@torch.no_grad()
def sample_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue ``prompt``; an empty prompt starts a document.

    Args:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        seed: of the draw; the same seed gives the same text on one machine.

    Returns:
        str: the continuation, without the prompt; it ends early at the end-of-document token. Where prompt
            and continuation outgrow the rotary table, the model sees the newest tokens only.
    """
    generator = torch.Generator().manual_seed(seed)
    window = model.config.model.max_position_embeddings
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt).tolist()]
    start = len(ids)
    for _ in range(max_new_tokens):
        logits_V = model(torch.tensor([ids[-window:]]))[0, -1]
        token = _draw(logits_V[: tokenizer.vocab_size], temperature, top_k, generator)
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    # Decoded as a whole: a tokenizer may write the first piece of a text without its leading space.
    return tokenizer.decode(ids[1:])[len(tokenizer.decode(ids[1:start])) :]


def _draw(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    return int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))
