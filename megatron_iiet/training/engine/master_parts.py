"""Where DeepSpeed keeps the fp32 master of a parameter, for every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_iiet.training.engine.deepspeed_internals import PLAIN, ZERO_3, DeepSpeedEngine, kind_of, masters
from megatron_iiet.training.optimizers import MasterPart


def master_parts(engine: DeepSpeedEngine, parameters: Iterable[Any]) -> Iterator[MasterPart]:
    """What this rank holds of the parameters that are trained, without those of which it holds nothing."""
    wrapper, kind, flats = engine.optimizer, kind_of(engine), masters(engine)
    places = {id(flat): index for index, flat in enumerate(flats)} if kind is PLAIN else {}
    for p in parameters:
        if not p.requires_grad:
            continue
        if kind is PLAIN:
            yield MasterPart(p, tuple(p.shape), 0, places[id(p)], p, 0, p.numel())
        elif kind is ZERO_3:  # every parameter is cut into equal parts
            group, offset, size = wrapper.grad_position[wrapper.get_param_id(p)]
            start = wrapper._get_param_partition_rank(p) * p.ds_tensor.ds_numel
            numel = max(0, min(size, p.ds_numel - start))
            start = min(start, p.ds_numel)
            yield MasterPart(p, tuple(p.ds_shape), start, group, flats[group], offset, numel)
        elif p._hp_mapping is not None:  # a group of parameters is one flat tensor, cut
            mapping = p._hp_mapping
            start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            group = mapping.param_group_index
            yield MasterPart(p, tuple(p.shape), start, group, flats[group], place.start, place.numel)
