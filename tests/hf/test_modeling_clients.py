"""What other programs do with a model: other names, other caches, other trainers. Right, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer

from megatron_iiet.hf import modeling_iiet, register
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM, IIETForSequenceClassification
from tests.distributed.harness import run_ranks
from tests.hf.solvers_under_test import EVERY_SOLVER, SOLVERS, hf_model, model_pair, our_model, tokens
from tests.marks import long_but
from tests.versions import exports, loads

SEVERAL = ["iiet-plan", "released", "pcformer-2", "rk2-gated", "weight-sharing"]
"""Solvers with more than one evaluation in a layer."""


@pytest.fixture(scope="module")
def pair() -> tuple[Any, IIETForCausalLM]:
    return model_pair("iiet-plan", init_std=0.15, tie_embeddings=False)


# Arguments


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_either_name_of_the_cache_is_read(pair: tuple[Any, IIETForCausalLM], name: str) -> None:
    """Two tokens read with a cache, then the others: the logits of our own model for all."""
    ours, hf = pair
    ids, cache = tokens(1, 9), DynamicCache(config=hf.config)
    with torch.no_grad():
        hf(ids[:, :2], **{name: cache})
        found = hf(ids[:, 2:], **{name: cache})
        assert (found.logits - ours(ids)[:, 2:]).abs().max() < 1e-4
    assert found[modeling_iiet._PAST] is cache


def test_a_cache_under_another_name_is_no_silent_loss_of_the_past(pair: tuple[Any, IIETForCausalLM]) -> None:
    _, hf = pair
    cache = DynamicCache(config=hf.config)
    with pytest.raises(
        ValueError, match="the argument layer_past is a DynamicCache, which this model would not"
    ):
        hf(tokens(1, 3), layer_past=cache)
    with pytest.raises(ValueError, match="two names of one argument; give one"):
        hf(tokens(1, 3), past_key_values=cache, cache=DynamicCache(config=hf.config))
    with pytest.raises(ValueError, match="the cache is a tuple; give a transformers Cache"):
        hf(tokens(1, 3), past_key_values=((torch.zeros(1), torch.zeros(1)),))
    assert hf(tokens(1, 3), past_key_values=cache, cache=cache).logits.shape == (1, 3, 61)


def test_a_cache_that_forgets_is_refused(pair: tuple[Any, IIETForCausalLM]) -> None:
    _, hf = pair
    cache = DynamicCache(config=hf.config)
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4) for _ in cache.layers]
    with pytest.raises(ValueError, match="forgets tokens outside a sliding window"):
        hf(tokens(1, 3), past_key_values=cache)


def test_a_configuration_that_was_changed_is_refused(pair: tuple[Any, IIETForCausalLM]) -> None:
    """Layers took it over when they were made; once it is as it was, the model works."""
    _, hf = pair
    expected = hf(tokens(1, 4)).logits
    for name, value in (("num_hidden_layers", 2), ("kv_cache", "first")):
        before = getattr(hf.config, name)
        setattr(hf.config, name, value)
        with pytest.raises(ValueError, match="was changed after the model was made"):
            hf(tokens(1, 4))
        setattr(hf.config, name, before)
    assert torch.equal(hf(tokens(1, 4)).logits, expected)


@pytest.mark.parametrize("field", ["per_layer_config", "layer_types", "sliding_window"])
def test_fields_that_layers_would_not_read_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is given, but all layers of an IIET model have one shape"):
        IIETConfig(num_hidden_layers=2, **{field: ["full_attention"] * 2})


def test_what_is_set_after_reading_is_resolved_with_the_model(tmp_path: Path) -> None:
    """``from_pretrained(solver=...)`` sets the field as it is given."""
    hf_model(our_model("iiet")).save_pretrained(tmp_path)
    loaded = IIETForCausalLM.from_pretrained(tmp_path, solver={"kind": "iiet", "iterations": 1})
    assert loaded.config.solver["iterations"] == [1] * 5
    with pytest.raises(ValueError, match="kv_cache is 'some'"):
        IIETForCausalLM.from_pretrained(tmp_path, kv_cache="some")


def test_what_would_be_dropped_is_refused() -> None:
    hf = hf_model(our_model("iiet")).train()
    hf.gradient_checkpointing_enable()
    ids = tokens(1, 3)
    assert hf(ids, use_cache=True).get(modeling_iiet._PAST) is None
    with pytest.raises(ValueError, match="a cache is given, but gradient checkpointing computes the layers"):
        hf(ids, past_key_values=DynamicCache(config=hf.config))
    with pytest.raises(ValueError, match=r"output_hidden_states is \[1\]; give True for those of all layers"):
        hf(ids, output_hidden_states=[1])
    assert len(hf(ids, output_hidden_states=True).hidden_states) == 6
    hf.eval().set_attn_implementation("eager")
    assert len(hf(ids, output_attentions=True).attentions) == 15


# Generation


def test_drafts_of_the_first_layers_are_refused_and_nothing_breaks(pair: tuple[Any, IIETForCausalLM]) -> None:
    ours, hf = pair
    prompt = tokens(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(prompt)
    with pytest.raises(ValueError, match=r"assistant_early_exit is 2, .* use assistant_model=model.with_it"):
        hf.generate(prompt, assistant_early_exit=2, **options)
    settings = GenerationConfig(assistant_early_exit=2, max_new_tokens=6)
    with pytest.raises(ValueError, match="assistant_early_exit is 2"):
        hf.generate(prompt, generation_config=settings)
    assert torch.equal(hf.generate(prompt, **options), greedy(ours, prompt, 6))


def greedy(ours: Callable[[Tensor], Tensor], ids: Tensor, count: int) -> Tensor:
    """By full forward passes of our own model."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_a_prompt_in_portions_under_last_is_refused() -> None:
    ours = our_model("iiet", init_std=0.15, tie_embeddings=False)
    prompt, options = tokens(1, 7), {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 2}
    with pytest.raises(ValueError, match="prefill_chunk_size is 2 and kv_cache is 'last'"):
        hf_model(ours, kv_cache="last").generate(prompt, **options)
    assert torch.equal(hf_model(ours).generate(prompt, **options), greedy(ours, prompt, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in SOLVERS), *((name, "eager") for name in SEVERAL)]
)
def test_continuous_batching_is_greedy_decoding(name: str, attention: str) -> None:
    ours, hf = model_pair(name, init_std=0.15, tie_embeddings=False)
    hf.set_attn_implementation(attention)
    prompts, texts = zip(*(exports.sure_text(ours, length) for length in (6, 3)), strict=True)
    hf.config.eos_token_id = hf.generation_config.eos_token_id = None
    assert loads.in_one_batch(hf, list(prompts)) == list(texts)
    assert hf.config._attn_implementation == attention
    assert loads.generated(hf, prompts[0]) == texts[0]


