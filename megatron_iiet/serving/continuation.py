"""One sequence: what is asked for, the tokens it has, and the text that is certain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from megatron_iiet.hf.generation import Codec, Sampling

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Order:
    """What to continue, and how far."""

    prompt: list[int]
    max_tokens: int
    """0: the prompt is only read, and scored."""
    sampling: Sampling = field(default_factory=lambda: Sampling(0.0, 0, 1.0))
    seed: int = 0
    """Of the draw, which does not depend on what else runs."""
    stop: tuple[str, ...] = ()
    """Texts before which it ends."""
    logprobs: int | None = None
    """So many likeliest tokens are told beside each token; None: nothing is."""
    prompt_logprobs: bool = False
    """Also of the prompt's tokens."""


@dataclass(frozen=True)
class TokenScore:
    """A token and what the model thought of it."""

    text: str
    """What it adds to the text before it; empty where a character is not complete."""
    logprob: float | None
    """In nats, of the model as it is (temperature 1, nothing cut); None for the first one of a prompt."""
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What is new of a sequence."""

    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    finish: Literal["stop", "length"] | None = None
    """Why nothing more comes."""
    error: str = ""
    """Why nothing more comes although the text has not ended."""


class Detokenizer:
    """Ids to text, id by id: together exactly what the ids behind ``before`` add to its text. (Of single
    bytes that are no text, transformers also takes back the good ones before them; here those stay.)"""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        # Decoded together with the ids before, for a tokenizer may write the first piece of a text without
        # its leading space; but not with all of them, which would take ever longer.
        self._ids = list(before)
        self._read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""

    def peek(self, token: int) -> str:
        """What ``token`` would add, complete or not."""
        return self._decode([*self._ids, token])[len(self._known) :]

    def add(self, token: int) -> str:
        """What is certain now."""
        self._ids.append(token)
        text = self._decode(self._ids)
        new = text[len(self._known) :]
        if not new or new.endswith(_INCOMPLETE):  # the last character may still be part of one
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        return new

    def finish(self) -> str:
        """What is left at the end."""
        return self._decode(self._ids)[len(self._known) :]


class StopFilter:
    """Text up to the first of some texts; holds back what may turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What is certain now; nothing once it has stopped."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        longest = min(len(held), max(map(len, self._stops), default=0))
        kept = next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(held[-n:]) for stop in self._stops)), 0
        )
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


class Continuation:
    """The state of a sequence. The thread that runs the batch owns it; others only call :meth:`cancel`."""

    def __init__(self, order: Order, codec: Codec, tell: Callable[[Update], None]) -> None:
        """``tell`` is called with every piece of news, the last one with ``finish`` or ``error``."""
        self.order = order
        self.tokens: list[int] = []
        """Made so far."""
        self.ended = False
        self.tell = tell
        self._eos = codec.eos_id
        self._detokenizer = Detokenizer(codec.decode, order.prompt)
        self._filter = StopFilter(order.stop)
        self._cancelled = threading.Event()
        self._generator: torch.Generator | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves before the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def draw(self, logits_V: Tensor) -> int:
        """The next token by the order's sampling with a temperature above 0."""
        if self._generator is None:
            self._generator = torch.Generator(logits_V.device).manual_seed(self.order.seed)
        sampling = self.order.sampling
        # From the largest on: no temperature is so low that it makes an infinity of it.
        scores_1V = ((logits_V - logits_V.max()) / sampling.temperature)[None]
        nothing = torch.empty(0, dtype=torch.long)
        if sampling.top_k:
            scores_1V = TopKLogitsWarper(sampling.top_k)(nothing, scores_1V)
        if sampling.top_p < 1:
            scores_1V = TopPLogitsWarper(sampling.top_p)(nothing, scores_1V)
        return int(torch.multinomial(scores_1V.softmax(-1), 1, generator=self._generator))

    def take(
        self, token: int | None, logprobs_V: Tensor | None = None, scores: tuple[TokenScore, ...] = ()
    ) -> Update:
        """Go on by a token; None: there is none to make. What is new has yet to be told.

        Args:
            logprobs_V: what it was chosen from, in nats, to tell of.
            scores: of the prompt, to be told with it.
        """
        text = ""
        finish: Literal["stop", "length"] | None = "length"
        if token is not None:
            self.tokens.append(token)
            if logprobs_V is not None:
                scores = (*scores, score_of(token, logprobs_V, self.order.logprobs or 0, self._detokenizer))
            new = self._detokenizer.add(token) if logprobs_V is None else scores[-1].text
            text = self._filter.add(new)
            if token == self._eos or self._filter.stopped:
                finish = "stop"
            elif len(self.tokens) < self.order.max_tokens:
                finish = None
        if finish:
            text += self._filter.add(self._detokenizer.finish()) + self._filter.finish()
            finish = "stop" if self._filter.stopped else finish
        self.ended = finish is not None
        return Update(text, scores, finish)

    def fail(self, why: str) -> None:
        """End it without a text, and tell so; one that has ended is left as it is."""
        if not self.ended:
            self.ended = True
            self.tell(Update(error=why))


def score_of(token: int, logprobs_V: Tensor, likeliest: int, detokenizer: Detokenizer) -> TokenScore:
    """``token`` and the ``likeliest`` ones with their log-probabilities in nats; the detokenizer goes on."""
    values, ids = logprobs_V.topk(min(likeliest, len(logprobs_V)))
    top = tuple(zip(map(detokenizer.peek, ids.tolist()), values.tolist(), strict=True))
    return TokenScore(detokenizer.add(token), float(logprobs_V[token]), top)
