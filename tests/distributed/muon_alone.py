"""Muon of whole matrices in one process, by singular values instead of Newton-Schulz iterations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.config.optimizers import Muon

ENDS = ("qkv.weight", "output.weight", "gate_up.weight", "down.weight")


class MuonAlone:
    """Moves the matrices of the layers."""

    def __init__(self, named: dict[str, torch.nn.Parameter], config: RunConfig) -> None:
        assert isinstance(config.optimizer, Muon)
        self.config, self.optimizer = config, config.optimizer
        self.named = {name: p for name, p in named.items() if name.endswith(ENDS)}
        self.means = {name: torch.zeros_like(p) for name, p in self.named.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step, with the gradients that there are."""
        decay = self.optimizer.momentum
        for name, p in self.named.items():
            assert p.grad is not None
            mean = self.means[name] = decay * self.means[name] + (1 - decay) * p.grad
            ahead = decay * mean + (1 - decay) * p.grad
            step = torch.cat([self._step_of(each) for each in ahead.split(self._rows(name, len(p)))])
            p.copy_(p * (1 - lr * self.optimizer.weight_decay) - lr * step)

    def _rows(self, name: str, rows: int) -> list[int]:
        """Of the matrices that a parameter consists of."""
        model = self.config.model
        if name.endswith("qkv.weight"):
            return [n * model.head_width for n in (model.num_attention_heads, *[model.num_kv_heads] * 2)]
        return [rows // 2] * 2 if name.endswith("gate_up.weight") else [rows]

    def _step_of(self, matrix: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(self.optimizer.newton_schulz_steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return (0.2 * math.sqrt(max(matrix.shape)) * (u * s) @ v).float()
