"""Exported folders of every solver and what the models computed before, for :mod:`tests.versions.loads`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.tokenizer import Extras
from megatron_iiet.models import Transformer
from tests.hf.solvers_under_test import SOLVERS, our_model, tokens
from tests.versions.loads import NEW


class State(dict[str, Tensor]):
    """Weights in memory, to export."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self[name][first:last]


LLAMA3 = {
    "kind": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-iiet-plan": ("iiet-plan", {"attention_bias": "qkv"}),
    "qwen3-pcformer": ("pcformer-2", {"qk_norm": True, "head_dim": 16}),
    "llama3-released": ("released", {"attention_bias": "qkvo", "rope_scaling": LLAMA3}),
}
"""Exports of layers that other families have: the solver, and what is said of the model."""
NAMES = (*SOLVERS, *FAMILIES)
SURE = 1e-3
"""Least distance of the best logit to the second: rounding must not choose the text."""


def write(folder: Path, names: Iterable[str]) -> None:
    """FOLDER/NAME for each of NAMES, and FOLDER/expected.json of the models' full forward passes."""
    expected = {}
    for name in names:
        solver, sizes = FAMILIES.get(name, (name, {}))
        model = our_model(solver, tie_embeddings=False, init_std=0.15, rotary_base=5000.0, **sizes)
        extras = Extras({}, {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0})
        export_folder(model.config, State(model.state_dict()), folder / name, extras)
        texts = [sure_text(model, length) for length in (6, 9, 3)]
        logits = [model(torch.tensor([prompt]))[0].tolist() for prompt, _ in texts]
        prompts, greedy = zip(*texts, strict=True)
        expected[name] = {"prompts": prompts, "logits": logits, "greedy": greedy}
    (folder / "expected.json").write_text(json.dumps(expected))


def sure_text(model: Transformer, length: int) -> tuple[list[int], list[int]]:
    """A prompt of so many tokens, and how it goes on by whole forward passes of our own model."""
    for seed in range(100):
        prompt = tokens(1, length, seed=seed)[0].tolist()
        ids, sure = list(prompt), True
        while sure and len(ids) < length + NEW:
            best = model(torch.tensor([ids]))[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            sure = bool(best.values[0] - best.values[1] > SURE)
        if sure:
            return prompt, ids[length:]
    raise AssertionError("no prompt has a text that rounding does not choose")
