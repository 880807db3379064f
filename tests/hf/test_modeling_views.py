"""Views of a model with fewer iterations share its weights, and draft for it in assisted generation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.generation import GenerationMixin

from megatron_iiet.hf.modeling_iiet import IIETForCausalLM
from tests.hf.solvers_under_test import hf_model, our_model, tokens
from tests.marks import long_but

CHI_SQUARE_15 = 37.70
"""A chi-square variable of 15 degrees of freedom is larger once in a thousand times."""


def logits(model: IIETForCausalLM, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT, use_cache=False).logits


class Operations(TorchDispatchMode):
    """The operations on tensors that were run while it was on; without one, no tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.run: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.run.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "iterations"),
    [("iiet", 0), ("iiet", [0, 2, 1, 0, 3]), ("iiet-euler-predictor", 0), ("released", [1, 0, 0, 2, 0])],
)
def test_view_computes_what_our_transformer_does_with_these_iterations(name: str, iterations: Any) -> None:
    ours = our_model(name)
    hf = hf_model(ours)
    ids = tokens(2, 10)
    before = logits(hf, ids)
    view = hf.with_iterations(iterations)
    ours.set_iterations([iterations] * 5 if isinstance(iterations, int) else iterations)
    with torch.no_grad():
        assert (logits(view, ids) - ours(ids)).abs().max() < 1e-5
    assert torch.equal(logits(hf, ids), before)
    assert (logits(view, ids) - before).abs().max() > 1e-3
    cache = DynamicCache(config=view.config)
    with torch.no_grad():
        steps = [view(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 1, 1], dim=1)]
    assert (torch.cat(steps, dim=1) - logits(view, ids)).abs().max() < 1e-4


def test_view_shares_every_parameter_and_buffer_and_no_memory_is_added() -> None:
    hf = hf_model(our_model("released"))
    with Operations() as operations:
        view = hf.with_iterations(0)
    assert operations.run == []
    assert type(view) is IIETForCausalLM
    assert [name for name, _ in view.named_parameters()] == [name for name, _ in hf.named_parameters()]
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        assert view.get_parameter(name) is parameter
        assert view.get_parameter(name).data_ptr() == parameter.data_ptr()
    for (_, one), (_, other) in zip(hf.named_buffers(), view.named_buffers(), strict=True):
        assert one is other
    assert hf.config.solver["iterations"] == [2] * 5
    assert view.config.solver["iterations"] == [0] * 5
    assert (hf.config.num_cache_sets, view.config.num_cache_sets) == (15, 5)


def test_view_has_generation_settings_of_its_own() -> None:
    hf = hf_model(our_model("iiet"))
    hf.generation_config.max_new_tokens = 7
    view = hf.with_iterations(0)
    assert view.generation_config.max_new_tokens == 7
    view.generation_config.max_new_tokens = 3
    view.generation_config.num_assistant_tokens = 11
    assert hf.generation_config.max_new_tokens == 7
    assert hf.generation_config.num_assistant_tokens != 11


def test_view_follows_the_weights() -> None:
    hf = hf_model(our_model("iiet"))
    view = hf.with_iterations(1)
    ids = tokens(1, 6)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.1)
    changed = hf_model(our_model("iiet"))
    changed.load_state_dict(hf.state_dict())
    assert torch.equal(logits(view, ids), logits(changed.with_iterations(1), ids))
    hf.to(torch.float64)
    assert {parameter.dtype for parameter in view.parameters()} == {torch.float64}


