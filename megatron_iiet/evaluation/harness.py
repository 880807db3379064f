"""A model behind the interface of lm-evaluation-harness, and its tasks run on it. Batches are dealt to the
replicas, and all processes get all answers: for the harness there is one process."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_iiet.data.tokenizers.base import Tokenizer, token_before
from megatron_iiet.evaluation.scoring import Scorer, TokenScores
from megatron_iiet.hf.generation import Sampling
from megatron_iiet.parallel.launch import variables_set
from megatron_iiet.serving.continuation import Order, Update

MAX_ROWS = 256
"""Most sequences of one batch, however short."""
BOOTSTRAP = 100
"""Resamples for the standard error of metrics without a formula."""
_PROGRESS_SECONDS = 30.0
_TOP_K = 50
"""Of a task that draws and does not say from how many tokens: transformers' own."""

Answer = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding would write it."""


@dataclass(frozen=True)
class TextCodec:
    """How a model's text becomes tokens."""

    encode: Callable[[str], list[int]]
    """Ids of a text, whatever its tokenizer adds to it included."""
    start_id: int
    """What a text without context is conditioned on: the token before the first one of a document."""
    end_id: int
    """Ends a document; fills up batches."""


def own_text_codec(tokenizer: Tokenizer, text_follows: str) -> TextCodec:
    """Of a tokenizer of the data room: a text with a context follows nothing, as in the harness, or a bos
    token where the model knows no text without.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    first = token_before(tokenizer, text_follows)
    before = [first] if first is not None and text_follows == "bos" else []
    start = tokenizer.eod_id if first is None else first
    return TextCodec(lambda text: [*before, *tokenizer.encode(text).tolist()], start, tokenizer.eod_id)


@dataclass(frozen=True)
class TaskResults:
    """What tasks gave."""

    metrics: dict[str, dict[str, float]]
    """Metric → value by task; standard errors are ``METRIC_stderr``."""
    rows: dict[str, int]
    """Rows evaluated, by task."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Of the tasks' definitions."""


