"""What was imported of another family is exported: to our class and to the plain ones of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from megatron_iiet import models
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.modeling_iiet import IIETConfig
from megatron_iiet.storage.hugging_face import import_llama
from tests.hf.solvers_under_test import hf_model, our_model, tokens
from tests.hf.test_export import NO_EXTRAS, build, export
from tests.storage.test_hugging_face_families import QUICK, SOURCES, logits_of, make

torch.set_num_threads(1)

CLASSES = {
    "Llama": LlamaForCausalLM,
    "Mistral": LlamaForCausalLM,
    "Qwen2": Qwen2ForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SOURCES]
)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Of transformers' own class, imported and exported as ours and as a plain one: the same logits, and the
    same model, to the bit, where it is imported again."""
    theirs = logits_of(make(name, tmp_path / "hf"))
    config, state = import_llama(tmp_path / "hf")
    export_folder(config, state, tmp_path / "iiet", NO_EXTRAS)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "iiet", trust_remote_code=True)
    assert type(ours).__name__ == "IIETForCausalLM"
    assert (logits_of(ours) - theirs).abs().max() < 1e-5
    export_folder(config, state, tmp_path / "plain", NO_EXTRAS, as_llama=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is CLASSES[SOURCES[name][0]]
    assert (logits_of(plain) - theirs).abs().max() < 1e-5
    for folder in ("iiet", "plain"):
        again, weights = import_llama(tmp_path / folder)
        assert (again.model, again.solver) == (config.model, config.solver)
        assert list(weights) == list(state)
        assert all(torch.equal(weights[key], state[key]) for key in state)


@pytest.mark.parametrize("name", QUICK)
def test_an_iiet_without_iterations_computes_the_source(tmp_path: Path, name: str) -> None:
    """In training and exported."""
    theirs = logits_of(make(name, tmp_path / "hf"))
    config, state = import_llama(tmp_path / "hf", {"kind": "iiet", "iterations": 0})
    models.save(config, state, tmp_path / "ours")
    assert (logits_of(models.load(tmp_path / "ours")) - theirs).abs().max() < 1e-5
    export_folder(config, state, tmp_path / "iiet", NO_EXTRAS)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "iiet", trust_remote_code=True)
    assert (logits_of(exported) - theirs).abs().max() < 1e-5


def test_names_for_transformers_4(tmp_path: Path) -> None:
    """Beside today's: where it looks for them; and both mean the same to transformers 5."""
    model = build({"kind": "euler"}, embedding_scale=1.0, rope_scaling={"kind": "linear", "factor": 4.0})
    export(model, tmp_path / "plain", as_llama=True, dtype="bf16")
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (fields["rope_theta"], fields["torch_dtype"], fields["dtype"]) == (5000.0, "bfloat16", "bfloat16")
    assert fields["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    for gone in ("rope_parameters", "rope_scaling"):
        kept = {name: value for name, value in fields.items() if name != gone}
        (tmp_path / "plain" / "config.json").write_text(json.dumps(kept))
        assert import_llama(tmp_path / "plain")[0].model == model.config.model


FAMILY: dict[str, Any] = {
    "attention_bias": "qkv",
    "qk_norm": True,
    "head_dim": 6,
    "rope_scaling": {"kind": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
}


def test_what_no_plain_class_has(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none has both model\.qk_norm true and model\.attention_bias 'qkv'; leave"
    ):
        export(build({"kind": "euler"}, embedding_scale=1.0, **FAMILY), tmp_path / "x", as_llama=True)


@pytest.mark.parametrize("name", ["iiet-plan", "iiet-first"])
def test_decoding_of_a_solver_over_another_family(name: str) -> None:
    """Token by token from the cache what whole forward passes of our own model say."""
    ours = our_model(name, **FAMILY)
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(parameter_name)))
        ids = tokens(2, 12)
        hf = hf_model(ours)
        whole = ours(ids)
        assert (hf(ids).logits - whole).abs().max() < 1e-5
        cache, found = None, []
        for t in range(12):
            out = hf(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        assert (torch.cat(found, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": 1}, "qk_norm is 1; give true or false"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes'; give true or false"),
        (
            {"qkv_bias": True, "attention_bias": True},
            "qkv_bias and attention_bias are both true; keep the one",
        ),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IIETConfig(num_hidden_layers=2, **fields)
