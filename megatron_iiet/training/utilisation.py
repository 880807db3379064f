"""How much of the hardware a run uses: of its arithmetic, and of its memory.

MFU counts the FLOPs the model needs (forward + twice that backward, corrector iterations included, the
full T × T attention scores); HFU adds what recomputation repeats. Both are shares of the device's peak.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_iiet.models.transformer import Transformer
from megatron_iiet.ops.products import matmul


class Peaks(NamedTuple):
    """Dense peaks of one device in TFLOP/s, by the type of a product's factors; sums are fp32."""

    fp32: float
    tf32: float | None
    bf16: float | None
    fp8: float | None
    fp16: float | None = None
    """Where it is not bf16's."""


PEAKS = {
    "V100": Peaks(15.7, None, None, None, 125.0),
    "A10": Peaks(31.2, 62.5, 125.0, None),
    "A10G": Peaks(31.5, 35.0, 70.0, None),
    "A30": Peaks(10.3, 82.0, 165.0, None),
    "A40": Peaks(37.4, 74.8, 149.7, None),
    "A100": Peaks(19.5, 156.0, 312.0, None),
    "A800": Peaks(19.5, 156.0, 312.0, None),
    "RTX A6000": Peaks(38.7, 77.4, 154.8, None),
    "RTX 3090": Peaks(35.6, 35.6, 71.0, None),
    "RTX 4090": Peaks(82.6, 82.6, 165.2, 330.3),
    "RTX 6000 Ada": Peaks(91.1, 182.1, 364.2, 728.5),
    "L4": Peaks(30.3, 60.0, 121.0, 242.0),
    "L40": Peaks(90.5, 90.5, 181.0, 362.0),
    "L40S": Peaks(91.6, 183.0, 362.0, 733.0),
    "H20": Peaks(44.0, 74.0, 148.0, 296.0),
    "H100": Peaks(67.0, 494.0, 989.0, 1979.0),
    "H100 PCIe": Peaks(51.0, 378.0, 756.0, 1513.0),
    "H100 NVL": Peaks(60.0, 417.0, 835.0, 1670.0),
    "H800": Peaks(67.0, 494.0, 989.0, 1979.0),
    "H800 PCIe": Peaks(51.0, 378.0, 756.0, 1513.0),
    "H200": Peaks(67.0, 494.0, 989.0, 1979.0),
    "H200 NVL": Peaks(60.0, 417.0, 835.0, 1670.0),
    "GH200": Peaks(67.0, 494.0, 989.0, 1979.0),
    "B200": Peaks(75.0, 1125.0, 2250.0, 4500.0),
    "GB200": Peaks(80.0, 1250.0, 2500.0, 5000.0),
    "B300": Peaks(75.0, 1125.0, 2250.0, 4500.0),
    "GB300": Peaks(80.0, 1250.0, 2500.0, 5000.0),
    "MI250X": Peaks(47.9, None, 191.5, None),  # of one of its two dies, which is what torch calls a device
    "MI300X": Peaks(163.4, 653.7, 1307.4, 2614.9),
    "MI325X": Peaks(163.4, 653.7, 1307.4, 2614.9),
}
"""From the makers' data sheets, without sparsity, by the words that a device's name must have."""


def step_flops(model: Transformer, length: int, recompute: str) -> tuple[int, int]:
    """(model FLOPs, hardware FLOPs) of forward and backward of one sequence of ``length`` tokens."""
    layers, head = model.layer_flops(length), model.head_flops(length)
    needed = 3 * (layers + head)
    return needed, needed + (0 if recompute == "off" else layers)


def peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Peak FLOP/s of one process's device for a run's products, and where the figure is from; None if it is
    unknown."""
    if device.type == "cpu":
        return _measured_peak(precision), "matmul of 1024³ timed at start-up, per process"
    name = torch.cuda.get_device_name(device)
    kind = precision
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    peaks = peaks_of(name)
    tera_flops = (getattr(peaks, kind) or (peaks.bf16 if kind == "fp16" else None)) if peaks else None
    if tera_flops is None:
        return None, f"no {kind} peak known for {name}; set logging.peak_tflops"
    return tera_flops * 1e12, f"data sheet of {name}, dense {kind}"


def peaks_of(name: str) -> Peaks | None:
    """Those of the device called ``name``: of all entries whose words are in it, the one with the most."""
    words = re.split(r"[\s-]+", name)
    known = [key for key in PEAKS if set(key.split()) <= set(words)]
    return PEAKS[max(known, key=lambda key: len(key.split()))] if known else None


class RankReport(NamedTuple):
    """What one rank used."""

    host: str
    stage: int
    """Of the pipeline; one has other work than the next."""
    memory: int
    """Bytes that it holds of its device's."""
    peak_memory: int
    own_seconds: float
    """What it needed for itself, see :class:`.engine.results.OwnTime`."""


def slowest(reports: Sequence[RankReport]) -> tuple[int, float]:
    """The rank that needs most beside the others of its stage, and its time over their (lower) median."""
    ratios = []
    for report in reports:
        median = statistics.median_low(other.own_seconds for other in reports if other.stage == report.stage)
        ratios.append(report.own_seconds / median if median else 1.0)
    rank = max(range(len(reports)), key=ratios.__getitem__)
    return rank, ratios[rank]


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Memory that this process holds of its device now, and the most since the start: what torch's allocator
    gave out of a GPU's, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now, most = (re.search(rf"{field}:\s+(\d+) kB", status) for field in ("VmRSS", "VmHWM"))
    assert now is not None
    assert most is not None
    return int(now[1]) * 1024, int(most[1]) * 1024


def _measured_peak(precision: str) -> float:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    n = 1024
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matmul(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
