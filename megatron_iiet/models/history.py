"""The increments that layers kept, for later layers to merge."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megatron_iiet.ops import merge_norm


class History:
    """The kept increments F̃_0, F̃_1, … of one forward pass of one micro-batch, each [B, T, d] (under sequence
    parallelism T is this rank's part of the sequence).

    Solvers read it through :meth:`merge` only; the stack that runs the layers appends. A merge names how
    many entries it reads by the length of its coefficients, never "all so far": recomputing a layer in the
    backward pass, when later layers have long appended theirs, must read what the first run read.
    """

    def __init__(self, entries: Iterable[Tensor] = ()) -> None:
        """Start a history: empty, with the embedding for solvers that merge it too, or with what an earlier
        pipeline stage handed on."""
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def first(self, count: int) -> list[Tensor]:
        """The first ``count`` entries, to hand on to the next pipeline stage."""
        assert count <= len(self._entries)
        return self._entries[:count]

    def append(self, increment: Tensor) -> None:
        """Keep a layer's increment, [B, T, d]."""
        self._entries.append(increment)

    def merge(self, residual: Tensor | None, coefficients: Tensor, *, backend: str) -> Tensor:
        """``residual + Σ_j coefficients[..., j] · entry_j`` over the first k entries.

        Args:
            residual: [B, T, d] or None.
            coefficients: fp32, [k] or [R, k] (R merges from one reading of the entries).
            backend: of :func:`megatron_iiet.ops.merge_norm`.

        Returns:
            Tensor: [B, T, d] or [R, B, T, d].
        """
        k = coefficients.shape[-1]
        assert k <= len(self._entries), f"merge of {k} entries, but the history holds {len(self._entries)}"
        return merge_norm(residual, self._entries[:k], coefficients, backend=backend).merged
