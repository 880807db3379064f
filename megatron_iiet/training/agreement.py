"""What one rank finds wrong, told by all: no rank is left waiting for one that has given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_iiet.parallel import ParallelContext


@contextmanager
def failing_together(context: ParallelContext) -> Iterator[None]:
    """At the end of the block, which every rank enters and in which none meets another, the failure of the
    first rank that has one is everybody's.

    Raises:
        ValueError: what that rank's ValueError or OSError said.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = str(error)
    for told in context.world.gather_objects(failure):
        if told is not None:
            raise ValueError(told)
