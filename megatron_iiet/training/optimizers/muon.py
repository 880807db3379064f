"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for all else.

torch.optim.Muon computes the same of a matrix that is whole and alone, and tests compare with it. Here q, k
and v are one parameter, ranks hold parts of it, which ZeRO makes intervals of one flat tensor, and the device
may leave a step out. DeepSpeed's own orthogonalises before it clips, after which hardly anything moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_iiet.config.optimizers import Muon
from megatron_iiet.ops.products import product_dtype
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.training.optimizers import MasterPart, Prepared, adamw, decay_groups

MOMENTS = ("momentum_buffer",)
"""Running mean of the gradient, by torch's name."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz iterations of the fifth degree, after which singular values are about 1 (0.7 to 1.2)."""
SMALLEST_NORM = 1e-7


def prepare(model: nn.Module, config: Muon) -> Prepared:
    """Muon and AdamW for a model's parameters."""
    hidden = {
        p
        for name, p in model.named_parameters()
        if name.startswith("layers.") and shard_of(p) is not None and not name.endswith(".bias")
    }
    groups = []
    for group in decay_groups(model, config.weight_decay):
        for muon in (True, False):
            parameters = [p for p in group["params"] if (p in hidden) is muon]
            groups += [{**group, "params": parameters, "muon": muon}] * bool(parameters)
    moments = {p: MOMENTS if group["muon"] else adamw.MOMENTS for group in groups for p in group["params"]}
    return Prepared(groups, partial(MuonWithAdamW, config=config), moments, MuonWithAdamW.connect)


@dataclass(frozen=True)
class _Matrix:
    """A parameter of the layers, as this rank sees it."""

    shape: tuple[int, ...]
    """Of the tensor-parallel shard."""
    shard: Shard
    dtype: torch.dtype
    """What it is multiplied in."""
    divided: bool
    """Whether data-parallel ranks step a part each."""
    part: MasterPart | None
    """The part that this rank steps."""


class MuonWithAdamW(torch.optim.AdamW):
    """torch's fused AdamW, but for the groups that ``muon`` marks."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], config: Muon) -> None:
        super().__init__([dict(group) for group in groups], **adamw.settings(config), fused=True)
        self._config = config
        self._hidden: list[Tensor] = [p for group in groups if group["muon"] for p in group["params"]]
        self._matrices: dict[Tensor, list[_Matrix]] = {}
        """Of every tensor that is stepped, in the same order on every rank."""
        self._context: ParallelContext | None = None

    def connect(self, flats: Sequence[Tensor], parts: Iterable[MasterPart], context: ParallelContext) -> None:
        """See :class:`Prepared`."""
        held = {part.parameter: part for part in parts}
        own = {
            number: (part.index, part.shape, part.numel)
            for number, parameter in enumerate(self._hidden)
            if (part := held.get(parameter)) is not None
        }
        everyones = context.data.gather_objects(own)
        for number, parameter in enumerate(self._hidden):
            found = [each[number] for each in everyones if number in each]
            if not found:  # it is not trained
                continue
            index, shape, _ = found[0]
            divided = any(0 < numel < math.prod(shape) for *_, numel in found)
            shard, part = shard_of(parameter), held.get(parameter)
            assert shard is not None
            dtype = product_dtype(parameter.dtype, context.device)
            matrix = _Matrix(shape, shard, dtype, divided, part if part is not None and part.numel else None)
            self._matrices.setdefault(flats[index], []).append(matrix)
        self._context = context

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; where ``found_inf`` is 1 it moves nothing."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for flat in group["params"]:
                    if flat.grad is not None:
                        self._step_matrices(flat, flat.grad, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_matrices(self, flat: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        config, state = self._config, self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        buffer = state["momentum_buffer"]
        left_out: Tensor | None = getattr(self, "found_inf", None)
        moves = flat.new_ones(()) if left_out is None else 1 - left_out
        gradient = torch.where(moves > 0, gradient, 0)  # 0 x NaN is NaN
        buffer.lerp_(gradient, (1 - config.momentum) * moves)
        update = gradient.lerp(buffer, config.momentum).contiguous()
        for matrix in self._matrices.get(flat, []):
            self._orthogonalise_part(update.view(-1), matrix)
        lr = group["lr"] * config.matrix_lr_ratio
        flat.mul_(1 - lr * group["weight_decay"] * moves)
        flat.addcmul_(update, moves, value=-lr)

    def _orthogonalise_part(self, update: Tensor, matrix: _Matrix) -> None:
        """Put the step of a matrix in the place of its momentum, as far as this rank steps it."""
        context, part = self._context, matrix.part
        assert context is not None
        local = update.new_zeros(math.prod(matrix.shape), device=context.device)
        if part is not None:
            local[part.start : part.start + part.numel] = part.own(update)
        if matrix.divided:  # the other parts are zero: sums are exact
            context.data.all_reduce(local)
        if part is None:
            return
        tensor, shard = context.tensor, matrix.shard
        whole = shard.join(list(tensor.all_gather(local.view(matrix.shape))))
        steps = [self._step_of(block, matrix.dtype) for block in whole.split(shard.blocks, shard.dim)]
        own = shard.take(torch.cat(steps, shard.dim), tensor.size, tensor.rank)
        part.own(update).copy_(own.view(-1)[part.start : part.start + part.numel])

    def _step_of(self, momentum: Tensor, dtype: torch.dtype) -> Tensor:
        """The step of a whole matrix at a learning rate of 1, fp32."""
        rows, columns = momentum.shape
        if self._config.adjust_lr == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        return orthogonalised(momentum, self._config.newton_schulz_steps, dtype).float() * scale


def orthogonalised(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ, by Newton-Schulz iterations in ``dtype``."""
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = (matrix / matrix.norm().clamp(min=SMALLEST_NORM)).to(dtype)
    x = x.t() if rows > columns else x
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if rows > columns else x
