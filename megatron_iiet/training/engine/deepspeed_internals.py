"""Every name of DeepSpeed that its documentation does not promise and we rely on, by ZeRO stage and kind of
engine: a release that renamed one is refused before anything is trained or written. Only this module imports
from ``deepspeed.runtime``; a test compares the tables with what is used.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megatron_iiet.config import ConfigError
from megatron_iiet.config.deepspeed import offloads_optimizer

TESTED = "0.19.8"
"""The release that the tests run with, and that pyproject.toml pins."""


def refuse(what: str) -> NoReturn:
    """End with one sentence about this DeepSpeed."""
    raise ConfigError(
        f"DeepSpeed {deepspeed.__version__} {what}; tested is {TESTED} (pip install deepspeed=={TESTED})"
    )


try:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.constants import PIPE_REPLICATED
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.runtime.utils import is_model_parallel_parameter
except ImportError as error:
    refuse(f"cannot be used ({error})")

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "PipeModelDataParallelTopology",
    "PipelineEngine",
    "PipelineModule",
]


@dataclass(frozen=True)
class Internal:
    """One name that DeepSpeed may change without a word."""

    name: str
    use: str
    """What it is, and what we do with it."""
    takes: tuple[str, ...] | None = None
    """Of a method: the parameters that we pass, or that our override is called with; it asks for no other."""


ENGINE = (
    Internal(
        "__init__",
        "builds the engine; called as deepspeed.initialize does, for a subclass",
        (
            *("args", "model", "optimizer", "model_parameters"),
            *("mpu", "config", "config_class", "dist_init_required"),
        ),
    ),
    Internal("basic_optimizer", "the optimizer that was given; it has the moments"),
    Internal("device", "where the model is; a parameter kept in fp32 is moved there"),
    Internal("global_steps", "optimizer steps done; set when a checkpoint is loaded"),
    Internal("zero_optimization_stage", "the stage in force; ZeRO-3 keeps no parameter in fp32", ()),
    Internal("fp16_enabled", "whether gradients are scaled", ()),
    Internal("gradient_clipping", "the norm to clip to; read by our own clipping", ()),
    Internal(
        "_global_grad_norm",
        "what get_global_grad_norm reports, and before that its optimizer; set where DeepSpeed computes none",
    ),
    Internal(
        "_cast_module_mixed_precision",
        "casts the model to 16 bits; overridden to leave merge coefficients out",
        ("param_dtype", "buffer_dtype", "is_zero_init_model", "keep_pattern"),
    ),
    Internal("_take_model_step", "clips and steps; overridden to find the norm first", ("lr_kwargs",)),
    Internal("clip_fp32_gradients", "clips without ZeRO; overridden to clip by the whole model's norm", ()),
)
"""Of every engine."""

PIPELINE_ENGINE = (
    Internal(
        "reset_activation_shape", "forgets the size of what stages hand on; called before it changes", ()
    ),
    Internal(
        "_aggregate_total_loss",
        "gives every stage the mean loss after the optimizer's step; called before it instead",
        (),
    ),
    Internal("_INSTRUCTION_MAP", "what carries out each instruction of a schedule; labelled for profiles"),
)
PIPELINE_MODULE = (
    Internal("forward_funcs", "the layers of this stage; there is one, and our forward calls it"),
    Internal("get_tied_weights_and_groups", "which gradients stages share; overridden to say so", ()),
    Internal("mpu", "the grid of its topology; handed to the engine", ()),
)

PARAMETER_MARKS = (
    Internal("ds_pipe_replicated", "our mark of a tied copy, which DeepSpeed's norm leaves out"),
    Internal("tensor_model_parallel", "our mark of a shard, which DeepSpeed's norm counts on every rank"),
)
LOSS_SCALE = (
    Internal("custom_loss_scaler", "whether the scale is somebody else's; it is ours"),
    Internal("external_loss_scale", "multiplies the loss and divides gradients; a tensor of ours"),
    Internal("check_overflow", "asks whether a gradient overflowed; answered by our gate instead", ()),
    Internal("_muon_update_lacks_loss_scale", "of its own Muon; would wait for our tensor"),
    Internal("clip_grad", "the norm to clip to; where it is 0, ZeRO-1 and 2 would wait for our tensor"),
)
"""Of ``engine.optimizer`` in fp16."""
ACCELERATOR = (
    Internal("is_fp16_supported", "whether fp16 is refused; on CPUs products are fp32 instead", ()),
)
OPS = (Internal("__compatible_ops__", "what may be compiled; the shared-memory collective is taken out"),)

FRAGMENT_ADDRESS = (
    Internal("start", "where an interval starts"),
    Internal("numel", "how long it is"),
)
FRAGMENT = (
    Internal("lp_fragment_address", "which elements of the parameter this rank has the master of"),
    Internal("hp_fragment_address", "where they are in the flat master"),
    Internal("param_group_index", "in which flat master they are"),
)
FLAT_PARAMETER = (Internal("_hp_mapping", "where this rank has the master; None if it has nothing of it"),)

CUT_TENSOR = (Internal("ds_numel", "elements in one rank's part of a parameter, padding included"),)
CUT_PARAMETER = (
    Internal("ds_tensor", "this rank's part of the parameter"),
    Internal("ds_numel", "elements of the whole parameter"),
    Internal("ds_shape", "shape of the whole parameter"),
    Internal("all_gather", "makes parameters whole; called for those that stay whole between steps"),
)

_UPDATE = Internal("update_lp_params", "copies masters into working copies; called after a load", ())
_APART = Internal("use_grad_accum_attribute", "whether gradients are summed beside the parameters' own")
TIED = (Internal("grad_accum", "that sum; what the copies of a tied embedding add up"),)
"""Of a parameter."""


@dataclass(frozen=True)
class OptimizerKind:
    """One of the ways in which DeepSpeed wraps an optimizer: where masters and gradients are."""

    wrapper: str
    """Class of ``engine.optimizer``; "" if that is the optimizer itself."""
    description: str
    """Which runs have it, in messages."""
    internals: tuple[Internal, ...] = ()
    """Of ``engine.optimizer``, besides the next two."""
    parameter: tuple[Internal, ...] = ()
    """Of every trained parameter."""
    masters: Internal | None = None
    """List of flat fp32 masters; None if the parameters are their own. Under ZeRO each has a gradient between
    steps if the optimizer is offloaded, and none otherwise."""
    gradients: Internal | None = None
    """Tensor, or list of tensors, that holds gradients between steps."""
    asks: tuple[Internal, ...] = ()
    """Functions of the wrapper's module, called in a step, that wait for the device; replaced meanwhile."""


