"""Gradients entry by entry against gradients edge by edge: plain autograd, in fp64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer, history
from megatron_iiet.models.pipeline import PipelineStage
from megatron_iiet.ops import TransposedMerge, merge_norm
from tests.models.conftest import SHAPE, randomise_solvers
from tests.ops.inputs import BACKENDS, assert_close, needs_extension, placed, rms_error

torch.set_num_threads(1)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
FUSED = [p for p in BACKENDS if p != "reference"]


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


@st.composite
def networks(draw: st.DrawFn) -> Network:
    entries = draw(st.integers(1, 3))
    plan: list[Layer] = []
    there = entries
    for _ in range(draw(st.integers(1, 7))):
        rows = draw(st.integers(1, 2))
        first = draw(st.sampled_from([0, 0, there // 2, there - 1]))
        plan.append(
            Layer(
                count=draw(st.integers(1, there - first)),
                first=first,
                rows=rows,
                residual=draw(st.booleans()),
                own=rows == 1 and draw(st.booleans()),
                publishes=draw(st.booleans()),
                used=draw(st.sampled_from([[0], [1], [0, 1]])) if rows == 2 else None,
            )
        )
        there += plan[-1].publishes
    return Network(plan, draw(st.sampled_from([8, 33])), entries, draw(st.integers(0, 2**20)))


@on_every_backend
@settings(max_examples=40)
@given(network=networks())
def test_random_networks(network: Network, backend: str) -> None:
    if backend == "cuda":
        network.parameters = {
            n: nn.Parameter(placed(p.detach(), backend)) for n, p in network.parameters.items()
        }
    inputs = [placed(t.detach(), backend).requires_grad_() for t in network.inputs()]
    found = network.gradients(EntryByEntry(network.rows, backend), inputs)
    plain = network.gradients(PerEdge(network.rows), inputs)
    exact = {name: placed(t, backend) for name, t in in_fp64(network).items()}
    assert not any(g is not None and g.any() for name, g in found.items() if exact[name] is None)
    names = [name for name, g in exact.items() if g is not None and plain[name] is not None]
    assert all(found[name] is not None for name in names)
    # A coefficient's gradient is one inner product, which may cancel: the largest one is the scale of all.
    for group in (
        [n for n in names if n.startswith("row")],
        *([n] for n in names if not n.startswith("row")),
    ):
        if not group:
            continue
        ours, theirs, best = (
            torch.cat([g[name].double().flatten() for name in group])  # type: ignore[union-attr]
            for g in (found, plain, exact)
        )
        # Where terms cancel, plain fp32 is not this close either.
        limit = 1e-5 * best.abs().amax() + 3 * (theirs - best).abs().amax()
        assert (ours - best).abs().amax() <= limit, group


@on_every_backend
def test_a_deep_network(backend: str) -> None:
    network = Network(plain_plan(16), width=64)
    if backend == "cuda":
        network.parameters = {
            n: nn.Parameter(placed(p.detach(), backend)) for n, p in network.parameters.items()
        }
    inputs = [placed(t.detach(), backend).requires_grad_() for t in network.inputs()]
    found = network.gradients(EntryByEntry(network.rows, backend), inputs)
    expect(found, {name: placed(t, backend) for name, t in in_fp64(network).items()})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_rows_at_once(backend: str) -> None:
    """Where parameters are whole only while their module runs: each row's gradient from its own merge."""
    network = Network(mixed_plan())
    found = network.gradients(EntryByEntry(network.rows, backend, rows_at_once=True), network.inputs())
    expect(found, in_fp64(network))


@on_every_backend
def test_rows_in_any_order(backend: str) -> None:
    """A merge may name its rows as it likes; each result and gradient is its own row's."""
    rows = [nn.Parameter(placed(torch.full((2,), float(i + 1)), backend)) for i in range(6)]
    x = placed(torch.ones(3, 8), backend).requires_grad_()
    for order in ([0, 1, 2], [2, 1, 0], [0, 5, 2], [5, 1], [1, 0], [0, 2, 1, 3]):
        history = EntryByEntry(rows, backend)
        history.publish(x)
        merged = history.merge(None, history.entries, [rows[i] for i in order], None)
        assert [m[0, 0].item() for m in merged] == [i + 1.0 for i in order]
        total = sum((10.0**place * m).sum() for place, m in enumerate(merged))
        gradients = torch.autograd.grad(total, [x, *rows], allow_unused=True)
        assert torch.equal(
            gradients[0], torch.full_like(x, sum(10.0**p * (i + 1) for p, i in enumerate(order)))
        )
        for place, i in enumerate(order):
            assert gradients[1 + i] is not None
            assert gradients[1 + i].tolist() == [24 * 10.0**place, 0.0]


