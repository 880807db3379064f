"""Our models for transformers compute what our Transformer computes, and load without our package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_iiet.hf import modeling_iiet, register
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.models.solvers import build_solver
from tests.hf.solvers_under_test import (
    EVERY_SOLVER,
    MODEL,
    hf_config,
    hf_model,
    model_pair,
    our_model,
    tokens,
)
from tests.processes import own_mark


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_logits_equal_those_of_our_transformer(name: str) -> None:
    ours, hf = model_pair(name)
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = ours(ids)
        without_autograd = hf(ids, use_cache=False).logits
    assert expected.abs().max() > 1
    assert (without_autograd - expected).abs().max() < 1e-5
    # Bit-equal with torch's AVX2 kernels; its AVX-512 kernels differ by up to 7e-7.
    assert (hf(ids, use_cache=False).logits - ours(ids)).abs().max() < 2e-6


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_gradients_equal_those_of_our_transformer(name: str) -> None:
    ours, hf = model_pair(name)
    ids = tokens(2, 12)
    ours.loss(ours.integrate(*ours.embed(ids[:, :-1]), 11), ids[:, 1:]).backward()
    hf(ids, labels=ids, use_cache=False).loss.backward()
    theirs = dict(hf.named_parameters())
    compared = 0
    for n, layer in enumerate(ours.layers.values()):
        for key, parameter in layer.solver.named_parameters():
            expected = parameter.grad
            found = theirs[f"model.layers.{n}.solver.{key}"].grad
            if expected is None or expected.abs().max() == 0:
                assert found is None or found.abs().max() == 0
                continue
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
            compared += 1
        found = theirs[f"model.layers.{n}.mlp.down_proj.weight"].grad
        torch.testing.assert_close(found, layer.increment.mlp.down.weight.grad, rtol=1e-3, atol=1e-7)
    fixed = ("euler", "weight-sharing", "rk2-fixed", "rk4-fixed", "iiet-unmerged")
    assert (compared == 0) == (name in fixed)


@pytest.mark.parametrize("name", ["euler", "iiet", "released"])
def test_untied_head_and_full_heads(name: str) -> None:
    ours, hf = model_pair(name, tie_embeddings=False, num_key_value_heads=None, embedding_scale=1.0)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert (hf(ids).logits - ours(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["iiet", "released", "pcformer-2", "rk2-gated"])
def test_bf16_stream_with_fp32_coefficients_stays_near_fp32(name: str) -> None:
    _, hf = model_pair(name)
    half = copy.deepcopy(hf).to(torch.bfloat16)
    for path, parameter in half.named_parameters():
        if ".solver." in path:
            parameter.data = hf.get_parameter(path).data.clone()
    ids = tokens(2, 12)
    with torch.no_grad():
        exact, merged_at_once = hf(ids).logits, half(ids).logits
    one_by_one = half(ids, use_cache=False).logits
    assert merged_at_once.dtype == torch.bfloat16
    scale = exact.pow(2).mean().sqrt()
    for found in (merged_at_once, one_by_one):
        assert (found.float() - exact).pow(2).mean().sqrt() < 0.03 * scale


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_embedding_scale_on_either_side_of_1(scale: float) -> None:
    ours = our_model("iiet-plan", embedding_scale=scale)
    hf = hf_model(ours)
    ids = tokens(2, 12)
    with torch.no_grad():
        assert (hf(ids).logits - ours(ids)).abs().max() < 1e-5
        unscaled = hf_model(ours, embedding_scale=1.0)
        assert ((unscaled(ids).logits - ours(ids)).abs().max() > 1e-3) == (scale != 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 0.3},
        {"rotary_base": 20.0},
        {"num_key_value_heads": 1},
        {"max_position_embeddings": 40},
        {"ffn_hidden_size": 20},
        {"num_layers": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_of_the_model_counts(fields: dict[str, Any]) -> None:
    """Each away from what all other tests have, and from transformers' default."""
    ours = our_model("iiet", **fields)
    ids = tokens(2, 12)
    with torch.no_grad():
        assert (hf_model(ours)(ids).logits - ours(ids)).abs().max() < 1e-5


def test_euler_without_scale_is_transformers_llama() -> None:
    _, hf = model_pair("euler", embedding_scale=1.0)
    llama = LlamaForCausalLM(LlamaConfig(**_llama_fields(hf.config))).eval()
    llama.load_state_dict(hf.state_dict(), strict=True)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert (hf(ids).logits - llama(ids).logits).abs().max() < 1e-5


