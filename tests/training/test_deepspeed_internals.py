"""What is relied on of DeepSpeed is declared, is there in every kind of engine, and told where it is not."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.runtime.utils as deepspeed_utils
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iiet.config import ConfigError, LoadedConfig, config_from_dict, config_to_yaml
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.training.engine import Verdict, engine_class
from megatron_iiet.training.engine import deepspeed_internals as internals
from megatron_iiet.training.pretrain import reconciled_ds_config
from tests.distributed.harness import free_port, run_ranks
from tests.distributed.runs import as_data, ds_json
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "megatron_iiet" / "training" / "engine"

DOCUMENTED = {
    *("module", "optimizer", "train", "eval", "backward", "step", "train_batch", "eval_batch"),
    *("get_global_grad_norm", "param_groups", "state", "parameters", "defaults"),
}
"""Used on engines and optimizers, and in DeepSpeed's and torch's documentation."""
RECEIVERS = ("engine", "wrapper", "optimizer", "self._engine", "self.optimizer", "engine.optimizer")
"""What holds an engine or its optimizer in the code of the engines."""
PYTHONS = {*dir(type), "__setattr__", "_asdict"}


# ------------------------------------------------------------------------------------ the declarations


def tables() -> list[tuple[internals.Internal, ...]]:
    """Every table of the module, those of the kinds of optimizer included."""
    found = [value for name, value in vars(internals).items() if name.isupper() and isinstance(value, tuple)]
    found = [table for table in found if table and isinstance(table[0], internals.Internal)]
    for kind in internals.KINDS:
        found += [kind.internals, kind.asks, tuple(filter(None, (kind.masters, kind.gradients)))]
    return found


def declared() -> set[str]:
    return {internal.name for table in tables() for internal in table}


def sources(*more: Path) -> Iterator[ast.Module]:
    for path in (*sorted(ROOM.glob("*.py")), *more):
        if path.name != "deepspeed_internals.py" or path in more:
            yield ast.parse(path.read_text())


def their_subclasses(tree: ast.Module) -> Iterator[ast.ClassDef]:
    theirs = {"DeepSpeedEngine", "PipelineEngine", "PipelineModule", "CorrectedEngine"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and theirs & {ast.unparse(base) for base in node.bases}:
            yield node


def overridden(tree: ast.Module) -> set[str]:
    """Methods and attributes of our subclasses that DeepSpeed's classes (not torch's) have too."""
    bases = (internals.DeepSpeedEngine, internals.PipelineEngine, internals.PipelineModule)
    theirs = {
        name
        for base in bases
        for cls in base.__mro__
        if cls.__module__.startswith("deepspeed")
        for name in vars(cls)
    }
    return {
        method.name
        for cls in their_subclasses(tree)
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and method.name in theirs
    } - {"__init__", "forward"}  # PipelineModule's are documented


def ours(tree: ast.Module) -> set[str]:
    """Names that our own classes and functions define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, (ast.Name, ast.Attribute)):
            names.add(node.target.id if isinstance(node.target, ast.Name) else node.target.attr)
        elif isinstance(node, ast.Assign):
            names |= {t.attr for t in node.targets if isinstance(t, ast.Attribute)}
    return names


def on_theirs(tree: ast.Module) -> set[str]:
    """Attributes read or written on what holds an engine, its optimizer or its module."""
    own = ours(tree)
    selves = {
        node.attr
        for cls in their_subclasses(tree)
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    } - own
    return selves | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in RECEIVERS
        and node.attr not in ("context", "offloaded", "forget_gradients", "start")
    }


