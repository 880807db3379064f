"""How much of the hardware's arithmetic a run uses.

MFU counts the FLOPs the model needs (forward + twice that backward, corrector iterations included, the
full T × T attention scores); HFU adds what recomputation repeats. Both are shares of the device's peak.
"""

from __future__ import annotations

import time

import torch

from megatron_iiet.models.transformer import Transformer
from megatron_iiet.ops.products import matmul

# Dense bf16 peaks in TFLOP/s from the makers' data sheets, by a part of the device's name; first hit.
_BF16_PEAKS = (
    ("GB200", 2450.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def step_flops(model: Transformer, length: int, recompute: str) -> tuple[int, int]:
    """(model FLOPs, hardware FLOPs) of forward and backward of one sequence of ``length`` tokens."""
    layers, head = model.layer_flops(length), model.head_flops(length)
    needed = 3 * (layers + head)
    return needed, needed + (0 if recompute == "off" else layers)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak FLOP/s of one process's device and where the figure is from; 0 if unknown."""
    if device.type == "cpu":
        return _measured_peak(precision), "matmul of 1024³ timed at start-up, per process"
    name = torch.cuda.get_device_name(device)
    for part, tflops in _BF16_PEAKS:
        if part in name:
            if precision == "bf16":
                return tflops * 1e12, f"data sheet of {name}, dense bf16"
            break
    return 0.0, f"no {precision} peak known for {name}; set logging.peak_tflops"


def _measured_peak(precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n = 1024
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matmul(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
