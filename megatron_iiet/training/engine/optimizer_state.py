"""Where DeepSpeed keeps the fp32 master and the optimizer's moments of a parameter, for every ZeRO stage.

Of a parameter's flattened values a rank holds one interval. That interval is the unit of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_iiet.parallel import Group
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.storage.fragments import MASTER, Fragment, FragmentReader, Place, place_of
from megatron_iiet.training.engine.corrected import CorrectedEngine, is_owner
from megatron_iiet.training.engine.deepspeed_internals import PLAIN, ZERO_3, kind_of, masters
from megatron_iiet.training.stopping import failing_together
from megatron_iiet.training.warm_start import WarmStart


@dataclass(frozen=True)
class _MasterPart:
    """What this rank holds of one parameter."""

    parameter: Any
    shape: tuple[int, ...]
    """Of the whole tensor-parallel shard."""
    start: int
    """First element of the flattened shard that is this rank's."""
    flat: Tensor
    """The optimizer's own tensor, which has the moments in its state."""
    offset: int
    """Where the interval starts in ``flat``."""
    numel: int

    def place(self, tensor: Group) -> Place:
        """Where in the whole parameter the interval begins."""
        return place_of(shard_of(self.parameter), self.shape, tensor, self.start)

    def own(self, flat: Tensor) -> Tensor:
        """The interval of the master, or of a tensor beside it, as a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def tensors(self, engine: CorrectedEngine) -> dict[str, Tensor]:
        """fp32 master and moments of the interval, as views; the optimizer is prepared."""
        state = engine.basic_optimizer.state[self.flat]
        moments = {kind: self.own(state[kind]) for kind in engine.moments[self.parameter]}
        return {MASTER: self.own(self.flat), **moments}


def own_fragments(engine: CorrectedEngine, names: Mapping[Any, str]) -> list[Fragment]:
    """The fragments that this rank writes; of what several ranks hold, one writes."""
    parts, context = _prepared_parts(engine, names), engine.context
    if kind_of(engine) is PLAIN and context.data.rank > 0:
        return []
    return [
        Fragment(names[p.parameter], p.place(context.tensor), p.numel, p.tensors(engine))
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
            for kind, tensor in part.tensors(engine).items():
                place = part.place(engine.context.tensor)
                reader.read(names[part.parameter], kind, place, part.numel, tensor)
    for state in engine.basic_optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps
    _refresh_working_copies(engine)


@torch.no_grad()
def start_from(engine: CorrectedEngine, names: Mapping[Any, str], warm: WarmStart) -> None:
    """Fill the masters of the parameters that are taken over, then the working copies from the masters.

    Raises:
        ValueError: on every rank, what one of them found wrong.
    """
    with failing_together(engine.context):
        for part in _master_parts(engine, names):
            name = names[part.parameter]
            if name in warm.taken:
                warm.source.fill(name, part.own(part.flat), part.place(engine.context.tensor))
    _refresh_working_copies(engine)


def _master_parts(engine: CorrectedEngine, names: Iterable[Any]) -> Iterable[_MasterPart]:
    wrapper, kind, flats = engine.optimizer, kind_of(engine), masters(engine)
    for p in names:
        if not p.requires_grad:
            continue
        if kind is PLAIN:
            yield _MasterPart(p, tuple(p.shape), 0, p, 0, p.numel())
        elif kind is ZERO_3:  # every parameter is cut into equal parts
            group, offset, size = wrapper.grad_position[wrapper.get_param_id(p)]
            start = wrapper._get_param_partition_rank(p) * p.ds_tensor.ds_numel
            numel = max(0, min(size, p.ds_numel - start))
            yield _MasterPart(p, tuple(p.ds_shape), min(start, p.ds_numel), flats[group], offset, numel)
        elif p._hp_mapping is not None:  # a group of parameters is one flat tensor, cut
            mapping = p._hp_mapping
            start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            yield _MasterPart(p, tuple(p.shape), start, flat, place.start, place.numel)


def _prepared_parts(engine: CorrectedEngine, names: Iterable[Any]) -> list[_MasterPart]:
    """The parts of all parameters, with moments: optimizers make them in their first step only."""
    optimizer, parts = engine.basic_optimizer, list(_master_parts(engine, names))
    for part in parts:
        state = optimizer.state[part.flat]
        if "step" not in state:  # torch keeps it in a tensor, DeepSpeed in an int
            of_torch = type(optimizer).__module__.startswith("torch.optim")
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