_INVALID = Internal(
    "is_invalid_grad_norm", "whether a norm is no number; answered by our gate instead", ("norm",)
)
_CLIPS = Internal(
    "clip_tensors_by_global_norm",
    "scales gradients if the norm is above the limit; ours scales by 1 else",
    ("input_tensors", "max_norm", "global_norm", "mpu"),
)

PLAIN = OptimizerKind("", "without ZeRO")
BF16 = OptimizerKind(
    "BF16_Optimizer",
    "in bf16 with fp32 gradients (ZeRO-1, or a pipeline without ZeRO)",
    (_UPDATE,),
    FLAT_PARAMETER,
    Internal("fp32_groups_flat_partition", "this rank's part of the masters; read and filled"),
    Internal("fp32_groups_gradients_flat", "sums of gradients; zeroed when iterations change"),
    (_INVALID, _CLIPS),
)
ZERO_1_2 = OptimizerKind(
    "DeepSpeedZeroOptimizer",
    "under ZeRO-1 and ZeRO-2",
    (_UPDATE, _APART),
    FLAT_PARAMETER,
    Internal("single_partition_of_fp32_groups", "this rank's part of the masters; read and filled"),
    asks=(_INVALID,),
)
ZERO_3 = OptimizerKind(
    "DeepSpeedZeroOptimizer_Stage3",
    "under ZeRO-3",
    (
        Internal("get_param_id", "key of a parameter in grad_position", ("param",)),
        Internal("grad_position", "flat master, offset and length of a parameter's part"),
        Internal("_get_param_partition_rank", "which part of a parameter is this rank's", ("param",)),
        Internal(
            "_partition_all_parameters", "lets go of parameters that are whole; called after a load", ()
        ),
        Internal(
            "_reassign_or_swap_out_partitioned_parameters",
            "copies a flat master into working copies; called after a load",
            ("sub_group_id",),
        ),
        Internal("persistent_parameters", "small ones, whole between steps; gathered anew after a load"),
    ),
    CUT_PARAMETER,
    Internal("fp32_partitioned_groups_flat", "this rank's part of the masters; read and filled"),
    Internal("grad_partitions_flat_buffer", "sums of gradients; zeroed when iterations change"),
    (_INVALID,),
)
KINDS = (PLAIN, BF16, ZERO_1_2, ZERO_3)


