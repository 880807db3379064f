"""Sequences in a batch get what full forward passes give each of them alone, whoever comes and goes."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_iiet.hf.generation import Codec, Sampling
from megatron_iiet.serving import batch as module
from megatron_iiet.serving import cache
from megatron_iiet.serving.batch import Batch, next_group
from megatron_iiet.serving.continuation import Continuation, Order, Update
from tests.hf.solvers_under_test import MODEL, QUICK, hf_model, our_model, tokens

VOCAB = MODEL["vocab_size"]
CONTEXT = MODEL["max_position_embeddings"]
MARGIN = 1e-3
"""Least distance of the two likeliest logits at which a greedy token can't depend on rounding."""
CODEC = Codec(None, VOCAB, list, lambda ids: "".join(chr(97 + i) for i in ids))


PLAIN: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (partial(MistralConfig, sliding_window=None), MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (partial(Qwen3Config, head_dim=8), Qwen3ForCausalLM),
}
"""Models without code of their own."""


def any_model(name: str, **fields: Any) -> Any:
    """A tiny model whose text depends on its cache: the head is not the embedding."""
    if name in PLAIN:
        torch.manual_seed(5)
        configuration, model = PLAIN[name]
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = configuration(
            **shape, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=CONTEXT,
            initializer_range=0.3, **fields,
        )  # fmt: skip
        return model(config).eval()
    return hf_model(our_model(name, tie_embeddings=False, init_std=0.25), **fields)


class Heard:
    """A sequence, and everything that was told of it."""

    def __init__(self, prompt: list[int], count: int, **order: Any) -> None:
        self.updates: list[Update] = []
        self.of = Continuation(Order(prompt, count, **order), CODEC, self.updates.append)

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)

    @property
    def logprobs(self) -> list[float | None]:
        return [score.logprob for update in self.updates for score in update.scores]


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(1, length, seed=40 + n)[0].tolist() for n, length in enumerate(lengths)]


@torch.no_grad()
def alone(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities: a full forward pass without a cache for each."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > MARGIN, "rounding could choose; take another seed"
        ids.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1)[ids[-1]].item())
    return ids[len(prompt) :], logprobs


