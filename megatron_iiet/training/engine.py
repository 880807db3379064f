"""The one seam to DeepSpeed: nothing else in the package imports it."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.data.batches import ValidationBatch
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.optimizer import build_optimizer, parameter_groups

# On CPUs DeepSpeed would compile a shared-memory collective at first use (45 s, and a stale lock file
# hangs it). It serves inference only.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed calls a collective by the name it had before torch 2.13; users cannot help it.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)

MODEL_STATES = "mp_rank_00_model_states.pt"  # DeepSpeed's file of the module's weights, stages 0 to 2


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean cross-entropy in nats per token over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate applied."""


class MixedPrecisionEngine(DeepSpeedEngine):
    """DeepSpeed's engine, but parameters marked ``keep_fp32`` are not cast to bf16.

    ZeRO-3 packs all parameters into one buffer of one type and can't keep them apart: there the working
    copy of a marked parameter is bf16 like the rest (its master copy is fp32 in every stage).
    """

    def _cast_module_mixed_precision(
        self, param_dtype: torch.dtype | None, *args: Any, **kwargs: Any
    ) -> None:
        kept = {}
        if self.zero_optimization_stage() < 3:
            kept = {p: p.data for p in self.module.parameters() if getattr(p, "keep_fp32", False)}
        super()._cast_module_mixed_precision(param_dtype, *args, **kwargs)
        for parameter, data in kept.items():
            parameter.data = data


class Engine:
    """A model with its optimizer under DeepSpeed: steps, evaluates, saves and loads."""

    def __init__(
        self, model: Transformer, config: RunConfig, ds_config: dict[str, Any], context: ParallelContext
    ) -> None:
        """Wrap ``model``; ``ds_config`` is the reconciled DeepSpeed JSON (no "auto" left)."""
        deepspeed_logger.setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_init_required=False)
        self.model = model
        self.context = context
        self.zero_stage: int = ds_config.get("zero_optimization", {}).get("stage", 0)
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        own_optimizer = "optimizer" not in ds_config
        with redirect_stdout(io.StringIO()):  # it prints a memory report a parameter group
            self._engine = MixedPrecisionEngine(
                args=None,
                model=model,
                optimizer=build_optimizer(model, config.optimizer) if own_optimizer else None,
                model_parameters=None if own_optimizer else parameter_groups(model, config.optimizer),
                config=ds_config,
                config_class=DeepSpeedConfig(ds_config),
                dist_init_required=False,
            )

    def train_step(self, micro_batches: Iterator[Tensor], lr: float) -> StepResult:
        """One optimizer step over ``accumulation`` micro-batches of token windows, each [b, T + 1]."""
        engine = self._engine
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.context.device)
        plain_norm = None
        for micro_step in range(self.accumulation):
            loss = engine(*self._split(next(micro_batches)))
            engine.backward(loss)
            total += loss.detach()
            if micro_step == self.accumulation - 1 and self.zero_stage == 0:
                # DeepSpeed reports no norm without ZeRO; gradients are reduced and unclipped here.
                plain_norm = torch.nn.utils.get_total_norm(
                    [p.grad for p in self.model.parameters() if p.grad is not None]
                ).item()
            engine.step()
        grad_norm = plain_norm if plain_norm is not None else engine.get_global_grad_norm()
        loss = self.context.mean(total / self.accumulation).item()
        return StepResult(loss, float("nan") if grad_norm is None else float(grad_norm), lr)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ValidationBatch]) -> float:
        """Mean cross-entropy in nats per token over the windows of weight 1 of all ranks."""
        self._engine.eval()
        sums = torch.zeros(2, device=self.context.device)  # of losses, of weights
        for tokens, weights in batches:
            weights = weights.to(self.context.device)
            sums += torch.stack((self._engine(*self._split(tokens), weights), weights.sum()))
        self._engine.train()
        loss, weight = self.context.mean(sums).tolist()
        return loss / weight

    @torch.no_grad()
    def forward(self, windows: Tensor) -> None:
        """A forward pass on token windows [b, T + 1] whose result nobody needs; for observers."""
        self._engine.eval()
        self._engine(*self._split(windows))
        self._engine.train()

    def coefficient_norms(self) -> dict[str, float]:
        """Euclidean norm of every solver's merge coefficients, by parameter; the same on every rank."""
        named = {
            name: p
            for name, p in self.model.named_parameters()
            if name.endswith("coefficients") and p.requires_grad
        }
        with deepspeed.zero.GatheredParameters(list(named.values()), enabled=self.zero_stage == 3):
            return {name: p.detach().float().norm().item() for name, p in named.items()}

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's shards to ``folder/tag``; returns when every rank has."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Restore weights and optimizer from ``folder/tag``, written under the same layout."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise ValueError(
                f"{folder / tag} holds no DeepSpeed checkpoint; remove it to start from an older one"
            )

    def _split(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.to(self.context.device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def export_fp32(folder: Path, tag: str) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint, parameter name → tensor, read without a process group.

    Like resuming, it unpickles what DeepSpeed pickled: read checkpoints of your own runs only.

    Raises:
        ValueError: DeepSpeed's files are missing, damaged or incomplete.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    shards = folder / tag
    files = sorted(shards.glob("*_optim_states.pt"), key=lambda file: (len(file.name), file.name))
    try:
        if not files:  # stage 0 in fp32: the module's weights are the masters
            states = torch.load(shards / MODEL_STATES, map_location="cpu", weights_only=True)
            return cast(dict[str, Tensor], states["module"])
        first = torch.load(files[0], map_location="cpu", weights_only=False, mmap=True)[
            "optimizer_state_dict"
        ]
        if "zero_stage" not in first:
            return _export_bf16_optimizer(shards, files)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it narrates
            return cast(dict[str, Tensor], get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag))
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shards} is not a complete DeepSpeed checkpoint ({reason})") from None


def _export_bf16_optimizer(shards: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Stage 1 in bf16: DeepSpeed's BF16_Optimizer, a layout that its zero_to_fp32 does not read.

    Every parameter group is one flat fp32 tensor, cut into equal parts over the ranks and padded at the end.
    """
    ranks = [
        torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        for file in files
    ]
    parts = max(ranks[0]["partition_count"])
    if parts != len(files):
        raise ValueError(f"{parts} ranks wrote it, but there are {len(files)} optimizer files")
    states = torch.load(shards / MODEL_STATES, map_location="cpu", weights_only=False, mmap=True)
    weights: dict[str, Tensor] = {}
    for group, shapes in enumerate(states["param_shapes"]):
        flat = torch.cat([rank["single_partition_of_fp32_groups"][group] for rank in ranks])
        sizes = [shape.numel() for shape in shapes.values()]
        pieces = flat.split([*sizes, flat.numel() - sum(sizes)])
        weights |= {
            name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=False)
        }
    return weights