def private(tree: ast.Module) -> set[str]:
    """Attributes with an underscore that nothing in the file defines, and DeepSpeed's ``ds_`` ones."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {n for n in names if n.startswith(("_", "ds_"))} - ours_of_the_room() - PYTHONS


def ours_of_the_room() -> set[str]:
    shared = set().union(*(ours(tree) for tree in sources()))
    return shared - {name for name in shared if name.startswith("ds_")} - {"_global_grad_norm"}


def test_what_is_used_is_declared() -> None:
    for tree in sources():
        used = on_theirs(tree) - {"training"}  # of torch's modules
        assert used - declared() <= DOCUMENTED | ours_of_the_room(), used - declared() - DOCUMENTED
        assert private(tree) | overridden(tree) <= declared()


def test_what_is_declared_is_used() -> None:
    used = set()
    for tree in sources(ROOM / "deepspeed_internals.py", ROOT / "megatron_iiet" / "parallel" / "tensor.py"):
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | overridden(tree)
        used |= {"__init__"} if any("cls(" in ast.unparse(node) for node in ast.walk(tree)) else set()
    read_by_name = {kind.masters.name for kind in internals.KINDS if kind.masters} | {
        kind.gradients.name for kind in internals.KINDS if kind.gradients
    }
    read_by_name |= {internal.name for kind in internals.KINDS for internal in kind.asks}
    assert declared() == (used & declared()) | read_by_name


def test_no_attribute_is_read_with_a_default() -> None:
    """``getattr(optimizer, name, None)`` turns a rename into nothing done."""
    own_marks = {"keep_fp32", "ds_pipe_replicated"}  # set by us, absent where unset
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                assert ast.literal_eval(node.args[1]) in own_marks, ast.unparse(node)


def test_deepspeed_runtime_is_imported_in_one_module() -> None:
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("deepspeed.runtime"), ast.unparse(node)


# ------------------------------------------------------------------------------------ real engines

CPU = {"offload_optimizer": {"device": "cpu"}}
ENGINES: dict[str, tuple[int, int, str, dict[str, Any], dict[str, Any], internals.OptimizerKind]] = {
    # ranks, ZeRO stage, precision, more of zero_optimization, parallel
    "zero 0, fp32": (2, 0, "fp32", {}, {}, internals.PLAIN),
    "zero 1, fp32": (2, 1, "fp32", {}, {}, internals.ZERO_1_2),
    "zero 1, bf16": (2, 1, "bf16", {}, {}, internals.BF16),
    "zero 1, fp16": (2, 1, "fp16", {}, {}, internals.ZERO_1_2),
    "zero 3, fp16": (2, 3, "fp16", {}, {}, internals.ZERO_3),
    "zero 1, offload": (2, 1, "bf16", CPU, {}, internals.ZERO_1_2),
    "zero 2, bf16": (2, 2, "bf16", {}, {}, internals.ZERO_1_2),
    "zero 2, offload": (2, 2, "fp32", CPU, {}, internals.ZERO_1_2),
    "zero 3, fp32": (2, 3, "fp32", {}, {}, internals.ZERO_3),
    "zero 3, bf16": (2, 3, "bf16", {}, {}, internals.ZERO_3),
    "zero 3, offload": (2, 3, "bf16", CPU | {"offload_param": {"device": "cpu"}}, {}, internals.ZERO_3),
    "pipeline, zero 0, fp32": (2, 0, "fp32", {}, {"pipeline": 2}, internals.PLAIN),
    "pipeline, zero 0, bf16": (2, 0, "bf16", {}, {"pipeline": 2}, internals.BF16),
    "pipeline, zero 1, fp32": (2, 1, "fp32", {}, {"pipeline": 2}, internals.ZERO_1_2),
    "pipeline, zero 1, bf16": (2, 1, "bf16", {}, {"pipeline": 2}, internals.BF16),
    "tensor, zero 1": (2, 1, "bf16", {}, {"tensor": 2}, internals.BF16),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def on_engine(config: dict[str, Any], path: Path, act: Callable[..., Any], *args: Any) -> Any:
    """``act(engine, *args)`` in a rank that has built one."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        engine = engine_class(context)(loaded.config, ds_config, context, "reference")
        return act(engine, *args)


def sentence(engine: Any) -> str:
    """The refusal of an engine that was changed; "" if it passes."""
    try:
        internals.check_engine(engine._engine, engine.model)
        internals.lasting_gradients(engine._engine, offloaded=engine._engine.offloaded)
    except ConfigError as error:
        return str(error)
    return ""


def without_each(engine: Any) -> dict[str, str]:
    """What is said when one name after the other is gone, and at last when none is."""
    wrapped, kind = engine._engine, internals.kind_of(engine._engine)
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    mapped = next((p._hp_mapping for p in parameters if getattr(p, "_hp_mapping", None)), None)
    table = [(wrapped, internals.ENGINE), (parameters[-1], kind.parameter)]
    table += [(wrapped.optimizer, internals.LOSS_SCALE if wrapped.fp16_enabled() else ())]
    table += [(sys.modules[type(wrapped.optimizer).__module__], kind.asks)]
    table += [(wrapped.optimizer, (*kind.internals, *filter(None, (kind.masters, kind.gradients))))]
    if isinstance(wrapped, internals.PipelineEngine):
        table += [(wrapped, internals.PIPELINE_ENGINE), (wrapped.module, internals.PIPELINE_MODULE)]
    if kind is internals.ZERO_3:
        table.append((parameters[0].ds_tensor, internals.CUT_TENSOR))
    elif mapped is not None:
        table.append((mapped, internals.FRAGMENT))
        table += [(mapped.hp_fragment_address, internals.FRAGMENT_ADDRESS)]
    said = {"whole": sentence(engine), "kind": kind.description}
    for owner, names in table:
        for internal in names:
            with pytest.MonkeyPatch.context() as patch:
                remove(patch, owner, internal.name)
                said[f"{type(owner).__name__}.{internal.name}"] = sentence(engine)
    assert sentence(engine) == ""
    return said


