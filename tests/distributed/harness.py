"""Real multi-process runs at a fraction of a launcher's cost.

A fork server imports torch and DeepSpeed once (about 6 s); each run forks its ranks from it (about 0.3 s).
The server is a fresh process, so no thread pool or process group of the test process leaks into a rank.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_PRELOAD = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    # What an engine imports when it is built; of another release what is not there is left out.
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_comm",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
    "encodings.idna",
    "numpy.ma",
    "torch.profiler._cupti_monitor",
    "megatron_iiet.training.optimizers.adamw",
    "megatron_iiet.training.optimizers.muon",
    "megatron_iiet.training.pretrain",
    "tests.distributed.preloaded",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


class RanksFailedError(AssertionError):
    """A rank raised; the message holds the traceback of the first that did."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes with a launcher's environment.

    ``function`` must be importable by name; results are returned in the order of ranks. When one rank
    fails, the others are ended at once.
    """
    # As under torchrun, ranks meet at a store that is there before them: nobody else can take its port.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank_main, args=(theirs, rank, world_size, store.port, function, args)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksFailedError(
                f"ranks {sorted(set(range(len(pipes))) - results.keys())} did not finish in time"
            )
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RanksFailedError(f"rank {rank} died without a word") from None
            if not ok:
                raise RanksFailedError(f"rank {rank} failed:\n{value}")
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    try:
        value = io.BytesIO()
        torch.save(function(*args), value)  # as bytes: shared-memory tensors would die with the rank
        pipe.send((True, value.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # interpreter shutdown with live gloo threads can abort


def free_port() -> int:
    """A TCP port nobody listens on, below those that the kernel gives to connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