def test_continuous_batching_refuses_what_it_cannot_do() -> None:
    ours = our_model("iiet")
    last = hf_model(ours, kv_cache="last")
    with pytest.raises(ValueError, match="kv_cache is 'last', which continuous batching cannot do"):
        last(tokens(1, 3), cache=paged_cache(5))
    with pytest.raises(
        ValueError, match="holds 5 sets of keys and values, but this model has 15, one for each"
    ):
        hf_model(ours)(tokens(1, 3), cache=paged_cache(5))


def paged_cache(sets: int) -> Any:
    """transformers' own, as its manager makes it, which knows of layers only."""
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=sets, vocab_size=61, **sizes))
    settings = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    manager = llama.init_continuous_batching(continuous_batching_config=settings)
    return manager._create_batch_processor().cache


@pytest.mark.parametrize("name", SEVERAL)
def test_engines_with_one_set_a_layer_are_refused(name: str) -> None:
    """By the name of their attention, when a model is made or switched, and by what they pass on."""
    hf = hf_model(our_model(name))
    for argument in ("attention_instances", "forward_batch"):
        with pytest.raises(ValueError, match=f"the argument {argument} is of an engine that keeps one set"):
            hf(tokens(1, 3), **{argument: {0: object()}})
    AttentionInterface.register("vllm_of_test", modeling_iiet.eager_attention_forward)
    try:
        with pytest.raises(
            ValueError, match=r"attention 'vllm_of_test' is of an engine .* the plugin vllm-iiet"
        ):
            hf_model(our_model(name), attn_implementation="vllm_of_test")
        hf.config._attn_implementation = "vllm_of_test"
        with pytest.raises(ValueError, match="would be decoded wrongly; use generate"):
            hf(tokens(1, 3))
        euler = hf_model(our_model("euler"), attn_implementation="vllm_of_test")
        assert euler(tokens(1, 3)).logits.shape == (1, 3, 61)
    finally:
        AttentionInterface._global_mapping.pop("vllm_of_test")


