"""Tiny exports of every solver, and what they write: texts by full forward passes without a cache, in fp32.

python -m tests.vllm.models FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.hf.tokenizer import Extras
from tests.hf.solvers_under_test import SOLVERS, our_model

SHAPE: dict[str, Any] = {  # 32 is the smallest head that vLLM's attention on CPUs takes
    "hidden_size": 128,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 160,
    "init_std": 0.15,
    "tie_embeddings": False,  # a tied head repeats the last token, whatever the cache holds
}
BFLOAT16 = ("iiet-plan", "released", "rk4-learned")
TIED = ("euler", "released-shared")
_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 40}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_STRETCHED}
VARIED: dict[str, dict[str, Any]] = {
    "biased": {"attention_bias": True, "head_dim": 32, "hidden_size": 96},
    "qkv-biased": {"qkv_bias": True},
    "qk-normed": {"qk_norm": True},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "rope-llama3": {"rope_parameters": {"rope_type": "llama3", **_LLAMA3}},
    "rope-yarn": {"rope_parameters": {"rope_type": "yarn", **_STRETCHED}},
}
"""Fields of config.json that the solvers' exports leave as they are."""
SHARED, LENGTHS = 40, (1, 1, 2, 3, 5, 7, 11, 9, 16, 15, 17, 16, 31, 23, 32, 24, 64, 33, 90, 50)
"""Tokens of a prompt; every second one has SHARED more in front, the same in all of them."""
NEW = 24
MARGIN = 1e-3
"""Between the two likeliest tokens of a reference, logits; vLLM's differ by a hundredth of it."""


class State(dict[str, Tensor]):
    """A state dict, some rows at a time."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self[name][first:last]


def write_exports(folder: Path) -> list[str]:
    """A folder for every solver, and some by transformers itself; their names."""
    extras = Extras({}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    for name in SOLVERS:
        model = our_model(name, **{**SHAPE, "tie_embeddings": name in TIED})
        export_folder(model.config, State(model.state_dict()), folder / name, extras)
    return [*SOLVERS, *(name for name in VARIED if write_varied(folder, name))]


def write_varied(folder: Path, name: str) -> bool:
    """By transformers, the model of ``iiet-plan`` with other fields; whether IIETConfig has them."""
    fields = json.loads((folder / "iiet-plan" / "config.json").read_text())
    unknown = VARIED[name].keys() - IIETConfig().to_dict().keys()
    if unknown:
        print(f"NOT RUN: {name}, IIETConfig has no {', '.join(unknown)}", file=sys.stderr, flush=True)
        return False
    for field, value in VARIED[name].items():
        fields[field] = {**fields[field], **value} if isinstance(value, dict) else value
    torch.manual_seed(3)
    model = IIETForCausalLM(IIETConfig(**fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("bias", "solver", "norm")):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    model.save_pretrained(folder / name)
    return True


def prompts(seed: int) -> list[list[int]]:
    """Of :data:`LENGTHS` tokens, drawn with ``seed`` but for those that are shared."""
    generators = [torch.Generator().manual_seed(number) for number in (0, seed + 1)]
    shared, *own = [
        torch.randint(3, SHAPE["vocab_size"], (length,), generator=generators[n > 0]).tolist()
        for n, length in enumerate([SHARED, *LENGTHS])
    ]
    return [(shared if n % 2 else []) + tokens for n, tokens in enumerate(own)]


@torch.no_grad()
def written_by(model: Any, prompt: list[int]) -> dict[str, Any]:
    """Greedy text, the log probability of each of its tokens, and the least margin."""
    ids, chances, margin = list(prompt), [], float("inf")
    for _ in range(NEW):
        logits_V = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        best = logits_V.topk(2).values
        margin = min(margin, float(best[0] - best[1]))
        ids.append(int(logits_V.argmax()))
        chances.append(float(logits_V.log_softmax(-1)[ids[-1]]))
    return {"prompt": prompt, "text": ids[len(prompt) :], "logprobs": chances, "margin": margin}


def references(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What a folder's model writes; a prompt with a tie in its text, within the margin, makes way."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, **options
    )
    found: list[dict[str, Any]] = []
    for round_of_draws in range(20):
        for prompt in prompts(round_of_draws)[len(found) :]:
            text = written_by(model.eval(), prompt)
            if text["margin"] < MARGIN:
                break
            found.append(text)
        if len(found) == len(LENGTHS):
            return found
    raise AssertionError(f"{folder}: too many ties")


@torch.no_grad()
def score_in_bfloat16(folder: Path, texts: list[dict[str, Any]]) -> None:
    """Note the log probabilities that the model gives the texts' tokens in bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    for text in texts:
        ids = torch.tensor([text["prompt"] + text["text"]])
        chances_TV = model.eval()(ids, use_cache=False).logits[0].float().log_softmax(-1)
        text["bf16"] = [
            float(chances_TV[at - 1, ids[0, at]]) for at in range(ids.shape[1] - NEW, ids.shape[1])
        ]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    texts = {name: references(folder / name) for name in write_exports(folder)}
    texts["iiet-plan as first"] = references(folder / "iiet-plan", kv_cache="first")
    for name in BFLOAT16:
        score_in_bfloat16(folder / name, texts[name])
    (folder / "references.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main()
