"""The compiled extension: is it there, does it fit this torch, and what its operators tell torch.

``setup.py`` builds it; nothing is ever compiled at import or run time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REBUILD = "pip install --no-build-isolation -e . builds it"
_PACKAGE = Path(__file__).parents[1]
OPERATORS = (
    "merge_norm",
    "merge_norm_backward",
    "transposed_merge",
    "swiglu",
    "swiglu_backward",
    "rotated_heads",
    "cross_entropy_parts",
    "cross_entropy_gradient_",
    "has_attention",
    "attention",
    "attention_gradients",
    "pack_documents",
)
"""What csrc/schema.cpp defines."""


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the extension's operators can be used, and why not."""

    loaded: bool
    reason: str
    """One clause."""
    build: dict[str, Any] = field(default_factory=dict)
    """What setup.py noted: torch, python, cpu (instruction sets), cuda (toolkit or None), cuda_targets, …"""


@cache
def load_extension() -> ExtensionStatus:
    """Load the extension once; a missing or unfit one is a status, not an error."""
    libraries = sorted(_PACKAGE.glob("_extension*.so"))
    note = _PACKAGE / "_extension.json"
    if not libraries or not note.exists():
        return ExtensionStatus(False, f"the extension is not built ({REBUILD})")
    try:
        build = json.loads(note.read_text(encoding="utf-8"))
        built, here = build["torch"], torch.__version__
    except (OSError, ValueError, KeyError) as error:
        return ExtensionStatus(False, f"{note.name} is damaged: {error!r} ({REBUILD} anew)")
    if built != here:
        reason = f"the extension was built for torch {built}, this is {here} ({REBUILD} anew)"
        return ExtensionStatus(False, reason, build)
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return ExtensionStatus(False, f"{libraries[0].name} does not load: {error.__cause__ or error}", build)
    if lacking := [name for name in OPERATORS if not hasattr(torch.ops.megatron_iiet, name)]:
        return ExtensionStatus(
            False, f"{libraries[0].name} is of older sources: no {lacking[0]} ({REBUILD} anew)"
        )
    describe_operators("megatron_iiet")
    return ExtensionStatus(True, "built and loaded", build)


def has_cpu_kernels(backend: str) -> bool:
    """Whether operators that only the CPU has kernels for are to use them.

    Raises:
        ValueError: the backend is ``cpu``, and the extension is not there.
    """
    if backend == "cpu" and not (status := load_extension()).loaded:
        raise ValueError(f"backend 'cpu' is not available here: {status.reason}")
    return backend == "cpu"


def describe_operators(namespace: str) -> None:
    """Shapes, for torch.compile and meta tensors; and a derivative is asked for in vain, it is not zero."""
    for fake in (_fake_merge_norm, _fake_merge_norm_backward, _fake_transposed_merge):
        name = fake.__name__.removeprefix("_fake_")
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_autograd(f"{namespace}::{name}", _no_derivative)


def _no_derivative(*_: Any) -> None:
    raise RuntimeError(
        "the fused operators have no derivatives; megatron_iiet.ops.merge_norm has, and with the "
        "reference backend second ones too (create_graph=True)"
    )


def _check_devices(like: Tensor, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Fake kernels stand in for the real ones when any argument is on the meta device."""
    for name, value in tensors.items():
        one = value is None or isinstance(value, Tensor)
        named = {name: value} if one else {f"{name}[{i}]": t for i, t in enumerate(value or ())}
        for each, t in named.items():
            if isinstance(t, Tensor) and t.device != like.device:
                raise ValueError(f"{each} is on {t.device}, expected {like.device}")


def _fake_merge_norm(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    like = increments[0] if residual is None else residual
    _check_devices(like, increments=increments, coefficients=coefficients, norm_weight=norm_weight)
    rows = coefficients.shape[:-1] if coefficients is not None else ()
    none, none32 = like.new_empty(0), like.new_empty(0, dtype=torch.float32)
    merged = like.new_empty((*rows, *like.shape)) if increments else none
    if norm_weight is None:
        return merged, none.clone(), none32
    return merged, like.new_empty(like.shape), like.new_empty(like.shape[:-1], dtype=torch.float32)


def _fake_merge_norm_backward(
    grad_merged: Tensor | None,
    grad_normed: Tensor | None,
    merged: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    want_increments: bool,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    like = grad_normed if grad_merged is None else grad_merged
    assert like is not None
    _check_devices(like, grad_normed=grad_normed, merged=merged, rstd=rstd, norm_weight=norm_weight)
    _check_devices(like, increments=increments, coefficients=coefficients)
    weight = (0,) if grad_normed is None or norm_weight is None else norm_weight.shape
    row = (0,) if coefficients is None or not want_coefficients else coefficients.shape
    return (
        like.new_empty(0 if grad_normed is None else like.shape),
        like.new_empty(weight, dtype=torch.float32),
        [t.new_empty(t.shape) for t in increments] if want_increments and coefficients is not None else [],
        like.new_empty(row, dtype=torch.float32),
    )


def _fake_transposed_merge(
    direct: Tensor | None,
    increment: Tensor,
    gradients: Sequence[Tensor],
    coefficients: Tensor,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(increment, direct=direct, gradients=gradients, coefficients=coefficients)
    wanted = len(gradients) if want_coefficients else 0
    return increment.new_empty(increment.shape), increment.new_empty(wanted, dtype=torch.float32)