class HarnessModel(TemplateLM):
    """What the harness calls."""

    def __init__(
        self, scorer: Scorer, codec: TextCodec, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """``say``: where progress of long work goes."""
        super().__init__()
        self.scorer = scorer
        self.codec = codec
        self._say = say

    @property
    def eot_token_id(self) -> int:
        return self.codec.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.codec.start_id

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.codec.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after:  # one token spans both, and would belong to the context
            after = self.codec.encode(continuation)
        # The harness moves spaces at the end of a context to the continuation, and may leave nothing.
        return before or [self.codec.start_id], after

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, each in windows of the longest input, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.codec.encode(text),
                prefix_token=self.codec.start_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            counts.append(len(windows) - before)
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to the texts that end them, without those; as the harness's class for models of
        transformers decodes and cuts them."""
        writer = getattr(self.scorer, "continued", None)
        assert writer is not None, "load_tasks refuses what this model cannot do"
        orders = [self._order(*request.args, seed=seed) for seed, request in enumerate(requests)]
        context = self.scorer.context
        own = range(context.data.rank, len(orders), context.data.size)
        done, told = 0, time.monotonic()

        def tell(update: Update) -> None:
            nonlocal done, told
            if update.error:
                raise ValueError(f"a text could not be made: {update.error}")
            done += update.finish is not None
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                self._say(f"  {done * context.data.size:,} of about {len(orders):,} texts")

        texts = {}
        for i, text in zip(own, writer([orders[i] for i in own], tell), strict=True):
            for stop in orders[i].stop:
                text = text.split(stop)[0]
            texts[i] = text
        for part in context.world.gather_objects(texts):
            texts |= part
        return [texts[i] for i in range(len(orders))]

    def _order(self, text: str, asked: dict[str, Any], *, seed: int) -> Order:
        """What a task asks for, by the harness's own defaults; a long prompt is cut at the left."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        room = self.max_length - given["max_gen_toks"]
        if room <= 0:
            raise ValueError(
                f"an evaluation task asks for {given['max_gen_toks']} new tokens, but the model reads "
                f"{self.max_length} tokens in all; leave it out, or let its generation_kwargs ask for fewer "
                "(max_gen_toks)"
            )
        sampling = Sampling(0.0, 0, 1.0)
        if given["do_sample"]:
            sampling = Sampling(given["temperature"], given.get("top_k", _TOP_K), given.get("top_p", 1.0))
        prompt = (self.codec.encode(text) or [self.codec.start_id])[-room:]
        stop = tuple(filter(None, given["until"]))
        return Order(prompt, given["max_gen_toks"], sampling, seed, stop)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        context = self.scorer.context
        batches = self._batches([len(tokens) for tokens, _ in rows])
        own = batches[context.data.rank :: context.data.size]
        # Replicas do equally many forward passes: under ZeRO-3 each of them is a collective.
        own += [[]] * (-(-len(batches) // context.data.size) - len(own))
        answers: dict[int, Answer] = {}
        tensors = [self._tensor([rows[i][0] for i in batch]) for batch in own]
        told = time.monotonic()
        for batch, scores in zip(own, self.scorer.score(tensors), strict=False):
            answers |= {i: _answer(scores, at, *rows[i]) for at, i in enumerate(batch)}
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                self._say(f"  {len(answers) * context.data.size:,} of about {len(rows):,} sequences")
        for part in context.world.gather_objects(answers):
            answers |= part
        return [answers[i] for i in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """The tokens the model sees and predicts, cut from the left, and how many of the last ones count."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} the "
                "model reads; leave out its evaluation task, or let the model read more"
            )
        return (context + continuation)[-(self.max_length + 1) :], len(continuation)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of each batch, the longest first: padding is short, and memory runs out early if at all."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches: list[list[int]] = []
        budget = self.scorer.batch_size * self.max_length
        while order:
            size = self.scorer.batch_size
            if not self.scorer.has_fixed_shape:
                size = max(size, min(MAX_ROWS, budget // self._padded(lengths[order[0]] - 1)))
            batches.append(order[:size])
            order = order[size:]
        return batches

    def _padded(self, length: int) -> int:
        multiple = self.scorer.multiple
        return -(-max(length, 1) // multiple) * multiple

    def _tensor(self, rows: Sequence[list[int]]) -> Tensor:
        """[B, T + 1], padded at the right, which a causal model's scores of the rest do not depend on."""
        length = self._padded(max((len(tokens) - 1 for tokens in rows), default=1))
        count = max(len(rows), 1)
        if self.scorer.has_fixed_shape:
            length, count = self.max_length, self.scorer.batch_size
        tensor = torch.full((count, length + 1), self.codec.end_id, dtype=torch.int64)
        for at, tokens in enumerate(rows):
            tensor[at, : len(tokens)] = torch.tensor(tokens)
        return tensor


def _answer(scores: TokenScores, row: int, tokens: list[int], counted: int) -> Answer:
    end = len(tokens) - 1
    part = slice(end - counted, end)
    return scores.log_probs[row, part].double().sum().item(), bool(scores.greedy[row, part].all())


def run_tasks(
    model: HarnessModel, tasks: dict[str, Any], *, limit: int | None = None, errors: bool = True
) -> TaskResults:
    """Run tasks of :func:`megatron_iiet.evaluation.tasks.load_tasks`; every process of the grid calls it, and
    gets the results.

    Args:
        limit: rows of each task, the first ones; None: all.
        errors: also standard errors.

    Raises:
        ValueError: a row needs a longer input than the model reads.
    """
    silence = io.StringIO()  # the harness's bars and prints
    # One process: the pool that it would start for standard errors is no gain.
    with variables_set(DISABLE_MULTIPROC="1"), redirect_stderr(silence), redirect_stdout(silence):
        found = evaluate(
            model, tasks, limit=limit, bootstrap_iters=BOOTSTRAP if errors else 0, log_samples=False
        )
    assert found is not None  # None is for ranks other than the first, and here all are that
    metrics = {}
    for name in tasks["tasks"]:
        values = {key.removesuffix(",none"): value for key, value in found["results"][name].items()}
        metrics[name] = {key: float(v) for key, v in values.items() if isinstance(v, (int, float))}
        metrics[name].pop("sample_len", None)
    rows = {name: int(found["n-samples"][name]["effective"]) for name in tasks["tasks"]}
    return TaskResults(metrics, rows, {name: found["versions"].get(name) for name in tasks["tasks"]})