@on_every_backend
def test_rows_in_half_precision(backend: str) -> None:
    """As ZeRO-3 keeps them; sums are fp32 all the same, and a row's gradient has its type."""
    network = Network(mixed_plan())
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, p in network.parameters.items():
            if name.startswith("row"):  # the same numbers in both
                network.parameters[name] = nn.Parameter(placed(p.detach().bfloat16().to(dtype), backend))
            else:
                network.parameters[name] = nn.Parameter(placed(p.detach(), backend))
        inputs = [placed(t.detach(), backend).requires_grad_() for t in network.inputs()]
        results.append(network.gradients(EntryByEntry(network.rows, backend), inputs))
    for name, ours in results[0].items():
        theirs = results[1][name]
        assert ours is not None
        assert theirs is not None
        if name.startswith("row"):
            assert ours.dtype == torch.bfloat16
            assert_close(ours, theirs, name, 2**-7)
        else:
            assert torch.equal(ours, theirs), name


def test_the_default_dtype_does_not_matter() -> None:
    network = Network(mixed_plan())
    inputs = network.inputs()
    wanted = network.gradients(EntryByEntry(network.rows), inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = network.gradients(EntryByEntry(network.rows), inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    same(found, wanted)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beats_edge_by_edge(dtype: torch.dtype, backend: str) -> None:
    """24 merges of up to 24 entries: an entry's gradient is rounded once, not once an edge."""
    layers = 24
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return placed(torch.randn(*shape, generator=generator), backend)

    rows = [nn.Parameter(0.3 * draw(n + 1)) for n in range(layers)]
    entries = [draw(5, 129).to(dtype).requires_grad_() for _ in range(layers)]
    residual = draw(5, 129).to(dtype)
    sent = [draw(5, 129).to(dtype) for _ in range(layers)]
    direct = [draw(5, 129).to(dtype) for _ in range(layers)]

    def gradients(merge: Callable[..., Tensor], read: Sequence[Tensor]) -> list[Tensor]:
        results = [merge(residual, read[: n + 1], rows[n]) for n in range(layers)]
        return list(torch.autograd.grad([*results, *read], [*entries, *rows], [*sent, *direct]))

    history = EntryByEntry(rows, backend)
    for entry in entries:
        history.publish(entry)
    ours = gradients(lambda y, read, row: history.merge(y, read, (row,), None)[0], history.entries)
    fresh = [e.view_as(e) for e in entries]
    per_edge = gradients(lambda y, read, row: merge_norm(y, read, row, backend=backend).merged, fresh)
    eager = gradients(lambda y, read, row: PerEdge(rows).merge(y, read, (row,), None)[0], fresh)
    for j in range(layers):
        exact = direct[j].double() + sum(rows[n][j].double() * sent[n].double() for n in range(j, layers))
        assert isinstance(exact, Tensor)
        assert torch.equal(ours[j], exact.to(dtype)) or rms_error(ours[j], exact) <= 1.0001 * rms_error(
            exact.to(dtype), exact
        )
        if j < layers - 2:
            assert rms_error(ours[j], exact) < 0.9 * rms_error(per_edge[j], exact)
            assert rms_error(ours[j], exact) < 0.9 * rms_error(eager[j], exact)
        row = torch.stack([(entries[i].double() * sent[j].double()).sum() for i in range(j + 1)])
        assert_close(ours[layers + j], row, f"row {j}")


# ---------------------------------------------------------------------------- recomputation


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


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("part", ["body", "layer"])
def test_recomputation_is_exact(part: str, reentrant: bool, dtype: torch.dtype, backend: str) -> None:
    """With dropout: the recomputed layer draws what the first run drew."""
    network = Network(mixed_plan(), dropout=0.3)
    results = []
    for step in (None, checkpointed(network, part, reentrant)):
        torch.manual_seed(5)
        history = EntryByEntry(network.rows, backend)
        results.append(network.gradients(history, network.inputs(dtype), step=step))
    same(results[1], results[0])
    torch.manual_seed(6)
    other = network.gradients(EntryByEntry(network.rows, backend), network.inputs(dtype))
    with pytest.raises(AssertionError):
        same(other, results[0])  # dropout does drop


# ---------------------------------------------------------------------------- schedules


@on_every_backend
def test_micro_batches_in_flight(backend: str) -> None:
    """1F1B: forward passes run before older ones' backward passes, and gradients add up."""
    network = Network(mixed_plan())
    batches = [
        [placed(t.detach(), backend).requires_grad_() for t in network.inputs(seed=s)] for s in range(4)
    ]
    network.parameters = {n: nn.Parameter(placed(p.detach(), backend)) for n, p in network.parameters.items()}

    def forward(batch: list[Tensor]) -> Tensor:
        return network.run(EntryByEntry(network.rows, backend), batch[0], batch[1:]).square().mean()

    def gradients(schedule: str) -> dict[str, Tensor | None]:
        losses = {}
        for action, number in schedule.split():
            if action == "F":
                losses[number] = forward(batches[int(number)])
            else:
                losses.pop(number).backward()
        found = {name: p.grad for name, p in network.parameters.items()}
        found |= {f"batch{b}.{i}": t.grad for b, batch in enumerate(batches) for i, t in enumerate(batch)}
        for t in (*network.parameters.values(), *(t for batch in batches for t in batch)):
            t.grad = None
        return found

    one_by_one = gradients("F0 B0 F1 B1 F2 B2 F3 B3")
    same(gradients("F0 F1 B0 F2 B1 F3 B2 B3"), one_by_one)
    same(gradients("F0 F1 F2 F3 B0 B1 B2 B3"), one_by_one)
    expect(gradients("F3 F2 F0 B3 F1 B1 B0 B2"), one_by_one, 1e-6)


@on_every_backend
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_pipeline_of_two_stages(cut: int, backend: str) -> None:
    """What stage 2 read of the entries it was handed comes back as their direct gradient."""
    network = Network(mixed_plan())
    network.parameters = {n: nn.Parameter(placed(p.detach(), backend)) for n, p in network.parameters.items()}
    y, *entries = [placed(t.detach(), backend).requires_grad_() for t in network.inputs()]

    def rows(layers: range) -> list[nn.Parameter]:
        return [network.parameters[f"row{n}.{r}"] for n in layers for r in range(network.plan[n].rows)]

    first, second = range(cut), range(cut, len(network.plan))
    history = EntryByEntry(rows(first), backend)
    out = network.run(history, y, entries, first)
    packed = torch.stack([out, *history.entries])
    received = packed.detach().requires_grad_()
    # A second part of the model receives all and hands on nothing.
    later = EntryByEntry(rows(second), backend)
    stream, *handed = received.unbind(0)
    network.run(later, stream, handed, second).double().square().mean().backward()
    packed.backward(received.grad)

    found = {f"input{i}": t.grad for i, t in enumerate((y, *entries))}
    found |= {name: p.grad for name, p in network.parameters.items()}
    twin = network.double()
    inputs = [placed(t.detach(), "reference").double().requires_grad_() for t in (y, *entries)]
    whole = PerEdge(twin.rows)
    twin.parameters = {n: nn.Parameter(placed(p.detach(), "reference")) for n, p in twin.parameters.items()}
    twin.run(whole, inputs[0], inputs[1:]).square().mean().backward()
    wanted = {f"input{i}": t.grad for i, t in enumerate(inputs)}
    wanted |= {name: p.grad for name, p in twin.parameters.items()}
    expect(placed(found, "reference"), wanted)


def test_gradients_accumulate() -> None:
    network = Network(mixed_plan())
    inputs = network.inputs()
    once = network.gradients(EntryByEntry(network.rows), inputs)
    for _ in range(2):
        network.run(EntryByEntry(network.rows), inputs[0], inputs[1:]).square().mean().backward()
    twice = {name: p.grad for name, p in network.parameters.items()}
    for p in network.parameters.values():
        p.grad = None
    network.run(EntryByEntry(network.rows), inputs[0], inputs[1:]).square().mean().backward()
    for name, p in network.parameters.items():
        assert once[name] is not None
        if p.grad is not None:
            assert torch.equal(twice[name], 2 * p.grad), name  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- parts that get no gradient


def test_an_entry_that_nobody_merges() -> None:
    network = Network([Layer(1), Layer(1), Layer(1)], entries=3)
    found = network.gradients(EntryByEntry(network.rows), network.inputs())
    expect(found, in_fp64(network))
    assert found["input2"] is None or not found["input2"].any()  # entry 1: neither merged nor in the loss
    assert found["input3"] is not None  # entry 2: in the loss itself
    assert found["input3"].any()


@pytest.mark.parametrize("used", [[0], [1]])
def test_one_of_two_merges_is_not_used(used: list[int]) -> None:
    network = Network([Layer(1), Layer(2, rows=2, used=used), Layer(3)])
    expect(network.gradients(EntryByEntry(network.rows), network.inputs()), in_fp64(network))


def test_a_merge_that_nobody_uses_is_an_error() -> None:
    """Nothing tells it from one whose gradient got lost. (Of two results used in part, it does.)"""
    network = Network([Layer(1), Layer(2, rows=2, used=[]), Layer(3)])
    with pytest.raises(RuntimeError, match=r"entry 1 .* was merged by row\(s\) \[1, 2\]"):
        network.gradients(EntryByEntry(network.rows), network.inputs())


@pytest.mark.parametrize("frozen", [["row0.0"], ["row1.0", "row1.1"], ["row2.0"], "all rows", "all"])
def test_frozen_rows(frozen: list[str] | str) -> None:
    network = Network(mixed_plan())
    for name, p in network.parameters.items():
        if name in frozen or (frozen == "all rows" and name.startswith("row")) or frozen == "all":
            p.requires_grad_(False)
    found = network.gradients(EntryByEntry(network.rows), network.inputs())
    expect(found, in_fp64(network))
    assert all(found[name] is None for name, p in network.parameters.items() if not p.requires_grad)


@pytest.mark.parametrize("rows_learn", [True, False])
@pytest.mark.parametrize("without", [[1], [0], [0, 1]])
def test_inputs_without_gradient(without: list[int], rows_learn: bool) -> None:
    network = Network(mixed_plan(), entries=1)
    for row in network.rows:
        row.requires_grad_(rows_learn)

    def inputs(dtype: torch.dtype) -> list[Tensor]:
        ts = network.inputs()
        return [t.detach().to(dtype).requires_grad_(i not in without) for i, t in enumerate(ts)]

    twin = network.double()
    found = network.gradients(EntryByEntry(network.rows), inputs(torch.float32))
    expect(found, twin.gradients(PerEdge(twin.rows), inputs(torch.float64)))
    assert all(found[f"input{i}"] is None for i in without)


def test_without_gradients_nothing_is_recorded() -> None:
    network = Network(mixed_plan())
    y, *entries = network.inputs()
    with torch.no_grad():
        quiet = network.run(EntryByEntry(network.rows), y, entries)
    assert not quiet.requires_grad
    assert torch.equal(quiet, network.run(EntryByEntry(network.rows), y, entries))


def test_gradients_of_some_only() -> None:
    """autograd.grad runs part of the graph: entries, rows, or neither."""
    network = Network(mixed_plan())
    wanted = in_fp64(network)
    named = {"input0": 0, "input1": 1}
    for names in (["input0"], ["input1"], ["row1.1"], ["weight3", "row6.0"]):
        inputs = network.inputs()
        history = EntryByEntry(network.rows)
        out = network.run(history, inputs[0], inputs[1:])
        loss = out.double().square().mean() + sum(e.double().cos().mean() for e in history.entries[::2])
        leaves = [inputs[named[n]] if n in named else network.parameters[n] for n in names]
        for name, found in zip(names, torch.autograd.grad(loss, leaves), strict=True):
            assert_close(found, wanted[name], name)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- guards


def loss_of(network: Network, history: EntryByEntry) -> Tensor:
    y, *entries = network.inputs()
    return network.run(history, y, entries).square().mean()


@pytest.mark.parametrize("lost", ["left out", "detached"])
def test_a_missing_gradient_is_an_error(lost: str) -> None:
    network = Network(plain_plan(2))
    rows = [*network.rows, nn.Parameter(torch.ones(3))]
    history = EntryByEntry(rows)
    y, *entries = network.inputs()
    out = network.run(history, y, entries)
    (merged,) = history.merge(out, history.entries[:2], rows[-1:], None)
    loss = out.square().mean() if lost == "left out" else (out + merged.detach()).square().mean()
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value) == (
        "entry 1 of the history was merged by row(s) [2], but no gradient came back from there: the result "
        "was detached or left out of the loss. Set ops.history_gradient to per_edge"
    )


def test_a_second_backward_is_an_error() -> None:
    network = Network(mixed_plan())
    loss = loss_of(network, EntryByEntry(network.rows))
    loss.backward(retain_graph=True)
    before = [row.grad.clone() for row in network.rows]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value) == (
        "backward ran through a merge of the history twice (retain_graph=True?); its gradients are computed "
        "once and not kept. Run the forward pass again, or set ops.history_gradient to per_edge"
    )
    for row, grad in zip(network.rows, before, strict=True):
        assert torch.equal(row.grad, grad)  # type: ignore[arg-type]


