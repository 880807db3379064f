"""The CUDA kernels on CPU tensors: csrc/emulation runs them as written, one fiber for each CUDA thread.

The functions have the signatures of csrc/schema.cpp. The library is compiled when it is missing or older than
its sources.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX", "g++")
# No contraction: the kernels say where a multiplication and an addition are one.
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]

SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2}
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class EmulatorError(RuntimeError):
    """A limit of the kernels, or a bug that the emulator saw in one."""


def build(source: str, target: str, *flags: str) -> Path:
    """Compile csrc/emulation/``source`` into build/emulation/``target``, if it has changed since."""
    BUILD.mkdir(parents=True, exist_ok=True)
    result = BUILD / target
    sources = [*(CSRC / "emulation").iterdir(), *(CSRC / "include" / "merge_norm").iterdir()]
    newest = max(path.stat().st_mtime for path in sources)
    with open(BUILD / f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not result.exists() or result.stat().st_mtime < newest:
            partial = result.with_suffix(".partial")
            command = [COMPILER, *FLAGS, *flags, str(CSRC / "emulation" / source), "-o", str(partial)]
            subprocess.run(command, check=True)
            os.utime(partial, (newest, newest))  # a source changed during the compilation is newer
            partial.rename(result)
    return result


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("c_api.cpp", "kernels.so", "-O1", "-fPIC", "-shared")))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    weight: list[Any] = [pointer, ctypes.c_bool]
    shape: list[Any] = [ctypes.c_int, size, size]
    rows = [*shape, size]
    library.emulated_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.emulated_schedule.restype = None
    history: list[Any] = [pointer, size, pointer]
    library.emulated_forward.argtypes = [*rows, pointer, *history, *weight, ctypes.c_float, *[pointer] * 3]
    library.emulated_backward.argtypes = [*rows, *[pointer] * 4, *weight, *history, *[pointer] * 4]
    library.emulated_transposed.argtypes = [*shape, *[pointer] * 2, *history, *[pointer] * 2]
    for name in ("emulated_forward", "emulated_backward", "emulated_transposed"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@contextmanager
def schedule(order: str, seed: int = 0) -> Iterator[None]:
    """Run the threads in another order: a key of SCHEDULES."""
    _library().emulated_schedule(SCHEDULES[order], seed)
    try:
        yield
    finally:
        _library().emulated_schedule(SCHEDULES["forward"], 0)


def merge_norm(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    like = increments[0] if residual is None else residual
    merged = like.new_empty((*_rows_dimension(coefficients), *like.shape) if increments else 0)
    normed = like.new_empty(0 if norm_weight is None else like.shape)
    rstd = torch.empty(0 if norm_weight is None else like.shape[:-1])
    with _Arguments() as a:
        _call(
            _library().emulated_forward,
            *(_STORAGE[like.dtype], *_matrix(like), _rows(coefficients)),
            *(a.tensor(residual), a.table(increments), len(increments), a.tensor(coefficients)),
            *(*a.weight(norm_weight), eps),
            *(a.result(merged), a.result(normed), a.result(rstd)),
        )
    return merged, normed, rstd


def merge_norm_backward(
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
    has_norm, rows = grad_normed is not None, _rows(coefficients)
    weight = norm_weight if has_norm else None
    grad_base = like.new_empty(like.shape if has_norm else 0)
    grad_weight = torch.empty(0 if weight is None else weight.shape)
    wanted = increments if want_increments and coefficients is not None else []
    grad_increments = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]
    wants_row = want_coefficients and coefficients is not None
    grad_coefficients = torch.empty(coefficients.shape if wants_row and coefficients is not None else 0)
    hidden = like.shape[-1]
    with _Arguments() as a:
        _call(
            _library().emulated_backward,
            *(_STORAGE[like.dtype], like.numel() // (hidden * rows), hidden, rows),
            *(a.tensor(grad_merged), a.tensor(grad_normed)),
            *(a.tensor(merged), a.tensor(rstd), *a.weight(weight)),
            *(a.table(increments), len(increments), a.tensor(coefficients)),
            *(a.result(grad_base), a.result(grad_weight)),
            a.table(grad_increments) if grad_increments else None,
            a.result(grad_coefficients),
        )
    return grad_base, grad_weight, grad_increments, grad_coefficients


def transposed_merge(
    direct: Tensor | None,
    increment: Tensor,
    gradients: Sequence[Tensor],
    coefficients: Tensor,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor]:
    grad_increment = torch.empty_like(increment, memory_format=torch.contiguous_format)
    grad_coefficients = torch.empty(len(gradients) if want_coefficients else 0)
    with _Arguments() as a:
        _call(
            _library().emulated_transposed,
            *(_STORAGE[increment.dtype], *_matrix(increment)),
            *(a.tensor(direct), a.tensor(increment)),
            *(a.table(gradients), len(gradients), a.tensor(coefficients)),
            *(a.result(grad_increment), a.result(grad_coefficients)),
        )
    return grad_increment, grad_coefficients


def _rows_dimension(coefficients: Tensor | None) -> tuple[int, ...]:
    return () if coefficients is None else tuple(coefficients.shape[:-1])


def _rows(coefficients: Tensor | None) -> int:
    return coefficients.shape[0] if coefficients is not None and coefficients.dim() == 2 else 1


def _matrix(tensor: Tensor) -> tuple[int, int]:
    hidden = tensor.shape[-1]
    return tensor.numel() // hidden, hidden


def _call(function: Any, *arguments: Any) -> None:
    problem = function(*arguments)
    if problem is not None:
        raise EmulatorError(problem.decode())


class _Arguments:
    """Addresses of contiguous tensors, which live until the call is over."""

    def __enter__(self) -> _Arguments:
        self._alive: list[Any] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._alive.clear()

    def tensor(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._alive.append(tensor.contiguous())
        address: int = self._alive[-1].data_ptr()
        return address

    def result(self, tensor: Tensor) -> int | None:
        assert tensor.is_contiguous()
        return tensor.data_ptr() if tensor.shape != (0,) else None

    def table(self, tensors: Sequence[Tensor]) -> Any:
        table = (ctypes.c_void_p * len(tensors))(*[self.tensor(t) for t in tensors])
        self._alive.append(table)
        return table

    def weight(self, weight: Tensor | None) -> tuple[int | None, bool]:
        return self.tensor(weight), weight is not None and weight.dtype == torch.float32
