"""The whole model: embedding, a stack of integrated layers, final norm, head."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_iiet.config import RunConfig
from megatron_iiet.models.history import History
from megatron_iiet.models.layer import DecoderLayer, RMSNorm, Rotary
from megatron_iiet.models.solvers import Solver, build_solver


@dataclass
class BoundIncrement:
    """A decoder layer as the solver sees it: F with its rotary tables and recomputation bound."""

    layer: DecoderLayer
    tables: tuple[Tensor, Tensor]
    recompute: bool

    @property
    def input_norm(self) -> RMSNorm:
        return self.layer.input_norm

    def __call__(self, y_BTD: Tensor, normed_BTD: Tensor | None, evaluation: int) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self.layer, y_BTD, normed_BTD, self.tables, use_reentrant=False))
        return cast(Tensor, self.layer(y_BTD, normed_BTD, self.tables))


class IntegratedLayer(nn.Module):
    """One decoder layer F (``increment``) and the solver that integrates it."""

    def __init__(self, config: RunConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.increment = DecoderLayer(config.model, backend)
        self.solver: Solver = build_solver(config, layer, backend)
        self.recompute = config.training.recompute

    def forward(
        self, y_BTD: Tensor, history: History, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``(y_{n+1}, the increment to keep)``, both [B, T, D]."""
        increment_fn = BoundIncrement(self.increment, tables, self.recompute == "evaluation")
        if self.recompute == "layer" and torch.is_grad_enabled():
            return cast(
                tuple[Tensor, Tensor],
                checkpoint(self.solver, y_BTD, increment_fn, history, use_reentrant=False),
            )
        return cast(tuple[Tensor, Tensor], self.solver(y_BTD, increment_fn, history))


class Transformer(nn.Module):
    """A decoder-only language model whose layers are integrated by the configured solver.

    Parameters are created by name: ``embedding.weight``, ``layers.{n}.increment.…``,
    ``layers.{n}.solver.…``, ``norm.weight`` and, untied, ``head.weight``.
    """

    def __init__(self, config: RunConfig, *, backend: str = "reference") -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.embedding_scale = model.resolved_embedding_scale
        self.rotary = Rotary(model)
        self.layers = nn.ModuleList(IntegratedLayer(config, n, backend) for n in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, backend)
        self.head = (
            None if model.tie_embeddings else nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        )

    @property
    def solvers(self) -> list[Solver]:
        """The solver of every layer, in order."""
        return [cast(IntegratedLayer, layer).solver for layer in self.layers]

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, weights_B: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of token ids; with targets the mean cross-entropy in nats per token (fp32 scalar);
        with row weights the sum over rows of weight times the row's mean cross-entropy.

        Raises:
            ValueError: the sequence is longer than the rotary table.
        """
        y_BTD = self.embedding(tokens_BT) * self.embedding_scale
        tables = self.rotary(tokens_BT.shape[1], y_BTD.dtype)
        history = History(y_BTD if any(s.merges_embedding and s.merging for s in self.solvers) else None)
        for layer in self.layers:
            y_BTD, increment_BTD = layer(y_BTD, history, tables)
            if cast(IntegratedLayer, layer).solver.keeps_increment:
                history.append(increment_BTD)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(self.norm(y_BTD), weight)
        if targets_BT is None:
            return logits_BTV
        reduction = "mean" if weights_B is None else "none"
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)
        return loss if weights_B is None else (loss.view_as(targets_BT).mean(-1) * weights_B).sum()

    def set_iterations(self, iterations: list[int], *, merging: bool = True) -> None:
        """Change the corrector iterations r_n of every layer from the next forward pass on.

        ``merging=False`` runs every layer as plain explicit Euler, whatever the counts: the first stage of
        two-stage training.

        Raises:
            ValueError: a count other than 0 for a solver without corrector.
        """
        for n, (solver, r) in enumerate(zip(self.solvers, iterations, strict=True)):
            if r and not solver.iterative:
                raise ValueError(
                    f"layer {n} is integrated by {type(solver).__name__}: no corrector to iterate {r} times"
                )
            solver.iterations = r
            solver.merging = merging

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every weight matrix from normal(0, init_std).

        Each matrix has a generator keyed by the seed and its own name: initial weights do not depend on
        the solver, on which process holds a parameter, or on the order of creation.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and ".solver." not in name:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                values = torch.empty(parameter.shape).normal_(
                    0.0, self.config.model.init_std, generator=generator
                )
                parameter.copy_(values)

    def forward_flops(self, length: int) -> int:
        """FLOPs of the forward pass of one sequence, iterations counted, as the IIET paper counts them."""
        return self.layer_flops(length) + self.head_flops(length)

    def layer_flops(self, length: int) -> int:
        """FLOPs of all evaluations of all layers on one sequence: E·(2(4d² + 3·d·ffn) + 4·d·T)·T."""
        layers = cast(list[IntegratedLayer], self.layers)
        return sum(layer.solver.evaluations * layer.increment.forward_flops(length) for layer in layers)

    def head_flops(self, length: int) -> int:
        """FLOPs of the output head on one sequence: 2·d·V·T."""
        return 2 * self.embedding.num_embeddings * self.embedding.embedding_dim * length

    def num_parameters(self) -> int:
        """Parameters, tied ones once, merge coefficients and solver norms included."""
        return sum(p.numel() for p in self.parameters())

    def num_solver_parameters(self) -> int:
        """Parameters that belong to solvers: merge coefficients and the released variant's norms."""
        return sum(p.numel() for solver in self.solvers for p in solver.parameters())
