"""What vLLM does with the cases of a file, in vLLM's environment: a JSON line a case, as soon as it is known.

python tests/vllm/engine.py CASES.json RESULTS.jsonl
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or tensor parallel wants a NUMA node for every rank
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a refusal in the engine is the exception that is seen
}


COUNTS = {
    "vllm:spec_decode_num_accepted_tokens": "drafted tokens accepted",
    "vllm:num_preemptions": "preempted",
}


def solver_types(model: Any) -> list[str]:
    """The types that the solvers' parameters have."""
    return sorted({str(value.dtype) for name, value in model.named_parameters() if ".solver." in name})


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Texts of the case's prompts and the log probabilities of their tokens."""
    from vllm import LLM, SamplingParams

    engine = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 160}
    llm = LLM(case["folder"], **engine | case["engine"])
    greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    found: dict[str, Any] = {"types": llm.apply_model(solver_types)[0] if case.get("types") else []}
    for _ in range(
        case.get("times", 1)
    ):  # the last time counts: with prefix caching, prompts are cached then
        if case.get("scored"):
            options = SamplingParams(max_tokens=1, prompt_logprobs=0, **greedy)
        else:
            options = SamplingParams(max_tokens=case["new"], logprobs=0, **greedy)
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        outputs = llm.generate(prompts, options, use_tqdm=False)
    found["texts"] = [list(output.outputs[0].token_ids) for output in outputs]
    found["cached"] = sum(output.num_cached_tokens or 0 for output in outputs)
    metrics = [] if case["engine"].get("disable_log_stats", True) else llm.get_metrics()
    found["counts"] = {COUNTS[count.name]: count.value for count in metrics if count.name in COUNTS}
    chosen = [
        output.prompt_logprobs[1:] if case.get("scored") else output.outputs[0].logprobs for output in outputs
    ]
    tokens = [prompt[1:] for prompt in case["prompts"]] if case.get("scored") else found["texts"]
    found["logprobs"] = [
        [at[token].logprob for at, token in zip(places, ids, strict=True)]
        for places, ids in zip(chosen, tokens, strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a") as results:
        for case in cases:
            start = time.monotonic()
            try:
                found = run(case)
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            found |= {"name": case["name"], "seconds": round(time.monotonic() - start, 1)}
            results.write(json.dumps(found) + "\n")
            results.flush()
            gc.collect()


if __name__ == "__main__":
    main()
