"""Keys and values of sequences of different lengths, a row each.

Shapes: B sequences, G key/value heads, S places of a row, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

_LEAST_PLACES = 128


class RowCache(Cache):
    """A set of keys and values for each that the model asks for, [rows, G, S, K]; row b holds the tokens of
    sequence b from place 0 on, and zeros behind them.

    Between :meth:`extend` and the end of the forward pass ``update`` writes the new token of each row behind
    its others. Rows are filled from the first one on; the model sees those in use.
    """

    def __init__(self, rows: int, places: int) -> None:
        """``rows``: most sequences; ``places``: most tokens of one. Memory is taken as it is needed."""
        super().__init__(layers=[])
        self.rows, self.places = rows, places
        self.lengths: list[int] = []
        self._sets: list[tuple[Tensor, Tensor]] = []

    def append(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """A new row for each sequence of ``cache``: its first ``lengths[b]`` tokens."""
        layers: list[Any] = cache.layers
        if not self._sets:
            self._sets = [(self._zeros(layer.keys), self._zeros(layer.values)) for layer in layers]
        self._make_room(max(lengths))
        first = len(self.lengths)
        for own, layer in zip(self._sets, layers, strict=True):
            for mine, theirs in zip(own, (layer.keys, layer.values), strict=True):
                for b, length in enumerate(lengths):
                    mine[first + b, :, :length] = theirs[b, :, :length]
        self.lengths += lengths

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        span = max(length, self.lengths[row])
        for own in self._sets:
            for tensor in own:
                if row != last:
                    tensor[row, :, :span] = tensor[last, :, :span]
                # What is masked is still multiplied, by 0: a NaN left behind would spoil the next sequence.
                tensor[last, :, :length] = 0
        self.lengths[row] = length
        self.lengths.pop()

    def extend(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make every row one token longer: the new token's positions [B, 1], and the mask to add to
        attention scores [B, 1, 1, longest]."""
        self._make_room(max(self.lengths) + 1)
        device = self._sets[0][0].device
        self._at = torch.tensor(self.lengths, device=device)
        self._which = torch.arange(len(self.lengths), device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._span = max(self.lengths)
        hidden_BS = torch.arange(self._span, device=device) > self._at[:, None]
        mask_BS = torch.zeros(hidden_BS.shape, dtype=dtype, device=device).masked_fill_(hidden_BS, -torch.inf)
        return self._at[:, None], mask_BS[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Of set ``layer_idx`` the rows in use, [B, G, longest, K], with the new tokens [B, G, 1, K]."""
        rows, own = len(self.lengths), self._sets[layer_idx]
        for tensor, new_BG1K in zip(own, (key_states, value_states), strict=True):
            tensor[self._which, :, self._at] = new_BG1K[:, :, 0]
        return own[0][:rows, :, : self._span], own[1][:rows, :, : self._span]

    def _zeros(self, like_BGTK: Tensor, places: int = 0) -> Tensor:
        heads, width = like_BGTK.shape[1], like_BGTK.shape[3]
        return like_BGTK.new_zeros((self.rows, heads, places, width))

    def _make_room(self, wanted: int) -> None:
        there = self._sets[0][0].shape[2]
        if wanted <= there:
            return
        places = min(self.places, max(wanted, 2 * there, _LEAST_PLACES))
        used = max(self.lengths, default=0)
        for n, own in enumerate(self._sets):
            grown = [self._zeros(tensor, places) for tensor in own]
            for new, old in zip(grown, own, strict=True):
                new[: len(self.lengths), :, :used] = old[: len(self.lengths), :, :used]
            self._sets[n] = grown[0], grown[1]