def test_views_are_made_of_plans_and_of_views(tmp_path: Path) -> None:
    hf = hf_model(our_model("iiet"))
    plan = {"version": 1, "iterations": [0, 1, 0, 2, 0], "full": 2, "method": "threshold"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ids = tokens(1, 6)
    expected = logits(hf.with_iterations(plan["iterations"]), ids)
    assert torch.equal(logits(hf.with_iterations(plan), ids), expected)
    assert torch.equal(logits(hf.with_iterations(tmp_path / "plan.json"), ids), expected)
    view = hf.with_iterations(0).with_iterations((0, 1, 0, 2, 0))
    assert torch.equal(logits(view, ids), expected)
    view.save_pretrained(tmp_path / "view")
    assert torch.equal(logits(IIETForCausalLM.from_pretrained(tmp_path / "view"), ids), expected)


def test_view_refuses_what_does_not_fit() -> None:
    hf = hf_model(our_model("iiet"))
    with pytest.raises(ValueError, match="iterations lists 2 numbers, but num_hidden_layers is 5"):
        hf.with_iterations([1, 2])
    with pytest.raises(ValueError, match="whole numbers of at least 0"):
        hf.with_iterations(-1)
    with pytest.raises(ValueError, match="the plan has no 'iterations'"):
        hf.with_iterations({"full": 3})
    with pytest.raises(ValueError, match=r"solver.kind is 'dlcl', which has no iterations"):
        hf_model(our_model("dlcl")).with_iterations(1)
    hf.model.layers[0].forward = hf.model.layers[1].forward
    with pytest.raises(ValueError, match="a IIETDecoderLayer has a forward function of its own"):
        hf.with_iterations(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "draft", "schedule"),
    [
        ("iiet", 0, "constant"),
        ("iiet-plan", 0, "heuristic"),
        ("iiet", [0, 1, 0, 0, 2], "heuristic"),
        ("released", 1, "heuristic"),
        ("iiet-first", 0, "constant"),
    ],
)
def test_assisted_greedy_generation_is_plain_greedy_generation(name: str, draft: Any, schedule: str) -> None:
    hf = hf_model(our_model(name, tie_embeddings=False, init_std=0.15))
    assistant = hf.with_iterations(draft)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.assistant_confidence_threshold = 0.0  # an untrained model is never sure
    read = []
    hook = hf.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    new = 0
    for seed in range(2):
        prompt = tokens(1, 6, seed=seed)
        options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
        options["attention_mask"] = torch.ones_like(prompt)
        assisted = hf.generate(prompt, assistant_model=assistant, **options)
        calls = list(read)
        assert torch.equal(assisted, hf.generate(prompt, **options))
        new += 16
        read[:] = calls
    hook.remove()
    assert len(read) < new  # some drafts were accepted
    assert sum(read) > 2 * (6 - 1) + new  # and some rejected, their keys and values taken back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampled", "least"), long_but([(False, 0.0), (False, 0.02), (True, 0.0)], (False, 0.02), (True, 0.0))
)
def test_drafts_are_those_of_transformers_loop(
    sampled: bool, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, scores and cache, with a processor that looks at earlier tokens and with ends of text."""
    hf = hf_model(our_model("iiet", tie_embeddings=False, init_std=0.15))
    draft = hf.with_iterations(0)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.assistant_confidence_threshold = least
    lean, lengths, ended = IIETForCausalLM.generate, set(), 0

    def both(self: IIETForCausalLM, *args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        if self is not draft:
            return lean(self, *args, **kwargs)
        again = copy.deepcopy(kwargs)
        state = torch.get_rng_state()
        expected = GenerationMixin.generate(self, *args, **again)
        torch.set_rng_state(state)
        found = lean(self, *args, **kwargs)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(torch.cat(found.scores), torch.cat(expected.scores), atol=1e-5)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        lengths.add(len(found.scores))
        ended += int(found.sequences[0, -1]) in ends
        return found

    calls = []
    own = IIETForCausalLM._draft
    monkeypatch.setattr(
        IIETForCausalLM, "_draft", lambda self, **kwargs: calls.append(1) or own(self, **kwargs)
    )
    monkeypatch.setattr(IIETForCausalLM, "generate", both)
    ends = list(range(8))
    torch.manual_seed(0)
    for seed in range(3):
        prompt = tokens(1, 6, seed=seed)
        hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=draft,
            max_new_tokens=24,
            min_new_tokens=12,
            do_sample=sampled,
            repetition_penalty=1.3,
            eos_token_id=ends,
            pad_token_id=0,
        )
    assert len(calls) > 6
    assert len(lengths) > 1
    assert ended or not sampled


@pytest.mark.slow
def test_a_draft_for_a_padded_sequence_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = hf_model(our_model("iiet", tie_embeddings=False, init_std=0.15))
    draft = hf.with_iterations(0)
    prompt, mask = tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    monkeypatch.delattr(IIETForCausalLM, "_draft")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(hf.generate(prompt, assistant_model=draft, **options), hf.generate(prompt, **options))


@pytest.mark.slow
def test_assisted_sampling_follows_the_target_distribution() -> None:
    """All 16 continuations of two tokens over a vocabulary of four, against their probabilities."""
    hf = hf_model(our_model("released", vocab_size=4, vocab_multiple=4, init_std=0.08))
    draft = hf.with_iterations(0)
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    prompt = torch.tensor([[3, 1, 2, 3]])
    target, drafted = (_two_token_probabilities(model, prompt) for model in (hf, draft))
    samples = 400
    assert samples * ((drafted - target) ** 2 / target).sum() > 3 * CHI_SQUARE_15  # a draft would be noticed
    assert (samples * target).min() > 5
    torch.manual_seed(1)
    counts = torch.zeros(16)
    mask = torch.ones_like(prompt)
    for _ in range(samples):
        out = hf.generate(
            prompt, attention_mask=mask, assistant_model=draft, do_sample=True, top_k=0, max_new_tokens=3
        )
        counts[4 * out[0, 4] + out[0, 5]] += 1
    statistic = ((counts - samples * target) ** 2 / (samples * target)).sum()
    assert statistic < CHI_SQUARE_15


def _two_token_probabilities(model: IIETForCausalLM, prompt: Tensor) -> Tensor:
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    probabilities = logits(model, torch.cat((prompt.expand(16, -1), pairs), dim=1)).softmax(-1)
    start = prompt.shape[1] - 1
    first = probabilities[torch.arange(16), start, pairs[:, 0]]
    return first * probabilities[torch.arange(16), start + 1, pairs[:, 1]]
