"""The checks of ``tools/gpu_acceptance.py``, most telling first; each module has one function ``check``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from gpu_checks.base import CheckFunction


@dataclass(frozen=True)
class Check:
    """One check: what it is called in the report, and its share of the time."""

    module: str
    title: str
    seconds: float
    """Of nine minutes; what earlier checks left over comes on top."""

    def load(self) -> CheckFunction:
        return cast("CheckFunction", importlib.import_module(f"gpu_checks.{self.module}").check)


CHECKS = {
    "build": Check("build", "The extension, built here from source; the doctor", 75),
    "kernels": Check("kernels", "Every form of every kernel against fp64, twice", 45),
    "documents": Check("documents", "Attention within documents: flex against a mask", 30),
    "bandwidth": Check("bandwidth", "merge_norm and the transposed backward against a copy", 50),
    "step": Check("step", "A training step against LlamaForCausalLM and against FLOPs", 85),
    "deepspeed": Check("deepspeed_runs", "DeepSpeed here: ZeRO 0-3, offload, resume", 75),
    "waits": Check("waits", "How often a training step waits for the GPU", 30),
    "inference": Check("inference", "Table 3 and Figure 3b: what inference costs", 80),
    "sanitizer": Check("sanitizer", "compute-sanitizer over the kernels", 40),
    "training": Check("training", "Loss against tokens, FLOPs and time, 55M", 30),
}
"""``training`` takes whatever time is left when it starts."""