def _llama_fields(config: IIETConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    names += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "pad_token_id")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_initial_solver_values_are_ours(name: str) -> None:
    config = our_model(name).config
    hf = IIETForCausalLM(hf_config(config))
    for n in range(config.model.num_layers):
        expected = build_solver(config, n, "reference").state_dict()
        found = hf.model.layers[n].solver.state_dict()
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_iiet_without_iterations_starts_as_euler_bit_for_bit() -> None:
    euler = hf_model(our_model("euler"))
    iiet = IIETForCausalLM(hf_config(our_model("iiet-r0").config)).eval()
    iiet.load_state_dict(euler.state_dict(), strict=False)
    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(iiet(ids).logits, euler(ids).logits)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"kind": "heun"}, "solver.kind is 'heun'; supported are 'euler', 'dlcl'"),
        ({"kind": "iiet", "iteration": 3}, "unknown key 'iteration'"),
        ({"kind": "iiet", "iterations": [1, 2]}, "lists 2 numbers, but num_hidden_layers is 5"),
        ({"kind": "iiet", "iterations": [1, 2, -1, 0, 0]}, "whole numbers of at least 0"),
        ({"kind": "iiet", "iterations": 1.5}, "solver.iterations is 1.5"),
        ({"kind": "iiet", "iterations": True}, "solver.iterations is True"),
        ({"kind": "iiet", "damping": 0}, "solver.damping is 0; give a number above 0"),
        ({"kind": "iiet", "damping": 1.01}, "solver.damping is 1.01; give a number above 0 and at most 1"),
        ({"kind": "iiet", "damping": True}, "solver.damping is True; give a number"),
        ({"kind": "iiet", "damping": "1"}, "solver.damping is '1'; give a number"),
        ({"kind": "iiet", "merge": 1}, "solver.merge is 1; supported are True, False"),
        ({"kind": "iiet", "variant": "released", "damping": 0.5}, "solver.variant 'released' does not have"),
        (
            {"kind": "iiet", "variant": "released", "predictor": "euler"},
            "solver.variant 'released' does not have; remove",
        ),
        (
            {"kind": "rk4", "stage_coefficients": "gated"},
            "is 'gated'; supported are 'fixed', 'learned', 'full'",
        ),
        ({"kind": "pcformer", "predictor_order": 3}, "solver.predictor_order is 3; supported are 2, 4"),
        ({"kind": "weight-sharing", "repeats": 0}, "solver.repeats is 0"),
        ({"kind": "weight-sharing", "repeats": True}, "solver.repeats is True"),
        ({"kind": "weight-sharing", "repeats": 1.5}, "solver.repeats is 1.5"),
        ({"kind": "euler", "iterations": 3}, "solver.iterations is 3, which solver.kind 'euler' does not"),
        ({"kind": "euler", "iterations": [0] * 5}, "solver.iterations is [0, 0, 0, 0, 0], which solver.kind"),
        ({"kind": "dlcl", "variant": "paper"}, "solver.variant is 'paper', which solver.kind 'dlcl' does"),
        ({"kind": "iiet", "repeats": 4}, "solver.repeats is 4, which solver.variant 'paper' does not have"),
    ],
)
def test_config_refuses_what_no_solver_has(solver: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="solver") as error:
        IIETConfig(num_hidden_layers=5, solver=solver)
    assert words in str(error.value)


def test_the_first_of_many_unknown_keys_is_named() -> None:
    """The same one each time, in the order of the alphabet."""
    keys = dict.fromkeys("zyxwvutsrqponmlkjihgfedcba", 1)
    with pytest.raises(ValueError, match=r"solver has the unknown key 'a'; the keys are kind, variant, outp"):
        IIETConfig(num_hidden_layers=5, solver=keys)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_model_is_drawn_and_tied(tied: bool) -> None:
    """The head as everything else, by the configuration's spread."""
    fields = {"tie_word_embeddings": tied, "initializer_range": 0.5}
    hf = IIETForCausalLM(hf_config(our_model("euler").config, **fields))
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) == tied
    assert hf.lm_head.weight[1:].std().item() == pytest.approx(0.5, rel=0.1)
    assert hf.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache": "some"}, "kv_cache is 'some'; supported are 'all', 'last', 'first'"),
        ({"embedding_scale": 0}, "embedding_scale is 0; give a number above 0"),
        ({"embedding_scale": "unit"}, "embedding_scale is 'unit'"),
    ],
)
def test_config_refuses_other_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IIETConfig(num_hidden_layers=2, **fields)