class _EightBits(QuantizedLayer):
    """transformers' quantized layer with a rounding of its own, in place of a library for it."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0].float() * q_tensor[1]


def test_a_quantized_cache_has_a_set_for_each_evaluation(pair: tuple[Any, IIETForCausalLM]) -> None:
    """The latest tokens are kept as they are, earlier ones in 8 bits: near the whole forward pass, which the
    quantized keys of another evaluation are not."""
    ours, hf = pair
    ids = tokens(1, 12)
    near, far = (_read_quantized(hf, ids, crossed) for crossed in (False, True))
    with torch.no_grad():
        expected = ours(ids)[:, -1]
    assert (near - expected).abs().max() < 0.2 < 3 * (far - expected).abs().max()


def _read_quantized(hf: IIETForCausalLM, ids: Tensor, crossed: bool) -> Tensor:
    sets = [_EightBits(residual_length=2) for _ in range(hf.config.num_cache_sets)]
    cache = transformers.Cache(layers=sets)
    with torch.no_grad():
        for token in ids[:, :-1].split(1, dim=1):
            hf(token, past_key_values=cache)
        if crossed:
            cache.layers[0], cache.layers[1] = cache.layers[1], cache.layers[0]
        return hf(ids[:, -1:], past_key_values=cache).logits[:, -1]


# Training


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_every_parameter_that_asks_for_a_gradient_gets_one(name: str, tmp_path: Path) -> None:
    """What nothing reads is stored and loaded all the same, and asks for none."""
    hf = hf_model(our_model(name)).train()
    frozen = {n for n, p in hf.named_parameters() if not p.requires_grad}
    hf(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert {n for n, p in hf.named_parameters() if p.grad is None} == frozen
    assert frozen == {
        f"model.layers.{layer}.solver.{n}" for layer, names in UNREAD.get(name, ()) for n in names
    }
    hf.save_pretrained(tmp_path)
    again = IIETForCausalLM.from_pretrained(tmp_path)
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == frozen
    assert all(torch.equal(again.get_parameter(n), hf.get_parameter(n)) for n in frozen)


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_a_model_that_was_just_made_asks_for_no_gradient_of_what_nothing_reads(name: str) -> None:
    """Without a call of ``train()``: modules are in training mode from the start."""
    hf = IIETForCausalLM(hf_model(our_model(name)).config)
    frozen = {n for n, p in hf.named_parameters() if not p.requires_grad}
    assert hf.training
    assert frozen == {
        f"model.layers.{layer}.solver.{n}" for layer, names in UNREAD.get(name, ()) for n in names
    }


_OF_R0 = ("corrector_norm.weight", "corrector_norm.bias")
UNREAD: dict[str, list[tuple[int, tuple[str, ...]]]] = {
    "iiet-euler-predictor": [(1, ("coefficients",)), (3, ("coefficients",))],
    "released": [(0, ("unused_row_0",))],
    "released-shared": [(0, ("unused_row_0",)), (1, _OF_R0), (3, _OF_R0)],
    "released-r0": [(0, ("unused_row_0",)), *((n, (*_OF_R0, "coefficients")) for n in range(5))],
}
"""Parameters of a solver that its layer does not read, by hand."""


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_ddp_trains_without_a_search_for_unused_parameters(name: str) -> None:
    """Two steps of torch's own: it refuses the second if in the first a gradient was missing."""
    hf = torch.nn.parallel.DistributedDataParallel(hf_model(our_model(name)).train())
    for step in range(2):
        ids = tokens(2, 8, seed=step)
        hf(ids, labels=ids).loss.backward()


