"""Decoding with transformers' caches equals the full forward pass; what each kind of cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from megatron_iiet.hf.modeling_iiet import IIETForCausalLM
from tests.hf.solvers_under_test import EVERY_SOLVER, MODEL, SOLVERS, hf_model, our_model, tokens
from tests.marks import long_but

EXACT = 1e-4


def new_cache(model: IIETForCausalLM, kind: str) -> Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=24)
    return DynamicCache(config=model.config)


def decoded(model: IIETForCausalLM, ids_BT: Tensor, kind: str, pieces: list[int]) -> Tensor:
    """Logits of the tokens, read in pieces of these lengths with a cache."""
    cache, logits = new_cache(model, kind), []
    assert sum(pieces) == ids_BT.shape[1]
    with torch.no_grad():
        for piece in ids_BT.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def full(model: IIETForCausalLM, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT, use_cache=False).logits


def largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_decoding_equals_full_forward(name: str, kind: str) -> None:
    hf = hf_model(our_model(name))
    ids = tokens(2, 14)
    assert largest(decoded(hf, ids, kind, [6, 4, *[1] * 4]), full(hf, ids)) < EXACT


@pytest.mark.parametrize("name", ["iiet-plan", "weight-sharing", "rk4-learned", "pcformer-2", "released"])
def test_decoding_with_the_wrong_set_is_far_off(name: str) -> None:
    """The comparison above would see one evaluation reading what another one stored."""
    hf = hf_model(our_model(name))
    ids = tokens(2, 14)
    cache = DynamicCache(config=hf.config)
    with torch.no_grad():
        hf(ids[:, :13], past_key_values=cache)
        layer = next(n for n, count in enumerate(hf.config.evaluations) if count > 1)
        first = sum(hf.config.evaluations[:layer])
        cache.layers[first], cache.layers[first + 1] = cache.layers[first + 1], cache.layers[first]
        found = hf(ids[:, 13:], past_key_values=cache).logits
    assert largest(found, full(hf, ids)[:, 13:]) > 10 * EXACT


@pytest.mark.parametrize(
    ("name", "kind"),
    [("euler", "dynamic"), ("iiet-plan", "dynamic"), ("iiet-plan", "static"), ("released", "static")],
)
def test_left_padded_batch_generates_as_its_rows_alone(name: str, kind: str) -> None:
    hf = hf_model(our_model(name))
    prompts = [tokens(1, 5, seed=1), tokens(1, 9, seed=2), tokens(1, 2, seed=3)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - prompt.shape[1] :] = prompt[0]
        mask[row, 9 - prompt.shape[1] :] = 1
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "cache_implementation": kind, "disable_compile": True}
    together = hf.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, prompt.shape[1] :])
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert largest(one[row], other[0]) < EXACT


@pytest.mark.parametrize("name", ["iiet-plan", "released-shared", "weight-sharing"])
def test_greedy_beam_and_sampled_generation_equal_generation_without_cache(name: str) -> None:
    hf = hf_model(our_model(name))
    ids = tokens(2, 6)
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
    ]
    for way in ways:
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            outputs.append(hf.generate(ids, max_new_tokens=5, use_cache=use_cache, **way))
        assert torch.equal(*outputs)
        assert outputs[0].shape[1] == 11


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["iiet-plan", "released", "rk2-gated"])
def test_attention_implementations_agree(name: str, attention: str) -> None:
    hf = hf_model(our_model(name))
    ids = tokens(2, 12)
    expected = full(hf, ids)
    hf.set_attn_implementation(attention)
    assert hf.model.layers[0].self_attn.config._attn_implementation == attention
    assert largest(full(hf, ids), expected) < EXACT
    for kind in ("dynamic", "static"):
        assert largest(decoded(hf, ids, kind, [4, 1, 1, 5, 1]), expected) < EXACT


def test_eager_attention_shows_the_weights_of_each_evaluation() -> None:
    hf = hf_model(our_model("iiet-plan"))
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        weights = hf(tokens(1, 6), output_attentions=True).attentions
    assert len(weights) == sum(hf.config.evaluations) == 11
    assert all(torch.allclose(w.sum(-1), torch.ones(1, 4, 6)) for w in weights)


@pytest.mark.long
def test_flex_attention() -> None:
    hf = hf_model(our_model("iiet", hidden_size=64, num_layers=2))  # its kernels want heads of 16 or wider
    ids = tokens(2, 12)
    expected = full(hf, ids)
    hf.set_attn_implementation("flex_attention")
    assert largest(full(hf, ids), expected) < EXACT
    assert largest(decoded(hf, ids, "dynamic", [9, 1, 1, 1]), expected) < EXACT


def cache_bytes(cache: Cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [(name, "all") for name in SOLVERS]
    + [(name, cheap) for name in ("iiet-plan", "pcformer-2", "released") for cheap in ("last", "first")],
)
def test_cache_memory_is_exactly_what_is_promised(name: str, kv_cache: str) -> None:
    hf = hf_model(our_model(name), kv_cache=kv_cache)
    head_dim = MODEL["hidden_size"] // MODEL["num_attention_heads"]
    kv_width = head_dim * MODEL["num_key_value_heads"]
    per_layer = {"euler": 1, "dlcl": 1, "weight-sharing": 3, "rk2": 2, "rk4": 4}
    kind = SOLVERS[name]["kind"]
    if kind == "iiet":
        counts = SOLVERS[name]["iterations"]
        sets = sum(r + 1 for r in (counts if isinstance(counts, list) else [counts] * 5))
    else:
        sets = 5 * (SOLVERS[name].get("predictor_order", 0) + 1 if kind == "pcformer" else per_layer[kind])
    sets = sets if kv_cache == "all" and not name.endswith("first") else 5
    cache = DynamicCache(config=hf.config)
    with torch.no_grad():
        for piece in tokens(3, 10).split([7, 1, 1, 1], dim=1):
            hf(piece, past_key_values=cache)
    assert len(cache.layers) == sets
    assert {layer.get_seq_length() for layer in cache.layers} == {10}
    assert cache_bytes(cache) == 3 * 10 * 2 * kv_width * 4 * sets
    stored = {t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)}
    assert stored == {3 * 10 * kv_width * 4}  # no larger storage hides behind a view


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["iiet", "iiet-plan", "released", "pcformer-2", "rk4-learned"])
def test_first_pass_keys_and_values_are_exact_in_themselves(name: str, kind: str) -> None:
    ours = our_model(name)
    hf = hf_model(ours, kv_cache="first")
    ids = tokens(2, 14)
    expected = full(hf, ids)
    assert largest(decoded(hf, ids, kind, [6, *[1] * 8]), expected) < EXACT
    assert largest(decoded(hf, ids, kind, [5, 4, 1, 4]), expected) < EXACT
    assert largest(hf(ids, use_cache=False).logits, expected) < EXACT
    assert largest(full(hf_model(ours), ids), expected) > 10 * EXACT  # another function of the weights


@pytest.mark.parametrize("name", ["iiet-first", "pcformer-first"])
def test_model_trained_with_first_keys_and_values_keeps_no_others(name: str) -> None:
    ours = our_model(name)
    hf = hf_model(ours)
    assert hf.config.kv_cache == "first"
    with pytest.raises(ValueError, match="kv_cache is 'last', but solver"):
        hf_model(ours, kv_cache="last")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["iiet", "released", "pcformer-2", "weight-sharing"])
def test_last_keys_and_values_have_an_exact_prefill(name: str, kind: str) -> None:
    ours = our_model(name)
    exact, cheap = hf_model(ours), hf_model(ours, kv_cache="last")
    ids = tokens(2, 12)
    expected = full(exact, ids)
    assert largest(full(cheap, ids), expected) < EXACT
    found = decoded(cheap, ids, kind, [9, 1, 1, 1])
    assert largest(found[:, :9], expected[:, :9]) < EXACT
    assert largest(found[:, 9:], expected[:, 9:]) > 10 * EXACT  # an approximation, and not a wild one
    assert (found - expected).pow(2).mean() < 0.2 * expected.pow(2).mean()


@pytest.mark.parametrize("name", ["euler", "dlcl", "iiet-r0", "released-r0"])
def test_cheaper_caches_are_exact_for_one_evaluation(name: str) -> None:
    ours = our_model(name)
    ids = tokens(2, 12)
    expected = full(hf_model(ours), ids)
    for kv_cache in ("last", "first"):
        found = decoded(hf_model(ours, kv_cache=kv_cache), ids, "dynamic", [5, 3, 1, 1, 1, 1])
        assert largest(found, expected) < EXACT


def test_last_keys_and_values_by_definition() -> None:
    """A decoding step of the first layer attends to what the full forward pass' last evaluation had."""
    ours = our_model("iiet", num_layers=1)
    exact, cheap = hf_model(ours), hf_model(ours, kv_cache="last")
    ids = tokens(2, 8)
    all_sets, one_set = DynamicCache(config=exact.config), DynamicCache(config=cheap.config)
    with torch.no_grad():
        exact(ids, past_key_values=all_sets)
        cheap(ids, past_key_values=one_set)
        assert torch.equal(one_set.layers[0].keys, all_sets.layers[2].keys)
        new = tokens(2, 1, seed=9)
        for i in range(2):  # let the exact model's every evaluation see the last one's past
            all_sets.layers[i].keys, all_sets.layers[i].values = (
                one_set.layers[0].keys,
                one_set.layers[0].values,
            )
        expected = exact(new, past_key_values=all_sets).logits
        assert largest(cheap(new, past_key_values=one_set).logits, expected) < 1e-5


