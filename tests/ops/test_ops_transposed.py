"""Gradients entry by entry against gradients edge by edge: plain autograd, in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_iiet.ops import backends, merge_norm
from tests.ops.inputs import assert_close, needs_extension, on_every_backend, placed, rms_error
from tests.ops.networks import (
    EntryByEntry,
    Layer,
    Network,
    PerEdge,
    checkpointed,
    expect,
    in_fp64,
    mixed_plan,
    plain_plan,
    same,
)

torch.set_num_threads(1)


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


def test_no_zeros_stand_for_gradients_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be one more slab to fill and to read, for every entry of every layer."""
    true, asked = backends.get_backend("reference"), []

    def transposed_merge(direct: Any, increment: Tensor, gradients: Sequence[Tensor], *others: Any) -> Any:
        asked.append((direct is not None, len(gradients)))
        return true.transposed_merge(direct, increment, gradients, *others)

    spied = dataclasses.replace(true, transposed_merge=transposed_merge)
    monkeypatch.setitem(backends._READY, "reference", spied)
    rows = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    for alone in (True, False):
        history = EntryByEntry(rows)
        history.publish(torch.ones(3, 8, requires_grad=True))
        merged, _ = history.merge(None, history.entries, rows, None)
        (merged.sum() if alone else (merged + history.entries[0]).sum()).backward()
    assert asked == [(False, 1), (True, 1)]