def remove(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """From an object and from DeepSpeed's classes of it, as a release without it would."""
    if name in vars(owner):
        patch.delattr(owner, name)
    for cls in type(owner).__mro__:
        if cls.__module__.startswith("deepspeed") and name in vars(cls):
            patch.delattr(cls, name)


def leave_gradients(engine: Any) -> list[float]:
    """Largest number in each lasting buffer of gradients, filled and then forgotten."""
    wrapped = engine._engine
    buffers = internals.lasting_gradients(wrapped, offloaded=wrapped.offloaded)
    for buffer in buffers:
        buffer.fill_(3.0)
    wrapped.forget_gradients()
    return [buffer.abs().max().item() for buffer in buffers if buffer.numel()]


def hide_gradients(engine: Any) -> list[str]:
    """What is said when offloaded gradients, or the buffer of ZeRO-3, are somewhere else."""
    wrapped, said = engine._engine, []
    for flat in internals.masters(wrapped)[:1]:
        before = flat.grad
        flat.grad = None if before is not None else torch.zeros_like(flat)
        said.append(sentence(engine))
        flat.grad = before
    if wrapped.zero_optimization_stage() == 3:
        wrapped.optimizer.grad_partitions_flat_buffer = None
        said.append(sentence(engine))
    return said


class Waits(TorchDispatchMode):
    """Counts where the host asks for a number that the device has yet to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return function(*args, **(kwargs or {}))


def step_waits(engine: Any) -> int:
    """How often a step waits for the device, its numbers being read later as on GPUs."""
    config, engine.ring.at_once = engine.model.config, False
    rows = config.training.micro_batch_size, config.data.sequence_length + 1
    batches = itertools.repeat(Batch(torch.randint(config.model.vocab_size, rows)))
    engine.train_step(batches, 1e-4)
    with Waits() as waits:
        result = engine.train_step(batches, 1e-4)
    assert not result.is_read
    assert result.verdict is Verdict.TRAINED
    return waits.count


def looked_at(engine: Any) -> tuple[dict[str, str], list[float], list[str], int]:
    return without_each(engine), leave_gradients(engine), hide_gradients(engine), step_waits(engine)


Seen = tuple[str, dict[str, str], list[float], list[str], int]


@pytest.fixture(scope="module", params=ENGINES)
def of_engine(
    request: pytest.FixtureRequest, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """An engine's name, and what was seen of it: to build one takes longer than to look at it."""
    ranks, stage, precision, zero, parallel, _ = ENGINES[request.param]
    folder = tmp_path_factory.mktemp("engine")
    config = tiny_config(data, folder, training={"precision": precision}, parallel=parallel)
    path = ds_json(folder, stage, zero_optimization={"stage": stage} | zero)
    return request.param, *run_ranks(on_engine, ranks, as_data(config), path, looked_at)[0]


@pytest.mark.slow
def test_an_engine_passes_and_every_missing_name_is_told(of_engine: Seen) -> None:
    name, said = of_engine[:2]
    assert said["whole"] == ""
    assert said["kind"] == ENGINES[name][-1].description
    of_names = {removed: told for removed, told in said.items() if "." in removed}
    assert len(of_names) >= len(internals.ENGINE)
    for removed, told in of_names.items():
        attribute = removed.partition(".")[2]
        if attribute == "__init__":  # there is always one; object's takes no such arguments
            continue
        assert told.startswith(f"DeepSpeed {internals.deepspeed.__version__} has no "), (removed, told)
        assert f".{attribute} (" in told
        assert told.endswith(f"; tested is {internals.TESTED} (pip install deepspeed=={internals.TESTED})")
        assert told.count("\n") == 0


@pytest.mark.slow
def test_forgetting_gradients_is_never_nothing(of_engine: Seen) -> None:
    name, _, left, said, _ = of_engine
    *_, zero, _, kind = ENGINES[name]
    assert bool(left) is (kind.gradients is not None or "offload_optimizer" in zero)
    assert all(value == 0 for value in left)
    if kind not in (internals.PLAIN, internals.BF16):
        assert said
        for told in said:
            assert "gradient" in told
            assert told.endswith(f"(pip install deepspeed=={internals.TESTED})")


@pytest.mark.slow
def test_a_step_waits_for_nothing(of_engine: Seen) -> None:
    """An optimizer in another memory steps with numbers that are there."""
    name, *_, waits = of_engine
    assert waits == 0 or "offload" in name


@pytest.mark.parametrize("norm", [0.5, 1.0, 5.0])
def test_gradients_are_clipped_as_deepspeed_clips(norm: float) -> None:
    """To the bit; also where there is nothing to clip."""
    ours, theirs = ([torch.arange(1.0, 6.0), torch.tensor([[3.0]])] for _ in range(2))
    assert internals._clip(ours, 1.0, torch.tensor(norm)) == norm
    deepspeed_utils.clip_tensors_by_global_norm(theirs, 1.0, torch.tensor(norm))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert (ours[1].item() < 3.0) is (norm >= 1.0)


def test_a_method_that_asks_for_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    internals.check_classes()

    def clip_fp32_gradients(self: Any, norm_type: float) -> None:
        """As a later release might have it."""

    monkeypatch.setattr(internals.DeepSpeedEngine, "clip_fp32_gradients", clip_fp32_gradients)
    with pytest.raises(
        ConfigError, match=r"DeepSpeedEngine\.clip_fp32_gradients .* cannot call with nothing;"
    ):
        internals.check_classes()


def test_other_marks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    internals._check_marks()
    monkeypatch.setattr(internals, "PIPE_REPLICATED", "pipe_copy")
    with pytest.raises(ConfigError, match=r"reads no Parameter\.ds_pipe_replicated"):
        internals._check_marks()
    monkeypatch.undo()
    monkeypatch.setattr(internals, "is_model_parallel_parameter", lambda p: False)
    with pytest.raises(ConfigError, match=r"reads no Parameter\.tensor_model_parallel"):
        internals._check_marks()


def test_the_compiled_collective_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = internals.deepspeed.ops.__compatible_ops__
    assert operators["deepspeed_shm_comm"] is False
    monkeypatch.delitem(operators, "deepspeed_shm_comm")
    with pytest.raises(
        ConfigError, match=r"has no deepspeed\.ops\.__compatible_ops__\['deepspeed_shm_comm'\]"
    ):
        internals.forbid_shared_memory_collective()


def cast_everything(config: dict[str, Any], path: Path) -> str:
    """The refusal where DeepSpeed casts by a method that we do not override."""

    def cast(self: Any, param_dtype: torch.dtype | None, *_: Any) -> None:
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(param_dtype)

    from megatron_iiet.training.engine.corrected import CorrectedEngine

    CorrectedEngine._cast_module_mixed_precision = cast  # type: ignore[method-assign, assignment]
    try:
        on_engine(config, path, sentence)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_cast_merge_coefficient_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    config = as_data(tiny_config(data, tmp_path, training={"precision": "bf16"}))
    [said] = run_ranks(cast_everything, 1, config, ds_json(tmp_path, 1))
    assert "cast a merge coefficient: DeepSpeedEngine._cast_module_mixed_precision" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as z\n"
            "del z._partition_all_parameters",
            "DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
        ),
        (
            "import deepspeed.runtime.utils as u\ndel u.is_model_parallel_parameter",
            "is_model_parallel_parameter",
        ),
    ],
    ids=["method", "import"],
)
def test_a_run_ends_with_one_sentence_and_status_2(
    change: str, named: str, data: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(config_to_yaml(tiny_config(data, tmp_path / "run")))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    started = (
        f"import sys, deepspeed\n{change}\nsys.argv = ['pretrain_iiet.py', *sys.argv[1:]]\n"
        "import pretrain_iiet; pretrain_iiet.main()"
    )
    flags = ["--config", str(tmp_path / "run.yaml"), "--ds-config", str(tmp_path / "ds.json")]
    done = subprocess.run(
        [sys.executable, "-c", started, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert error[0].startswith(f"error: DeepSpeed {internals.deepspeed.__version__} ")
    assert named in error[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- timeouts


def timeouts_of_groups(config: dict[str, Any], ds_path: Path) -> set[float]:
    """Seconds that the process groups wait for which there are once an engine is built."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        engine_class(context)(loaded.config, ds_config, context, "reference")
        groups = torch.distributed.distributed_c10d._world.pg_map
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


@pytest.mark.slow
@pytest.mark.parametrize("grid", [{"pipeline": 2}, {"tensor": 2}])
def test_every_process_group_waits_for_the_longest_timeout(grid: dict[str, int], tmp_path: Path) -> None:
    """DeepSpeed's groups too, which it makes with torch's default."""
    parallel = {**grid, "timeouts": {"start": 100, "save": 123}}
    config = tiny_config(make_data(tmp_path), tmp_path / "run", parallel=parallel)
    for seconds in run_ranks(timeouts_of_groups, 2, as_data(config), ds_json(tmp_path, 1)):
        assert seconds == {123.0}
