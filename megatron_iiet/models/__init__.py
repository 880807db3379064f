"""Models: decoder layers, the solvers that integrate them, and the Transformer they make."""

from typing import Any

from megatron_iiet.models.transformer import Transformer

__all__ = ["Transformer", "load", "save"]


def __getattr__(name: str) -> Any:
    """``models.load`` and ``models.save``: the public names of what the room of models on disk does."""
    if name not in ("load", "save"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The one import against the order of rooms (tests/test_rooms.py): here only when somebody asks.
    from megatron_iiet.storage import portable

    return getattr(portable, name)
