"""What a program does with exported folders, in whatever transformers this runs with; needs only torch,
transformers and, for the adapters, peft.

    python tests/versions/loads.py FOLDER NAME...

FOLDER/NAME is an export, FOLDER/expected.json what the model that was exported computes without a cache. One
JSON object on the last line: by name of an export and of a check ``ok``, ``-: why`` it does not apply, or
what went wrong.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tests import this file, and keep their environment
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
    warnings.filterwarnings("ignore")

import torch
import transformers
from transformers import AutoModelForCausalLM

NEW = 8
"""Tokens that are generated."""
EXACT = 1e-4
Model = Any


class WrongError(AssertionError):
    """A check found another value."""


class CannotError(Exception):
    """This transformers cannot do it with any model."""


def same(found: list[Any], expected: list[Any]) -> None:
    if found != expected:
        raise WrongError(f"{found} instead of {expected}")


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (found - expected).abs().max().item()
    if not difference <= EXACT:
        raise WrongError(f"differs by {difference:.1e}")


def generated(model: Model, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **options}
    sequences = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return sequences[0, len(prompt) :].tolist()


def forward(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        for prompt, logits in zip(expected["prompts"], expected["logits"], strict=True):
            near(model(torch.tensor([prompt]), use_cache=False).logits[0], torch.tensor(logits))


def dynamic(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    for prompt, text in zip(expected["prompts"], expected["greedy"], strict=True):
        same(generated(model, prompt), text)


def static(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    for prompt, text in zip(expected["prompts"], expected["greedy"], strict=True):
        same(generated(model, prompt, cache_implementation="static"), text)


def beams(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    prompt = expected["prompts"][0]
    uncached = generated(model, prompt, num_beams=3, use_cache=False)
    same(generated(model, prompt, num_beams=3), uncached)


def padded(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    width = max(map(len, expected["prompts"]))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in expected["prompts"]]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in expected["prompts"]]
    ids = torch.tensor(rows)
    found = model.generate(ids, attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False)
    same(found[:, width:].tolist(), expected["greedy"])


def assisted(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    if "iterations" not in model.config.solver:
        raise CannotError("the solver has no iterations to leave out")
    draft = model.with_iterations(0)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_confidence_threshold = 0.0
    for prompt, text in zip(expected["prompts"], expected["greedy"], strict=True):
        same(generated(model, prompt, assistant_model=draft), text)


def batched(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    """transformers' own continuous batching."""
    found = in_one_batch(model, expected["prompts"])
    if not found and not in_one_batch(tiny_llama(), expected["prompts"]):
        raise CannotError("batches no LLaMA on this device either")
    same(found, expected["greedy"])


def in_one_batch(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """With a small cache: by itself it would take most of the memory there is."""
    size = {"num_blocks": 32, "max_batch_tokens": 64}
    settings: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": -1,
        "pad_token_id": 0,
    }
    options: dict[str, Any] = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**size)
    else:
        settings |= size
    settings_of_all = transformers.GenerationConfig(**settings)
    found = model.generate_batch(inputs=prompts, generation_config=settings_of_all, **options)
    numbered = sorted(found, key=lambda name: int(name.split("_")[-1]))
    return [found[name].generated_tokens for name in numbered]


def tiny_llama() -> Model:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def saved(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        again = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        forward(again.eval(), folder, expected)
        dynamic(again, folder, expected)


def adapted(model: Model, folder: Path, expected: dict[str, Any]) -> None:
    """LoRA: trained for a step, then merged into the weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wanted = ["q_proj", "v_proj", "down_proj"]
    own = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tuned = get_peft_model(own, LoraConfig(r=2, target_modules=wanted, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([expected["prompts"][0]])
    losses = []
    for _ in range(2):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[1] < losses[0]:
        raise WrongError(f"the loss went from {losses[0]} to {losses[1]}")
    with torch.no_grad():
        apart = tuned.eval()(ids).logits
        near(tuned.merge_and_unload()(ids).logits, apart)


CHECKS: tuple[Callable[[Model, Path, dict[str, Any]], None], ...] = (
    *(forward, dynamic, static, beams, padded, assisted, batched, saved, adapted),
)


def check(folder: Path, expected: dict[str, Any]) -> dict[str, str]:
    """Each check's verdict on one export."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    seen = {}
    for one in CHECKS:
        try:
            one(model, folder, expected)
            seen[one.__name__] = "ok"
        except CannotError as error:
            seen[one.__name__] = f"-: {error}"
        except Exception as error:  # whatever a version throws is its verdict
            seen[one.__name__] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return seen


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    expectations = json.loads((folder / "expected.json").read_text())
    verdicts = {name: check(folder / name, expectations[name]) for name in sys.argv[2:]}
    print(json.dumps({"transformers": transformers.__version__, "exports": verdicts}))
