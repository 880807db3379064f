"""The batch: sequences that join and leave between two tokens, and the model that continues them all at once.

Each sequence gets what it would get alone, up to the last bits of the arithmetic.

Shapes: B sequences, T tokens of the longest prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from megatron_iiet.config.hugging_face import FAMILIES
from megatron_iiet.config.keys import join_words
from megatron_iiet.hf.generation import Codec
from megatron_iiet.serving.cache import RowCache
from megatron_iiet.serving.continuation import Continuation, Detokenizer, TokenScore, Update, score_of

_SAME_AT_ANY_LENGTH = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding of which a sequence's angles do not depend on how long others are."""
_ROWS_OF_LOGITS = 128
"""Tokens of a prompt whose logits are made at once."""
_READ_AT_ONCE = 2048
"""Tokens of prompts, padding included, in one forward pass of several prompts."""
_MOST_PADDED = 1.5
"""Tokens with padding for each token of prompts that are read together."""


def check_batches(model: Any) -> None:
    """Refuse a model of which it is not known that sequences in a batch do not disturb each other.

    Raises:
        ValueError: with what would do.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        titles = join_words([family.title for family in FAMILIES.values()], "and")
        raise ValueError(
            f"the model is a {type(model).__name__}, but only {titles} are known to give the same text in a "
            "batch as alone; serve it with its own software"
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise ValueError(
            f"the model has a sliding_window of {window}, which forgets what a batch still needs; serve it "
            "with its own software"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _SAME_AT_ANY_LENGTH:
        raise ValueError(
            f"the model's rope_type is {rope!r}, with which the longest sequence of a batch changes all "
            f"others; it can be {', '.join(_SAME_AT_ANY_LENGTH)}"
        )
    if getattr(config, "kv_cache", "all") == "last" and max(config.evaluations) > 1:
        raise ValueError(
            "kv_cache is 'last', with which a text depends on how many tokens are read at once; use 'all', "
            "or 'first' for a model that was trained with it"
        )


def next_group(waiting: Sequence[Continuation], places: int) -> int:
    """How many of the first ones in ``waiting`` are read together: no more than there are free ``places``,
    and not so different in length that much of the work would be padding."""
    longest = total = 0
    for count, continuation in enumerate(waiting[:places], start=1):
        length = len(continuation.order.prompt)
        longest, total = max(longest, length), total + length
        if count > 1 and longest * count > min(_READ_AT_ONCE, _MOST_PADDED * total):
            return count - 1
    return min(len(waiting), places)


class Batch:
    """The sequences that run, and the model. One thread only."""

    def __init__(self, model: Any, codec: Codec, *, places: int, context: int) -> None:
        """``places``: most sequences; ``context``: most tokens of one, prompt and continuation.

        Raises:
            ValueError: as :func:`check_batches`.
        """
        check_batches(model)
        self.model = model.eval()
        self.codec = codec
        self.places = places
        self.context = context
        self.reset()

    def reset(self) -> None:
        """Forget all sequences."""
        self.running: list[Continuation] = []
        self._cache = RowCache(self.places, self.context)

    @torch.no_grad()
    def read(self, group: Sequence[Continuation]) -> tuple[DynamicCache, Tensor]:
        """The cache of new sequences' prompts, and the model's outputs [B, T, D]; padded at the right, which
        a causal model does not see. The batch stays as it is."""
        lengths = [len(each.order.prompt) for each in group]
        tokens_BT = torch.zeros((len(group), max(lengths)), dtype=torch.long)
        for row_T, each in zip(tokens_BT, group, strict=True):
            row_T[: len(each.order.prompt)] = torch.tensor(each.order.prompt)
        cache = DynamicCache(config=self.model.config)
        output = self.model.base_model(tokens_BT.to(self.model.device), past_key_values=cache, use_cache=True)
        return cache, output.last_hidden_state

    @torch.no_grad()
    def join(self, group: Sequence[Continuation], cache: DynamicCache, hidden_BTD: Tensor) -> None:
        """Take in what :meth:`read` made of ``group``, and make the first token of each."""
        lengths = [len(each.order.prompt) for each in group]
        self._cache.append(cache, lengths)
        self.running += group
        prompts = [self._prompt_scores(*pair) for pair in zip(group, hidden_BTD, strict=True)]
        last = torch.tensor(lengths, device=hidden_BTD.device) - 1
        rows = torch.arange(len(group), device=hidden_BTD.device)
        self._choose(group, self._logits(hidden_BTD[rows, last]), prompts)

    @torch.no_grad()
    def step(self) -> None:
        """Make the next token of every sequence."""
        group, device = list(self.running), self.model.device
        positions_B1, mask_B11S = self._cache.extend(self.model.dtype)
        output = self.model.base_model(
            torch.tensor([[each.tokens[-1]] for each in group], device=device),
            attention_mask=mask_B11S,
            position_ids=positions_B1,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._choose(group, self._logits(output.last_hidden_state[:, -1]), [()] * len(group))

    def leave(self, continuation: Continuation) -> None:
        """Free the place of a sequence."""
        row = self.running.index(continuation)
        self._cache.remove(row)
        self.running[row] = self.running[-1]
        self.running.pop()

    def run(self, continuations: Sequence[Continuation]) -> None:
        """Continue all of them to their ends, as many at once as there are places."""
        waiting = list(continuations)
        while waiting or self.running:
            group = [waiting.pop(0) for _ in range(next_group(waiting, self.places - len(self.running)))]
            if group:
                self.join(group, *self.read(group))
            if self.running:
                self.step()

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        """fp32 [B, V]; ids that the tokenizer does not have are impossible."""
        logits_BV = self.model.get_output_embeddings()(hidden_BD).float()
        logits_BV[:, self.codec.vocab_size :] = -torch.inf
        return logits_BV

    def _choose(
        self,
        group: Sequence[Continuation],
        logits_BV: Tensor,
        before: Sequence[tuple[TokenScore, ...]],
    ) -> None:
        """The next token of each; who has ended leaves."""
        likeliest = logits_BV.argmax(-1).tolist()
        sound = logits_BV.amax(-1).isfinite().tolist()
        for each, logits_V, token, is_sound, scores in zip(
            group, logits_BV, likeliest, sound, before, strict=True
        ):
            if not is_sound:
                self.leave(each)
                each.fail("the model's logits are no finite numbers; its weights are damaged or overflow")
                continue
            chosen = logprobs_V = None
            if each.order.max_tokens:
                chosen = each.draw(logits_V) if each.order.sampling.temperature else token
                logprobs_V = None if each.order.logprobs is None else logits_V.log_softmax(-1)
            update = each.take(chosen, logprobs_V, scores)
            if each.ended:
                self.leave(each)  # first: who hears of it may already want the place
            if update != Update():
                each.tell(update)

    def _prompt_scores(self, continuation: Continuation, hidden_TD: Tensor) -> tuple[TokenScore, ...]:
        order = continuation.order
        if not order.prompt_logprobs:
            return ()
        detokenizer = Detokenizer(self.codec.decode)
        scores = [TokenScore(detokenizer.add(order.prompt[0]), None)]
        for start in range(0, len(order.prompt) - 1, _ROWS_OF_LOGITS):
            end = min(start + _ROWS_OF_LOGITS, len(order.prompt) - 1)
            for logprobs_V, token in zip(
                self._logits(hidden_TD[start:end]).log_softmax(-1), order.prompt[start + 1 :], strict=False
            ):
                scores.append(score_of(token, logprobs_V, order.logprobs or 0, detokenizer))
        return tuple(scores)