def forbid_shared_memory_collective() -> None:
    """On CPUs DeepSpeed would compile it at first use (45 s, and a stale lock file hangs it). It serves
    inference only."""
    try:
        known = "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    except AttributeError:
        known = False
    if not known:
        refuse(f"has no deepspeed.ops.{OPS[0].name}['deepspeed_shm_comm'] ({OPS[0].use})")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_fp16_on_cpus() -> None:
    """DeepSpeed refuses it where a CPU has no instructions for it; products are computed in fp32 there."""
    accelerator = get_accelerator()
    if not hasattr(type(accelerator), ACCELERATOR[0].name):
        refuse(f"has no accelerator.{ACCELERATOR[0].name} ({ACCELERATOR[0].use})")
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def without_scaling(ds_config: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told of a run: of a loss scale nothing."""
    if not ds_config.get("fp16", {}).get("enabled"):
        return ds_config
    return ds_config | {"fp16": {"enabled": True, "loss_scale": 1.0}}


def scale_loss(engine: DeepSpeedEngine, scale: Tensor) -> None:
    """Have DeepSpeed multiply the loss by a tensor and divide gradients by it, without asking whether one
    overflowed."""
    wrapper = engine.optimizer
    wrapper.custom_loss_scaler, wrapper.external_loss_scale = True, scale
    wrapper.check_overflow = lambda *args, **kwargs: None
    wrapper._muon_update_lacks_loss_scale = lambda group: False
    wrapper.clip_grad = wrapper.clip_grad or math.inf


def kind_of(engine: DeepSpeedEngine) -> OptimizerKind:
    """How DeepSpeed wrapped the optimizer of an engine.

    Raises:
        ConfigError: in a way that is not known here.
    """
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return PLAIN
    for kind in KINDS:
        if type(wrapper).__name__ == kind.wrapper:
            return kind
    refuse(
        f"wraps the optimizer under ZeRO-{engine.zero_optimization_stage()} in {type(wrapper).__name__}, and "
        "where that has its masters is not known here"
    )


def masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """What the optimizer steps, of this rank: flat fp32 masters, or the parameters themselves."""
    kind = kind_of(engine)
    if kind.masters is None:
        return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    return list(getattr(engine.optimizer, kind.masters.name))


def norm_of(engine: DeepSpeedEngine) -> Tensor | float:
    """Global gradient norm of the step in progress, known once the optimizer is about to step; below 0 or
    infinite where it is no number.

    Raises:
        ConfigError: it is not where DeepSpeed has it.
    """
    holder = engine if kind_of(engine) is PLAIN else engine.optimizer
    try:
        norm: Tensor | float = holder._global_grad_norm
    except AttributeError:  # one kind of wrapper has it from the first step on only
        refuse(f"has no {type(holder).__name__}._global_grad_norm, by which a step is judged")
    return norm


@contextmanager
def without_waits(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside the block DeepSpeed's step does not wait for the device to hear whether the gradient norm is a
    number or is to be clipped: it goes on as if it were one, and the optimizer's gate leaves the step out."""
    module = sys.modules[type(engine.optimizer).__module__]
    own = {
        internal.name: (getattr(module, internal.name), _ANSWERS[internal.name])
        for internal in kind_of(engine).asks
    }
    for name, (_, ours) in own.items():
        setattr(module, name, ours)
    try:
        yield
    finally:
        for name, (theirs, _) in own.items():
            setattr(module, name, theirs)


def _clip(
    input_tensors: Sequence[Tensor],
    max_norm: float = 1.0,
    global_norm: Any = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> Any:
    """As DeepSpeed's, which does not multiply where the factor is 1."""
    factor = (max_norm / (global_norm + eps)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(factor)
    return global_norm


_ANSWERS: dict[str, Callable[..., Any]] = {
    "is_invalid_grad_norm": lambda norm: False,
    "clip_tensors_by_global_norm": _clip,
}


def sums_apart(engine: DeepSpeedEngine) -> bool:
    """Whether gradients of several micro-batches are summed in an attribute of their own, in fp32."""
    return kind_of(engine) is ZERO_1_2 and bool(engine.optimizer.use_grad_accum_attribute)


def lasting_gradients(engine: DeepSpeedEngine, *, offloaded: bool) -> list[Tensor]:
    """Buffers of gradients that outlive a step: the next one reads them where no new gradient was written.

    Raises:
        ConfigError: they are not where this kind of optimizer has them.
    """
    kind = kind_of(engine)
    buffers: list[Tensor] = []
    if kind.gradients is not None:
        held = getattr(engine.optimizer, kind.gradients.name)
        buffers = [held] if isinstance(held, Tensor) else held
        if not (isinstance(buffers, list) and buffers and all(isinstance(b, Tensor) for b in buffers)):
            refuse(f"has no gradients in {kind.wrapper}.{kind.gradients.name} ({kind.gradients.use})")
    if kind in (ZERO_1_2, ZERO_3):
        for flat in masters(engine):
            if (flat.grad is not None) is not offloaded:
                found = "has no gradient" if offloaded else "keeps a gradient"
                where = f"{kind.wrapper}.{kind.masters.name if kind.masters else ''}"
                refuse(f"{found} in {where} between steps {'with' if offloaded else 'without'} offloading")
            buffers = buffers if flat.grad is None else [*buffers, flat.grad]
    return buffers


def check_classes() -> None:
    """Before an engine is built: the methods overridden or called exist and take what they are given.

    Raises:
        ConfigError: one does not.
    """
    methods = [internal for internal in ENGINE if internal.takes is not None]
    _check(DeepSpeedEngine, "DeepSpeedEngine", methods, "every engine")


def check_own_adam(ds_config: dict[str, Any]) -> None:
    """Before an engine is built: DeepSpeed's AdamW, if it is to be used, is there or can be compiled here,
    which may take a minute.

    Raises:
        ConfigError: it cannot.
    """
    section = ds_config.get("optimizer")
    if section is None or section.get("params", {}).get("torch_adam"):
        return
    offloaded = offloads_optimizer(ds_config)
    builder = get_accelerator().create_op_builder("CPUAdamBuilder" if offloaded else "FusedAdamBuilder")
    from torch.utils import cpp_extension  # which needs setuptools

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in folder.glob(f"**/{builder.name}/lock"):  # torch waits for it without a word, and for ever
        print(f"waiting for the compiler that {lock} belongs to; if none runs, remove the file", flush=True)
    try:
        builder.load()
    except Exception as error:  # of the compiler, of torch, of the operating system
        raise ConfigError(
            f"DeepSpeed's {'CPU Adam' if offloaded else 'FusedAdam'}, which optimizer.implementation "
            "'deepspeed' or an 'optimizer' section of the DeepSpeed JSON asks for, cannot be compiled here "
            f"({' '.join(str(error).split())[:300]}); install what it misses, or set "
            "optimizer.implementation to 'torch' and remove the section"
        ) from error


def check_engine(engine: DeepSpeedEngine, trained: nn.Module) -> None:
    """Everything is there that this engine and its ZeRO stage need; ``trained``: what has the parameters.

    Raises:
        ConfigError: something is not.
    """
    _check(engine, "DeepSpeedEngine", ENGINE, "every engine")
    if isinstance(engine.module, PipelineModule):
        _check(engine, "PipelineEngine", PIPELINE_ENGINE, "a pipeline")
        _check(engine.module, "PipelineModule", PIPELINE_MODULE, "a pipeline")
    _check_marks()
    kind = kind_of(engine)
    needed = (*kind.internals, *filter(None, (kind.masters, kind.gradients)))
    _check(engine.optimizer, kind.wrapper, needed, f"a run {kind.description}")
    if engine.fp16_enabled():
        _check(engine.optimizer, kind.wrapper, LOSS_SCALE, "a run in fp16")
    _check_functions(sys.modules[type(engine.optimizer).__module__], kind)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            _check_parameter(parameter, kind)


def _check_functions(module: Any, kind: OptimizerKind) -> None:
    for internal in kind.asks:
        function = getattr(module, internal.name, None)
        if function is None:
            refuse(f"has no {module.__name__}.{internal.name} ({internal.use})")
        if list(inspect.signature(function).parameters)[: len(internal.takes or ())] != list(
            internal.takes or ()
        ):
            wanted = ", ".join(internal.takes or ())
            refuse(f"has a {module.__name__}.{internal.name} ({internal.use}) that does not take {wanted}")


def _check_parameter(parameter: Any, kind: OptimizerKind) -> None:
    run = f"a run {kind.description}"
    _check(parameter, "Parameter", kind.parameter, run)
    if kind is ZERO_3:
        _check(parameter.ds_tensor, "Parameter.ds_tensor", CUT_TENSOR, run)
    elif getattr(parameter, "keep_fp32", False) and parameter.dtype != torch.float32:
        refuse("cast a merge coefficient: DeepSpeedEngine._cast_module_mixed_precision is not what casts now")
    mapping = parameter._hp_mapping if kind.parameter is FLAT_PARAMETER else None
    if mapping is not None:
        _check(mapping, "Parameter._hp_mapping", FRAGMENT, run)
        for name in ("lp_fragment_address", "hp_fragment_address"):
            _check(getattr(mapping, name), name, FRAGMENT_ADDRESS, run)


def _check_marks() -> None:
    marked = nn.Parameter(torch.empty(0))
    marked.tensor_model_parallel = True  # type: ignore[attr-defined]
    pipe, tensor = PARAMETER_MARKS
    if pipe.name != PIPE_REPLICATED:
        refuse(f"reads no Parameter.{pipe.name} ({pipe.use})")
    if not is_model_parallel_parameter(marked):
        refuse(f"reads no Parameter.{tensor.name} ({tensor.use})")


def _check(owner: Any, words: str, internals: Sequence[Internal], needed_by: str) -> None:
    """Attributes of ``owner`` itself or of one of DeepSpeed's classes that it is of, not of ours."""
    kind = owner if isinstance(owner, type) else type(owner)
    theirs = [cls for cls in kind.__mro__ if not cls.__module__.startswith("megatron_iiet")]
    for internal in internals:
        definitions: list[Any] = [vars(cls)[internal.name] for cls in theirs if internal.name in vars(cls)]
        if not definitions and (isinstance(owner, type) or internal.name not in vars(owner)):
            refuse(f"has no {words}.{internal.name} ({internal.use}), which {needed_by} needs here")
        if internal.takes is None:
            continue
        try:
            inspect.signature(definitions[0]).bind(None, **dict.fromkeys(internal.takes))
        except TypeError:
            wanted = ", ".join(internal.takes) or "nothing"
            refuse(
                f"has a {words}.{internal.name} ({internal.use}) that {needed_by} cannot call with {wanted}"
            )
