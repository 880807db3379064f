"""A checkpoint on its way to disk, while training goes on: every rank writes its part in a thread, and once
all have, the main rank makes it whole and puts it in force."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage.fragments import Fragment, WrittenFile, write_fragments, write_index
from megatron_iiet.storage.integrity import SaveIdentity

_SHARE = 0.5
"""Of a host's free memory: what copies may take."""


class Saving:
    """One save, at most one of a run at a time. Every rank makes it and calls its methods together."""

    def __init__(
        self,
        context: ParallelContext,
        folder: Path,
        save: SaveIdentity,
        fragments: Sequence[Fragment],
        commit: Callable[[], list[str]] = list,
        before: Callable[[], None] = lambda: None,
        seconds: float = math.inf,
    ) -> None:
        """``fragments``: what this rank writes, which does not change until it is written; ``commit``: what
        makes the folder a checkpoint once all files are there, on the main rank; what it returns is told;
        ``before``: what is done before this rank writes; ``seconds``: what all of it may take while training
        goes on."""
        self.folder, self.save, self._context = folder, save, context
        self._before, self._commit = before, commit
        self._file = f"rank_{context.rank:05d}.safetensors"
        self.warnings: list[str] = []
        """What the commit told, on the main rank."""
        self._committing = False
        self._seconds, self._began = seconds, time.monotonic()
        self._task = _Task(partial(self._write, fragments))

    def advance(self) -> bool:
        """Whether the checkpoint is in force now. One small all-reduce, without waiting for a disk.

        Raises:
            OSError: on every rank, what made a rank's write fail; nothing was put in force.
        """
        if not self._all_done():
            return False
        if self._committing:
            self.warnings = self._task.result or []
            return True
        parts = self._context.world.gather_objects((self._file, self._task.result))
        written = {file: part for file, part in parts if part is not None}
        self._committing = True
        self._task = _Task(partial(self._finish, written) if self._context.is_main else list)
        return False

    def finish(self) -> None:
        """Wait until it is in force.

        Raises:
            OSError: as :meth:`advance`.
        """
        while True:
            self._task.join()
            if self.advance():
                return

    def _write(self, fragments: Sequence[Fragment]) -> WrittenFile | None:
        self._before()
        self.folder.mkdir(parents=True, exist_ok=True)
        return write_fragments(self.folder / self._file, fragments, self.save) if fragments else None

    def _finish(self, written: dict[str, WrittenFile]) -> list[str]:
        write_index(self.folder, written, self.save)
        return self._commit()

    def _all_done(self) -> bool:
        error = self._task.error if self._task.failed else ""
        if not self._task.over and time.monotonic() - self._began > self._seconds:
            error = f"its disk took longer than {self._seconds:g} s (parallel.timeouts.save)"
        counts = torch.tensor([bool(error), self._task.done], device=self._context.device).int()
        self._context.world.all_reduce(counts)
        failed, done = counts.tolist()
        if failed:
            reasons = self._context.world.gather_objects(error)
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
            raise OSError(f"the checkpoint {self.folder} was not written, rank {rank} failed: {reason}")
        return bool(done == self._context.world_size)


class _Task:
    """Work in a thread of its own, which does not outlive the process."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error = ""
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except Exception as error:  # told by whoever waits
            self.error = str(error) or repr(error)

    def join(self) -> None:
        self._thread.join()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.over and bool(self.error)

    @property
    def done(self) -> bool:
        return self.over and not self.error


class HostCopies:
    """Copies of fragments in this host's memory, which later ones of the same sizes replace."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments as they are now, whatever becomes of their tensors."""
        copies = [
            replace(
                f, tensors={kind: self._copy((f.name, kind), tensor) for kind, tensor in f.tensors.items()}
            )
            for f in fragments
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape:
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer.copy_(tensor.detach(), non_blocking=True)


def has_room(context: ParallelContext, fragments: Sequence[Fragment]) -> str:
    """Whether every host has memory for copies of what its ranks write; "" if so, else what it lacks."""
    needed = sum(tensor.numel() * tensor.element_size() for f in fragments for tensor in f.tensors.values())
    views = context.world.gather_objects((socket.gethostname(), needed, psutil.virtual_memory().available))
    for host in dict.fromkeys(host for host, _, _ in views):
        own = [(needed, free) for name, needed, free in views if name == host]
        total, free = sum(needed for needed, _ in own), min(free for _, free in own)
        if total > _SHARE * free:
            return (
                f"{host} has {free / 2**30:.1f} GiB of memory free, of which copies would take "
                f"{total / 2**30:.1f}"
            )
    return ""