def test_a_second_partial_backward_is_an_error() -> None:
    network = Network(plain_plan(3))
    inputs = network.inputs()
    history = EntryByEntry(network.rows)
    loss = network.run(history, inputs[0], inputs[1:]).square().mean()
    torch.autograd.grad(loss, inputs[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, inputs[0])


@pytest.mark.parametrize("of", ["row1.0", "weight0", "input1"])
def test_double_backward_is_an_error(of: str) -> None:
    """Also of a gradient beside other terms, where one without a graph would pass for a constant."""
    network = Network(plain_plan(3))
    inputs = network.inputs()
    leaf = inputs[1] if of == "input1" else network.parameters[of]
    loss = network.run(EntryByEntry(network.rows), inputs[0], inputs[1:]).square().mean()
    with pytest.raises(RuntimeError):  # noqa: PT012 - either call may be the one that refuses
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (first.square().sum() + leaf.sum()).backward()


# ---------------------------------------------------------------------------- memory


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("recompute", ["none", "body", "layer"])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_kept_after_backward(recompute: str, frozen: bool) -> None:
    """Without the garbage collector's help: it may come by hours of memory later."""
    network = Network(mixed_plan())
    for row in network.rows:
        row.requires_grad_(not frozen)
    step = None if recompute == "none" else checkpointed(network, recompute, False)
    history = EntryByEntry(network.rows)
    y, *entries = network.inputs()
    loss = network.run(history, y, entries, step=step).square().mean()
    watched = [weakref.ref(history), weakref.ref(history.merges), weakref.ref(history.entries[3])]
    loss.backward()
    assert not history.merges._gradients or frozen  # while the loss is still there to be logged
    del history, loss
    assert [w() for w in watched] == [None] * 3


@pytest.mark.usefixtures("no_gc")
def test_nothing_is_kept_of_a_forward_pass_alone() -> None:
    network = Network(mixed_plan())
    history = EntryByEntry(network.rows)
    y, *entries = network.inputs()
    out = network.run(history, y, entries)
    watched = [weakref.ref(history.merges), weakref.ref(history.entries[3])]
    del history, out
    assert [w() for w in watched] == [None] * 2


def slabs_allocated(run: Callable[[], Any], size: int) -> tuple[int, int]:
    """The most memory allocated at a time while ``run`` ran, and at its end, in slabs of ``size`` bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    assert results is not None
    changes = sorted(
        (e.start_ns(), e.nbytes())
        for e in results.events()
        if e.name() == "[memory]" and abs(e.nbytes()) >= size // 2
    )
    level = most = 0
    for _, change in changes:
        level += change
        most = max(most, level)
    return round(most / size), round(level / size)


@on_every_backend
def test_backward_holds_a_gradient_an_entry(backend: str) -> None:
    """N merges of up to N entries: N slabs and a few, where edge by edge takes twice as many."""
    if backend == "cuda":
        pytest.skip("CPU allocations are counted")
    layers, shape = 16, (64, 256)
    rows = [nn.Parameter(torch.randn(n + 1)) for n in range(layers)]
    first = torch.randn(shape, requires_grad=True)

    def grown(history: PerEdge) -> tuple[int, int]:
        history.publish(first * 1.5)
        y = first
        for n in range(layers):
            (y,) = history.merge(y, history.entries[: n + 1], (rows[n],), None)
            history.publish(y * 0.5)
        loss = (y * 0.1).sum()
        history.entries.clear()
        return slabs_allocated(loss.backward, first.nbytes)

    most, _ = grown(EntryByEntry(rows, backend))
    assert layers - 2 <= most <= layers + 4
    first.grad = None


# ---------------------------------------------------------------------------- whole models

SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl"},
    "dlcl-average": {"kind": "dlcl", "coefficient_init": "average"},
    **{
        f"{predictor}-{iterations}": {"kind": "iiet", "predictor": predictor, "iterations": iterations}
        for predictor in ("merged", "euler")
        for iterations in (0, 1, 3, [2, 0, 1, 0], [0, 0, 2, 0])
    },
    **{
        f"released-{iterations}": {"kind": "iiet", "variant": "released", "iterations": iterations}
        for iterations in (0, 2, [2, 0, 1, 0], [0, 1, 0, 2])
    },
    "pcformer": {"kind": "pcformer"},
}
FEW = ["dlcl", "merged-[2, 0, 1, 0]", "euler-[0, 0, 2, 0]", "released-[0, 1, 0, 2]", "pcformer"]
some_solvers = pytest.mark.parametrize(
    "solver",
    [
        pytest.param(keys, id=name, marks=[] if name in FEW else pytest.mark.slow)
        for name, keys in SOLVERS.items()
    ],
)


def model_of(
    solver: dict[str, Any],
    *,
    backend: str = "reference",
    gradient: str = "per_edge",
    recompute: str = "off",
    layers: range | None = None,
) -> Transformer:
    config = config_from_dict(
        {
            "model": {**SHAPE, "num_layers": 6 if solver["kind"] == "pcformer" else 4},  # its window moves
            "solver": solver,
            "training": {"recompute": recompute},
            "ops": {"history_gradient": gradient},
            "data": {"sequence_length": 16},
        }
    )
    model = Transformer(config, backend=backend, layers=layers)
    model.initialise(0)
    randomise_solvers(model)
    return model


def loss_and_gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor | None]:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


@needs_extension
@some_solvers
def test_whole_models(solver: dict[str, Any]) -> None:
    """Backend, kind of gradient and recomputation: three choices that no number depends on."""
    wanted = loss_and_gradients(model_of(solver), TOKENS)
    for backend in ("reference", "cpu"):
        for gradient in ("per_edge", "transposed"):
            plain = loss_and_gradients(model_of(solver, backend=backend, gradient=gradient), TOKENS)
            expect(plain, wanted)
            for recompute in ("layer", "evaluation"):
                again = model_of(solver, backend=backend, gradient=gradient, recompute=recompute)
                same(loss_and_gradients(again, TOKENS), plain)


@needs_extension
@some_solvers
def test_whole_models_recompute_exactly_in_half_precision(solver: dict[str, Any]) -> None:
    results = []
    for recompute in ("off", "layer", "evaluation"):
        model = model_of(solver, backend="cpu", gradient="transposed", recompute=recompute)
        for parameter in model.parameters():
            if not getattr(parameter, "keep_fp32", False):
                parameter.data = parameter.data.bfloat16()
        results.append(loss_and_gradients(model, TOKENS))
    same(results[1], results[0])
    same(results[2], results[0])


@needs_extension
@some_solvers
def test_whole_models_in_stages(solver: dict[str, Any]) -> None:
    """Three pipeline stages chained by hand, each with its own history, against the whole."""
    whole = model_of(solver, backend="cpu", gradient="transposed")
    wanted = loss_and_gradients(whole, TOKENS)
    layers = whole.config.model.num_layers
    cut = [range(1), range(1, layers - 1), range(layers - 1, layers)]
    x: Tensor = TOKENS[:, :-1]
    found: dict[str, Tensor | None] = {}
    chain: list[tuple[Tensor, Tensor]] = []
    models = []
    for part in cut:
        model = model_of(solver, backend="cpu", gradient="transposed", layers=part)
        state = whole.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        stage = PipelineStage(model, 16)
        stage.resize(whole)
        models.append(model)
        out = stage(x)
        x = out.detach().requires_grad_()
        chain.append((out, x))
    loss = models[-1].loss(chain[-1][0], TOKENS[:, 1:])
    loss.backward()
    for out, received in reversed(chain[:-1]):
        out.backward(received.grad)
    found["loss"] = loss.detach()
    for model in models:
        for name, p in model.named_parameters():
            before = found.get(name)  # a tied embedding is in the first stage and in the last
            found[name] = p.grad if before is None or p.grad is None else before + p.grad
    expect(found, wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("recompute", ["off", "layer", "evaluation"])
@some_solvers
def test_whole_models_keep_nothing(
    solver: dict[str, Any], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[weakref.ref[TransposedMerge]] = []

    class Watched(TransposedMerge):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            watched.append(weakref.ref(self))

    monkeypatch.setattr(history, "TransposedMerge", Watched)
    model = model_of(solver, gradient="transposed", recompute=recompute)
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert len(watched) == any(solver.history_rows for solver in model.solvers.values())
    assert all(w() is None for w in watched)
