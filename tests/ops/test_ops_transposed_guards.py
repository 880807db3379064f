"""The transposed merge where gradients are missing, come twice or are not wanted; the memory it keeps."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.inputs import assert_close, on_every_backend
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
)

torch.set_num_threads(1)


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


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("recompute", ["none", "body", "layer"])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_kept_after_backward(recompute: str, frozen: bool) -> None:
    """Without the garbage collector's help: it may come by hours of memory later."""
    importlib.import_module("torch._dynamo")  # the first checkpoint imports it, which keeps that one's frames
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


@pytest.mark.parametrize("how", ["rows", "rows at once", "rows that are not trained"])
def test_no_gradient_of_a_merge_outlives_the_backward_pass(how: str) -> None:
    """There is one for each layer, and the history may be held for longer."""
    rows = [nn.Parameter(torch.ones(2), requires_grad=how != "rows that are not trained") for _ in range(3)]
    history = EntryByEntry(rows, rows_at_once=how == "rows at once")
    for _ in range(2):
        history.publish(torch.ones(3, 8, requires_grad=True) * 2)
    kept, total = [], torch.zeros(())
    for row in rows:
        (merged,) = history.merge(None, history.entries, [row], None)
        merged.register_hook(lambda gradient: kept.append(weakref.ref(gradient)))
        total = total + merged.square().sum()
    total.backward()
    del merged, total
    assert [gradient() for gradient in kept] == [None] * 3