@pytest.mark.usefixtures("alone_in_a_group")
def test_ddp_would_tell_of_a_parameter_without_a_gradient() -> None:
    hf = hf_model(our_model("released")).train()
    hf.model.layers[0].solver.unused_row_0.requires_grad_(True)
    parallel, ids = torch.nn.parallel.DistributedDataParallel(hf), tokens(2, 8)
    parallel(ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="did not receive grad"):
        parallel(ids, labels=ids)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_a_cast_leaves_coefficients_and_frequencies_as_they_are(cast: Callable[[Any], Any]) -> None:
    hf, as_it_was = hf_model(our_model("released")), hf_model(our_model("released"))
    hf = cast(hf)
    kept = {n: p for n, p in hf.state_dict().items() if ".solver." in n}
    assert kept
    for name, value in kept.items():
        assert torch.equal(value, as_it_was.state_dict()[name])
    frequencies = hf.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, as_it_was.model.rotary_emb.inv_freq)
    assert hf.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
    assert hf(tokens(1, 4)).logits.isfinite().all()
    assert {p.dtype for p in hf.double().parameters()} == {torch.float64}


def test_only_modules_that_are_there_are_kept_in_fp32() -> None:
    """transformers 4 refuses a model that names others."""
    named = {
        name: hf_model(our_model(name))._keep_in_fp32_modules_strict
        for name in ("euler", "rk2-fixed", "iiet")
    }
    assert named == {"euler": set(), "rk2-fixed": set(), "iiet": {"solver"}}


@pytest.mark.slow
@pytest.mark.parametrize("tied", long_but([True, False], True))
def test_tensor_parallel_loading_computes_the_same(tied: bool, tmp_path: Path) -> None:
    hf_model(our_model("iiet-plan", tie_embeddings=tied)).save_pretrained(tmp_path / "hf")
    run_ranks(_load_parallel, 2, tmp_path / "hf")


def _load_parallel(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    whole = IIETForCausalLM.from_pretrained(folder).eval()
    parallel = IIETForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    local = parallel.model.layers[0].self_attn.q_proj.weight.to_local()  # type: ignore[attr-defined]
    assert local.shape[0] == 16, "q_proj is not cut"
    ids = tokens(1, 6)
    with torch.no_grad():
        assert (parallel(ids).logits - whole(ids).logits).abs().max() < 1e-5
    text = partial(loads.generated, prompt=ids[0].tolist())
    assert text(parallel) == text(whole)
    torch.distributed.destroy_process_group()


# Other heads


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_reads_the_last_token_that_is_not_padding(labels: int, tmp_path: Path) -> None:
    """As AutoModelForSequenceClassification makes it of an export; with one label it is a reward model."""
    hf = hf_model(our_model("iiet-plan"))
    hf.save_pretrained(tmp_path)
    register()
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=labels).eval()
    assert type(classifier) is IIETForSequenceClassification
    ids = tokens(2, 7)
    ids[1, 5:] = 0  # padding
    mask = (ids != 0).long()
    wanted = torch.tensor([1, 0]) if labels > 1 else torch.tensor([0.5, -0.5])
    found = classifier(ids, attention_mask=mask, labels=wanted)
    with torch.no_grad():
        hidden = hf.model(ids, attention_mask=mask).last_hidden_state
    expected = hidden[torch.arange(2), torch.tensor([6, 4])] @ classifier.score.weight.t()
    assert torch.allclose(found.logits, expected, atol=1e-5)
    if labels > 1:
        loss = torch.nn.functional.cross_entropy(expected, wanted)
    else:
        loss = (expected[:, 0] - wanted).square().mean()
    assert torch.allclose(found.loss, loss, atol=1e-5)
    found.loss.backward()
    assert all(p.grad is not None for p in classifier.parameters() if p.requires_grad)
