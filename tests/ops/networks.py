"""Small networks that merge their history, and their gradients entry by entry and edge by edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_iiet.ops import TransposedMerge
from tests.ops.inputs import assert_close

# ---------------------------------------------------------------------------- two histories of one kind


class PerEdge:
    """Merges as one writes them down; in any type, fp64 among them."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.entries: list[Tensor] = []

    def publish(self, increment: Tensor) -> None:
        self.entries.append(increment)

    def merge(
        self,
        residual: Tensor | None,
        entries: Sequence[Tensor],
        rows: Sequence[Tensor],
        own: Tensor | None,
        first: int = 0,
    ) -> tuple[Tensor, ...]:
        increments = [*entries, *([] if own is None else [own])]
        return tuple(
            sum(
                (row[j].to(x.dtype) * x for j, x in enumerate(increments)),
                torch.zeros_like(increments[0]) if residual is None else residual,
            )
            for row in rows
        )


class EntryByEntry(PerEdge):
    """The same through a :class:`TransposedMerge`."""

    def __init__(
        self, rows: Sequence[nn.Parameter], backend: str = "reference", *, rows_at_once: bool = False
    ) -> None:
        super().__init__(rows)
        self.merges = TransposedMerge(rows, backend, rows_at_once=rows_at_once)
        self.root = self.merges.root()

    def publish(self, increment: Tensor) -> None:
        self.entries.append(self.merges.publish(len(self.entries), increment, self.root))

    def merge(
        self,
        residual: Tensor | None,
        entries: Sequence[Tensor],
        rows: Sequence[Any],
        own: Tensor | None,
        first: int = 0,
    ) -> tuple[Tensor, ...]:
        return self.merges.merge(residual, entries, rows, own, first)


# ---------------------------------------------------------------------------- networks


@dataclass
class Layer:
    """How a layer reads the history: ``rows`` merges of ``count`` entries from ``first`` on."""

    count: int
    rows: int = 1
    residual: bool = True
    own: bool = False
    publishes: bool = True
    used: Sequence[int] | None = None
    """Merges that the layer goes on with; None: all."""
    first: int = 0
    """Number of the first entry read."""


@dataclass
class Network:
    """Layers y ← y + tanh(Σ merges · W), each of which publishes its increment."""

    plan: list[Layer]
    width: int = 12
    entries: int = 1
    """History entries there are before the first layer: inputs."""
    seed: int = 0
    dropout: float = 0.0
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def parameter(name: str, *shape: int, scale: float = 1.0) -> None:
            self.parameters[name] = nn.Parameter(scale * torch.randn(*shape, generator=generator))

        for n, layer in enumerate(self.plan):
            parameter(f"weight{n}", self.width, self.width, scale=self.width**-0.5)
            for r in range(layer.rows):
                # Longer than what is read, as the released variant's are.
                parameter(f"row{n}.{r}", layer.count + 1 + n % 3, scale=0.3)

    @property
    def rows(self) -> list[nn.Parameter]:
        return [p for name, p in self.parameters.items() if name.startswith("row")]

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
        """y and the first entries."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 3, self.width)
        return [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            for _ in range(1 + self.entries)
        ]

    def double(self) -> Network:
        """The same numbers in fp64."""
        twin = Network(self.plan, self.width, self.entries, self.seed, self.dropout)
        twin.parameters = {
            name: nn.Parameter(p.detach().double(), p.requires_grad) for name, p in self.parameters.items()
        }
        return twin

    def layer(
        self,
        n: int,
        history: PerEdge,
        y: Tensor,
        entries: Sequence[Tensor],
        body: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y_{n+1} and the increment."""
        layer = self.plan[n]
        rows = [self.parameters[f"row{n}.{r}"] for r in range(layer.rows)]
        own = torch.sin(y) if layer.own else None
        merged = history.merge(y if layer.residual else None, entries, rows, own, layer.first)
        used = range(layer.rows) if layer.used is None else layer.used
        run = self.body if body is None else body
        increment = run(n, sum((merged[r] * (1 + r) for r in used), 0 * y))
        return y + increment, increment

    def body(self, n: int, x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(x, self.dropout) if self.dropout else x
        return torch.tanh(x @ self.parameters[f"weight{n}"].to(x.dtype))

    def run(
        self,
        history: PerEdge,
        y: Tensor,
        entries: Sequence[Tensor] = (),
        layers: range | None = None,
        step: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The last y; ``step`` runs a layer, :meth:`layer` unless something else is given."""
        for entry in entries:
            history.publish(entry)
        for n in range(len(self.plan)) if layers is None else layers:
            first = self.plan[n].first
            read = history.entries[first : first + self.plan[n].count]
            y, increment = (self.layer if step is None else step)(n, history, y, read)
            if self.plan[n].publishes:
                history.publish(increment)
        return y

    def gradients(self, history: PerEdge, inputs: list[Tensor], **keys: Any) -> dict[str, Tensor | None]:
        """Of a loss that also reads the entries themselves: of inputs and parameters, by name."""
        y, *entries = inputs
        out = self.run(history, y, entries, **keys)
        loss = out.double().square().mean() + sum(e.double().cos().mean() for e in history.entries[::2])
        loss.backward()
        found = {f"input{i}": t.grad for i, t in enumerate(inputs)}
        found |= {name: p.grad for name, p in self.parameters.items()}
        for t in (*inputs, *self.parameters.values()):
            t.grad = None
        return found


def plain_plan(layers: int, **keys: Any) -> list[Layer]:
    """Every layer merges all there is, one entry given."""
    return [Layer(n + 1, **keys) for n in range(layers)]


def expect(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-5
) -> None:
    """Every gradient within ``tolerance`` of its largest number."""
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        ours = found[name]
        if theirs is None:  # zeros say the same of a row that no used merge reads
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, f"{name} has no gradient"
        assert_close(ours, theirs, name, tolerance)


def same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Bit for bit."""
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        ours = found[name]
        assert ours is theirs is None or torch.equal(ours, theirs), name  # type: ignore[arg-type]


def in_fp64(network: Network, **keys: Any) -> dict[str, Tensor | None]:
    twin = network.double()
    inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in network.inputs()]
    return twin.gradients(PerEdge(twin.rows), inputs, **keys)


def checkpointed(network: Network, part: str, reentrant: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """A step that recomputes a layer's body, or all of it but the publishing."""

    def step(n: int, history: PerEdge, y: Tensor, entries: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if part == "body":

            def body(n: int, x: Tensor) -> Tensor:
                return checkpoint(network.body, n, x, use_reentrant=reentrant)

            return network.layer(n, history, y, entries, body)

        def whole(y: Tensor, *entries: Tensor) -> tuple[Tensor, Tensor]:
            return network.layer(n, history, y, entries)

        return checkpoint(whole, y, *entries, use_reentrant=reentrant)

    return step


def mixed_plan() -> list[Layer]:
    """One and two rows, own increments, no residual, entries that nobody reads, a window that has moved."""
    return [
        Layer(1),
        Layer(2, rows=2),
        Layer(1, own=True),
        Layer(3, rows=2, residual=False),
        Layer(5, own=True, residual=False),
        Layer(4, publishes=False),
        Layer(6),
        Layer(3, own=True, first=3),
    ]