def test_which_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*lengths: int, places: int = 9) -> int:
        return next_group([Heard([1] * length, 1).of for length in lengths], places)

    assert count() == 0
    assert count(3, 3, places=0) == 0
    assert count(3, 5, 4) == 3
    assert count(3, 5, 4, places=2) == 2
    assert count(3, 50, 50) == 1, "much would be padding"
    assert count(50, 50, 3, 3) == 3
    monkeypatch.setattr(module, "_READ_AT_ONCE", 100)
    assert count(50, 50, 3, 3) == 2
    assert count(500, 500) == 1, "a long one is read alone"


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *PLAIN,
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("weight-sharing", "released")),
    ],
)
def test_a_batch_in_which_sequences_come_and_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together from the start, joining later, leaving early and in a freed place; rows grow under way."""
    monkeypatch.setattr(cache, "_LEAST_PLACES", 4)
    model = any_model(name)
    wanted = [(*pair,) for pair in zip(prompts(3, 5, 9, 12, 1), (4, 14, 9, 6, 11), strict=True)]
    heard = [Heard(prompt, count, logprobs=2) for prompt, count in wanted]
    batch = Batch(model, CODEC, places=3, context=CONTEXT)

    def join(*which: int) -> None:
        group = [heard[n].of for n in which]
        batch.join(group, *batch.read(group))

    join(0, 1)
    batch.step()
    join(2)
    steps, late = 0, [3, 4]
    while batch.running:
        batch.step()
        steps += 1
        if late and len(batch.running) < 3:
            join(late.pop(0))
    assert steps < sum(count for _, count in wanted) / 2, "they ran together"
    for (prompt, count), each in zip(wanted, heard, strict=True):
        expected, logprobs = alone(model, prompt, count)
        assert each.of.tokens == expected
        assert each.logprobs == pytest.approx(logprobs, abs=2e-5)
        assert each.text == CODEC.decode(expected)
        assert [update.finish for update in each.updates] == [None] * (count - 1) + ["length"]


def test_more_sequences_than_places() -> None:
    model = any_model("iiet-plan")
    heard = [Heard(prompt, 3 + n) for n, prompt in enumerate(prompts(4, 30, 2, 7, 7, 1, 16))]
    batch = Batch(model, CODEC, places=2, context=CONTEXT)
    batch.run([each.of for each in heard])
    assert not batch.running
    for each in heard:
        assert each.of.tokens == alone(model, each.of.order.prompt, each.of.order.max_tokens)[0]


def test_greedy_is_what_generate_makes() -> None:
    """Of transformers, for one sequence, and for a batch padded at the left."""
    model = any_model("iiet")
    rows = prompts(6, 11, 8)
    heard = [Heard(prompt, 10) for prompt in rows]
    Batch(model, CODEC, places=3, context=CONTEXT).run([each.of for each in heard])
    padded = torch.tensor([[0] * (11 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (11 - len(row)) + [1] * len(row) for row in rows])
    made = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for n, each in enumerate(heard):
        one = model.generate(torch.tensor([rows[n]]), max_new_tokens=10, do_sample=False)
        assert each.of.tokens == one[0, len(rows[n]) :].tolist() == made[n, 11:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [Sampling(0.7, 0, 1.0), Sampling(1.3, 5, 1.0), Sampling(1.0, 0, 0.6), Sampling(1e-30, 0, 1.0)]
)
def test_a_draw_does_not_depend_on_the_company(sampling: Sampling) -> None:
    model, rows = any_model("iiet-plan"), prompts(6, 11, 8, 3)
    together = [Heard(prompt, 12, sampling=sampling, seed=n) for n, prompt in enumerate(rows)]
    Batch(model, CODEC, places=4, context=CONTEXT).run([each.of for each in together])
    for n, prompt in enumerate(rows):
        single = Heard(prompt, 12, sampling=sampling, seed=n)
        Batch(model, CODEC, places=1, context=CONTEXT).run([single.of])
        assert single.of.tokens == together[n].of.tokens
    if sampling.temperature < 1e-9:
        assert single.of.tokens == alone(model, rows[-1], 12)[0]
    else:
        others = [Heard(rows[0], 12, sampling=sampling, seed=seed) for seed in range(5)]
        Batch(model, CODEC, places=5, context=CONTEXT).run([each.of for each in others])
        assert len({each.text for each in others}) > 1


@pytest.mark.slow
def test_draws_follow_the_distribution() -> None:
    """The first token of many draws, against softmax at the temperature among the k likeliest."""
    model, [prompt] = any_model("iiet-r0"), prompts(5)
    order = {"sampling": Sampling(0.8, 4, 1.0)}
    heard = [Heard(prompt, 1, seed=seed, **order) for seed in range(2000)]
    Batch(model, CODEC, places=100, context=CONTEXT).run([each.of for each in heard])
    with torch.no_grad():
        values, ids = model(torch.tensor([prompt])).logits[0, -1].topk(4)
    drawn = [each.of.tokens[0] for each in heard]
    for token, p in zip(ids.tolist(), (values / 0.8).softmax(-1).tolist(), strict=True):
        assert drawn.count(token) / 2000 == pytest.approx(p, abs=0.05)
    assert set(drawn) <= set(ids.tolist())


def test_scores_of_a_prompt() -> None:
    model, [prompt] = any_model("iiet-plan"), prompts(30)
    heard = Heard(prompt, 0, logprobs=3, prompt_logprobs=True)
    shown = Heard(prompt, 2, logprobs=0, prompt_logprobs=True)
    Batch(model, CODEC, places=2, context=CONTEXT).run([heard.of, shown.of])
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [logprobs[n, token].item() for n, token in enumerate(prompt[1:])]
    assert heard.logprobs[0] is None
    assert heard.logprobs[1:] == pytest.approx(expected, abs=2e-5)
    assert shown.logprobs[:30] == heard.logprobs
    assert len(shown.logprobs) == 32
    [update] = heard.updates
    assert (update.text, update.finish) == ("", "length")
    assert "".join(score.text for score in update.scores) == CODEC.decode(prompt)
    for n, score in enumerate(update.scores[1:]):
        values, ids = logprobs[n].topk(3)
        assert [text for text, _ in score.likeliest] == [CODEC.decode([i]) for i in ids.tolist()]
        assert [value for _, value in score.likeliest] == pytest.approx(values.tolist(), abs=2e-5)


def test_ids_that_the_tokenizer_does_not_have_are_not_made() -> None:
    model, [prompt] = any_model("iiet-r0"), prompts(5)
    best = alone(model, prompt, 1)[0][0]
    heard = Heard(prompt, 5)
    small = dataclasses.replace(CODEC, vocab_size=best)
    Batch(model, small, places=1, context=CONTEXT).run([heard.of])
    assert max(heard.of.tokens) < best


def test_the_end_of_text_and_stops() -> None:
    model, [prompt] = any_model("iiet-plan"), prompts(5)
    made = alone(model, prompt, 8)[0]
    assert len(set(made[:4])) == 4
    ending = dataclasses.replace(CODEC, eos_id=made[3])
    updates: list[Update] = []
    ended = Continuation(Order(prompt, 8), ending, updates.append)
    text = CODEC.decode(made)
    stopped = Heard(prompt, 8, stop=("nowhere", text[2:4]))
    Batch(model, ending, places=2, context=CONTEXT).run([ended])
    Batch(model, CODEC, places=2, context=CONTEXT).run([stopped.of])
    assert (ended.tokens, updates[-1].finish) == (made[:4], "stop")
    assert (stopped.text, stopped.updates[-1].finish) == (text[:2], "stop")
    assert len(stopped.of.tokens) == 4


def test_a_sequence_that_is_no_number_disturbs_nobody() -> None:
    """It fails; who is in the batch, and who takes its place, is not touched."""
    model = any_model("iiet-plan")
    model.model.embed_tokens.weight.data[0] = torch.nan  # no other prompt has token 0
    rows = prompts(6, 9, 3)
    broken, beside, after = Heard([0, *rows[0]], 5), Heard(rows[1], 9), Heard(rows[2], 6)
    batch = Batch(model, CODEC, places=2, context=CONTEXT)
    group = [beside.of, broken.of]
    batch.join(group, *batch.read(group))
    batch.join([after.of], *batch.read([after.of]))
    batch.run([])
    assert "no finite numbers" in broken.updates[-1].error
    for each in (beside, after):
        assert each.of.tokens == alone(model, each.of.order.prompt, each.of.order.max_tokens)[0]


def test_bf16() -> None:
    """Alone and in company the same tokens, whose logits rounding moves by less than they differ."""
    model = any_model("iiet-plan").to(torch.bfloat16)
    heard = [Heard(prompt, 4, logprobs=2) for prompt in prompts(6, 11, 8)]
    Batch(model, CODEC, places=3, context=CONTEXT).run([each.of for each in heard])
    for each in heard:
        single = Heard(each.of.order.prompt, 4, logprobs=2)
        Batch(model, CODEC, places=1, context=CONTEXT).run([single.of])
        for one, other in zip(single.updates, each.updates, strict=True):
            [first], [second] = one.scores, other.scores
            margin = first.likeliest[0][1] - first.likeliest[1][1]
            assert first.logprob == pytest.approx(second.logprob, abs=0.1)
            if margin < 0.2:
                break
            assert first.text == second.text


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("iiet", {"kv_cache": "last"}, "kv_cache is 'last', with which a text depends"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic', with which the longest sequence",
        ),
        ("mistral", {"sliding_window": 32}, "has a sliding_window of 32, which forgets what a batch"),
    ],
)
def test_models_that_a_batch_would_disturb(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(any_model(name, **fields), CODEC, places=1, context=CONTEXT)


def test_other_kinds_of_models() -> None:
    model = any_model("llama")
    model.config.model_type = "mamba"
    with pytest.raises(
        ValueError, match="is a LlamaForCausalLM, but only LLaMA, Mistral, Qwen2, Qwen3 and IIET"
    ):
        Batch(model, CODEC, places=1, context=CONTEXT)
    assert Batch(any_model("iiet-r0", kv_cache="last"), CODEC, places=1, context=CONTEXT)
