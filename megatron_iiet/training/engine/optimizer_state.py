"""fp32 masters and the optimizer's moments in checkpoints, for every ZeRO stage.

Of a parameter's flattened values a rank holds one interval. That interval is the unit of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_iiet.parallel import Group
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.storage.fragments import MASTER, Fragment, FragmentReader, Place, place_of
from megatron_iiet.training.engine.corrected import CorrectedEngine, is_owner
from megatron_iiet.training.engine.deepspeed_internals import PLAIN, ZERO_3, kind_of, masters
from megatron_iiet.training.engine.master_parts import master_parts
from megatron_iiet.training.optimizers import MasterPart
from megatron_iiet.training.stopping import failing_together
from megatron_iiet.training.warm_start import WarmStart


def own_fragments(engine: CorrectedEngine, names: Mapping[Any, str]) -> list[Fragment]:
    """The fragments that this rank writes; of what several ranks hold, one writes."""
    parts, context = _prepared_parts(engine, names), engine.context
    if kind_of(engine) is PLAIN and context.data.rank > 0:
        return []
    return [
        Fragment(names[p.parameter], _place(p, context.tensor), p.numel, _tensors(p, engine))
        for p in parts
        if is_owner(p.parameter, context.tensor)
    ]


@torch.no_grad()
def load_fragments(
    engine: CorrectedEngine, names: Mapping[Any, str], reader: FragmentReader, steps: int
) -> None:
    """Fill masters and moments from a checkpoint of any layout, then the working copies from the masters.

    ``steps``: optimizer steps done, for the bias correction of moments.

    Raises:
        ValueError: on every rank, what one of them found wrong: no rank is left waiting for it.
    """
    with failing_together(engine.context):
        for part in _prepared_parts(engine, names):
            for kind, tensor in _tensors(part, engine).items():
                place = _place(part, engine.context.tensor)
                reader.read(names[part.parameter], kind, place, part.numel, tensor)
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps
    for group in engine.basic_optimizer.param_groups:
        if "step" in group:  # apex's count
            group["step"] = steps
    _refresh_working_copies(engine)


@torch.no_grad()
def start_from(engine: CorrectedEngine, names: Mapping[Any, str], warm: WarmStart) -> None:
    """Fill the masters of the parameters that are taken over, then the working copies from the masters.

    Raises:
        ValueError: on every rank, what one of them found wrong.
    """
    with failing_together(engine.context):
        for part in master_parts(engine, names):
            name = names[part.parameter]
            if name in warm.taken:
                warm.source.fill(name, part.own(part.flat), _place(part, engine.context.tensor))
    _refresh_working_copies(engine)


def _place(part: MasterPart, tensor: Group) -> Place:
    """Where in the whole parameter the interval begins."""
    return place_of(shard_of(part.parameter), part.shape, tensor, part.start)


def _tensors(part: MasterPart, engine: CorrectedEngine) -> dict[str, Tensor]:
    """fp32 master and moments of the interval, as views; the optimizer is prepared."""
    state = engine.basic_optimizer.state[part.flat]
    moments = {kind: part.own(state[kind]) for kind in engine.moments[part.parameter]}
    return {MASTER: part.own(part.flat), **moments}


def _prepared_parts(engine: CorrectedEngine, names: Iterable[Any]) -> list[MasterPart]:
    """The parts of all parameters, with moments: optimizers make them in their first step only."""
    optimizer, parts = engine.basic_optimizer, list(master_parts(engine, names))
    for part in parts:
        state = optimizer.state[part.flat]
        if "step" not in state:  # torch keeps it in a tensor, DeepSpeed in an int
            of_torch = isinstance(optimizer, torch.optim.Adam)
            on_device = of_torch and (optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
            device = part.flat.device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device) if of_torch else 0
        for kind in engine.moments[part.parameter]:
            if kind not in state:
                state[kind] = torch.zeros_like(part.flat.detach())
    return parts


def _refresh_working_copies(engine: CorrectedEngine) -> None:
    wrapper, kind = engine.optimizer, kind_of(engine)
    if kind is ZERO_3:
        wrapper._partition_all_parameters()
        for group in range(len(masters(engine))):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif kind is not PLAIN:
        wrapper.update_lp_params()
