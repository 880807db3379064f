"""Whether ranks that should hold the same parameters do: a device that miscounts, and nobody hears of it."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_iiet.parallel import Group, ParallelContext
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.training.callbacks import Callback, is_due
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By the bytes of an element."""


class ReplicasError(ValueError):
    """Ranks hold different values of what they should hold the same of."""


class Replicas(Callback):
    """Compares the working copies of all replicas every ``interval`` steps, by checksums."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._equal_at: int | None = None

    def on_step(self, run: Run, result: StepResult) -> None:
        if not is_due(run.step, self.interval):
            return
        named = dict(run.engine.model.named_parameters())
        found = [
            told
            for told in run.context.world.gather_objects(find_difference(named, run.context))
            if told is not None
        ]
        if found:
            before = "" if self._equal_at is None else f"; after step {self._equal_at} they were equal"
            raise ReplicasError(
                f"after step {run.step} replicas have drifted apart: {found[0]}{before}. A device, its "
                "memory or the network has failed: take that host out, and go on from a checkpoint of before "
                f"(python tools/checkpoints.py {run.config.output_dir} --roll-back STEP)"
            )
        self._equal_at = run.step


def find_difference(named: Mapping[str, Tensor], context: ParallelContext) -> str | None:
    """The first parameter that ranks of one group hold differently, and which rank does; None if there is
    none. Every rank calls it."""
    told = _difference(named, context.data)
    whole = {name: parameter for name, parameter in named.items() if shard_of(parameter) is None}
    return told or _difference(whole, context.tensor)


def _difference(named: Mapping[str, Tensor], group: Group) -> str | None:
    if group.size == 1 or not named:
        return None
    sums_RP2 = group.all_gather(torch.stack([checksum(parameter) for parameter in named.values()]))
    if (sums_RP2 == sums_RP2[:1]).all():
        return None
    rows = sums_RP2.tolist()
    number, name = next(
        (n, name) for n, name in enumerate(named) if any(row[n] != rows[0][n] for row in rows)
    )
    usual = Counter(tuple(row[number]) for row in rows).most_common(1)[0][0]
    others = [group.ranks[r] for r, row in enumerate(rows) if tuple(row[number]) != usual]
    hosts = group.gather_objects(socket.gethostname())
    first = hosts[group.ranks.index(others[0])]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"rank {others[0]} on {first}{more} holds other values of {name} than most of {list(group.ranks)}"


@torch.no_grad()
def checksum(parameter: Tensor) -> Tensor:
    """Two sums of a tensor's bits, of all elements and of every second one; int64 [2], exact in any order."""
    bits = parameter.detach().reshape(-1).view(_INTEGERS[parameter.element_size()])
    return torch.stack((bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)))