def test_config_tells_of_a_key_that_the_other_variant_has() -> None:
    with pytest.warns(
        UserWarning, match=r"solver\.damping is 1\.0, which solver\.variant 'released' does not"
    ):
        config = IIETConfig(num_hidden_layers=2, solver={"variant": "released", "damping": 1.0})
    assert config.solver == IIETConfig(num_hidden_layers=2, solver={"variant": "released"}).solver


def test_config_survives_json(tmp_path: Path) -> None:
    config = hf_config(our_model("iiet-plan").config, kv_cache="last")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "iiet"
    assert written["auto_map"] == {
        "AutoConfig": "modeling_iiet.IIETConfig",
        "AutoModel": "modeling_iiet.IIETModel",
        "AutoModelForCausalLM": "modeling_iiet.IIETForCausalLM",
        "AutoModelForSequenceClassification": "modeling_iiet.IIETForSequenceClassification",
    }
    assert written["solver"]["iterations"] == [2, 0, 3, 0, 1]
    read = IIETConfig.from_pretrained(tmp_path)
    assert read.solver == config.solver
    assert (read.kv_cache, read.embedding_scale) == ("last", 12.5)
    assert read.num_cache_sets == 5
    assert IIETConfig.from_pretrained(tmp_path, kv_cache="all").num_cache_sets == 11


def test_saved_folder_loads_by_the_auto_classes(tmp_path: Path) -> None:
    _, hf = model_pair("released")
    ids = tokens(1, 10)
    with torch.no_grad():
        expected = hf(ids).logits
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_iiet.py").read_bytes() == Path(modeling_iiet.__file__).read_bytes()
    register()
    assert type(AutoConfig.from_pretrained(tmp_path)) is IIETConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is IIETForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_bf16_loading_and_saving_leaves_solver_parameters_fp32(tmp_path: Path) -> None:
    _, hf = model_pair("released")
    hf.save_pretrained(tmp_path / "fp32")
    half = IIETForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bf16")
    with safe_open(tmp_path / "bf16" / "model.safetensors", framework="pt") as file:
        for path in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(path)
            assert tensor.dtype == (torch.float32 if ".solver." in path else torch.bfloat16), path
            assert torch.equal(tensor, hf.state_dict()[path].to(tensor.dtype))


_WITHOUT_PACKAGE = """
import json, sys
sys.modules["megatron_iiet"] = None  # importing it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(ids).logits
torch.save(logits, sys.argv[3])
out = model.generate(ids, max_new_tokens=4, do_sample=False, assistant_model=model.with_iterations(0))
assert out.shape == (1, ids.shape[1] + 4)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "IIETModel"
model.save_pretrained(folder + "/again")
"""


@pytest.mark.slow
def test_folder_loads_without_our_package(tmp_path: Path) -> None:
    _, hf = model_pair("iiet-plan")
    ids = tokens(1, 10)
    hf.save_pretrained(tmp_path / "folder")
    script = [sys.executable, "-c", _WITHOUT_PACKAGE, str(tmp_path / "folder"), json.dumps(ids.tolist())]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", **own_mark()}
    subprocess.run([*script, str(tmp_path / "logits")], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), hf(ids).logits)
    again = tmp_path / "folder" / "again"
    assert (again / "modeling_iiet.py").read_bytes() == Path(modeling_iiet.__file__).read_bytes()
    assert "AutoModelForCausalLM" in json.loads((again / "config.json").read_text())["auto_map"]


@pytest.mark.slow
def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, megatron_iiet.hf; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hidden_states_are_the_layers_outputs() -> None:
    ours, hf = model_pair("iiet")
    ids = tokens(1, 8)
    with torch.no_grad():
        found = hf(ids, output_hidden_states=True).hidden_states
        y_BTD, history = ours.embed(ids)
        expected = [y_BTD, *ours.trajectory(y_BTD, history, ours.layout(8, y_BTD.dtype))]
    assert len(found) == MODEL["num_layers"] + 1
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        assert (one - other).abs().max() < 1e-5