def test_cropping_takes_tokens_out_of_every_set() -> None:
    hf = hf_model(our_model("iiet-plan"))
    ids, cache = tokens(2, 12), DynamicCache(config=hf.config)
    with torch.no_grad():
        hf(ids[:, :8], past_key_values=cache)
        hf(tokens(2, 3, seed=4), past_key_values=cache)
        cache.crop(-3)
        found = hf(ids[:, 8:], past_key_values=cache).logits
    assert largest(found, full(hf, ids)[:, 8:]) < EXACT


def test_cache_of_another_model_is_refused() -> None:
    hf = hf_model(our_model("iiet-plan"))
    draft = hf.with_iterations(0)
    with pytest.raises(ValueError, match="holds 5 sets of keys and values, but this model has 11"):
        hf(tokens(1, 3), past_key_values=DynamicCache(config=draft.config))
    one = DynamicCache()
    one.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(ValueError, match="holds 1 sets of keys and values, but this model has 11"):
        hf(tokens(1, 3), past_key_values=one)
    window = DynamicCache(config=hf.config)
    window.layers[3].is_sliding = True
    with pytest.raises(ValueError, match="forgets tokens outside a sliding window"):
        hf(tokens(1, 3), past_key_values=window)


def test_an_empty_cache_that_knows_no_model_is_filled() -> None:
    """As people write it: DynamicCache()."""
    hf, ids, cache = hf_model(our_model("iiet-plan")), tokens(2, 6), DynamicCache()
    with torch.no_grad():
        hf(ids[:, :4], past_key_values=cache)
        assert len(cache.layers) == 11
        assert largest(hf(ids[:, 4:], past_key_values=cache).logits, full(hf, ids)[:, 4:]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compiler"),
    long_but([("iiet", "aot_eager"), ("iiet", "inductor"), ("released", "inductor")], ("iiet", "aot_eager")),
)
def test_compiled_decoding_step_with_static_cache(name: str, compiler: str) -> None:
    hf = hf_model(our_model(name, num_layers=2))
    ids = tokens(2, 10)
    step = torch.compile(hf.forward, fullgraph=True, dynamic=False, backend=compiler)
    cache = StaticCache(config=hf.config, max_cache_len=16)
    with torch.no_grad():
        logits = [hf(ids[:, :6], past_key_values=cache).logits]
        for n in range(6, 10):
            inputs = hf.prepare_inputs_for_generation(
                ids[:, : n + 1],
                next_sequence_length=1,
                past_key_values=cache,
                attention_mask=torch.ones(2, n + 1, dtype=torch.long),
            )
            logits.append(step(**inputs).logits)
    assert largest(torch.cat(logits, dim=1), full(hf, ids)) < EXACT
