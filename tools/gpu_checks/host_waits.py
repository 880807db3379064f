"""Trains as ``pretrain_iiet.py`` does and writes down, step by step, where the host waited for the device.

host_waits.py COUNTS.json cuda|cpu --config … --ds-config …
"""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SAID = "called a synchronizing CUDA operation"
"""By torch, of every operation that waits, in the mode "warn". It does not speak of the next."""
ASKED: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cuda.Event, "synchronize"),
)
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""Where it would wait for a GPU: the host asks for numbers that the device has yet to compute."""


class Waits:
    """Of each step, from its start to the next one's."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[Counter[str]] = []
        """By place, the file and line that waited."""
        self._undone = ExitStack()

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *_: object) -> None:
        self._undone.close()

    def note(self) -> None:
        """The host waits here."""
        if self.steps:
            self.steps[-1][_place()] += 1

    def of_steps(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The function that takes a step, counted; the first one begins to."""

        @wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.steps:
                self._begin()
            self.steps.append(Counter())
            return step(*args, **kwargs)

        return counted

    def _begin(self) -> None:
        if self.device == "cpu":
            self._undone.enter_context(_Reads(self.note))
            return
        self._undone.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message=SAID)
        shown = warnings.showwarning

        def show(message: Any, *args: Any, **kwargs: Any) -> None:
            if SAID in str(message):
                self.note()
            else:
                shown(message, *args, **kwargs)

        warnings.showwarning = show
        for owner, name in ASKED:
            function = getattr(owner, name)
            self._undone.callback(setattr, owner, name, function)
            setattr(owner, name, self._noted(function))
        self._undone.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note()
            return function(*args, **kwargs)

        return noted


class _Reads(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in READS:
            self._note()
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line that is neither torch's nor ours here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in (__file__, warnings.__file__) or "/torch/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def main() -> None:
    """Train, then write what was counted, a list of {place: times}."""
    target, device = Path(sys.argv[1]), sys.argv[2]
    from megatron_iiet.training import loop

    script = Path(__file__).resolve().parents[2] / "pretrain_iiet.py"
    sys.argv[:3] = [str(script)]
    with Waits(device) as waits:
        loop._take_step = waits.of_steps(loop._take_step)
        runpy.run_path(str(script), run_name="__main__")
    target.write_text(json.dumps(waits.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
