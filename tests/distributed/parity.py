"""One model under many layouts, and in one process of plain torch: the pieces of the parity matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.config.combinations import check_combination
from megatron_iiet.config.deepspeed import reconcile
from megatron_iiet.data.loader.batches import Batch, TrainBatches
from megatron_iiet.data.loader.inputs import inputs_of
from megatron_iiet.data.loader.samples import build_splits
from megatron_iiet.data.loader.validation import ValidationBatch, ValidationBatches
from megatron_iiet.models import Transformer
from megatron_iiet.models.diagnostics import IterateStatistics, observe_iterates
from megatron_iiet.models.iterations import iterations_at
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import portable
from megatron_iiet.storage.fragments import FragmentReader
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.training.engine import Engine, StepResult, engine_class
from megatron_iiet.training.schedules import learning_rate
from megatron_iiet.training.warm_start import open_teacher
from tests.distributed.muon_alone import MuonAlone
from tests.tiny import read_full

STEPS = 3
SAVE = SaveIdentity("5a" * 8, STEPS, "")
"""Of every checkpoint that an engine writes here without a run."""
SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl", "coefficient_init": "average"},
    "iiet-1": {"kind": "iiet", "iterations": 1, "coefficient_init": "average", "history_norm": "none"},
    "iiet-3": {"kind": "iiet", "iterations": 3},
    "mixed": {"kind": "iiet", "iterations": [2, 0, 1, 3], "predictor": "euler"},
    "released": {"kind": "iiet", "variant": "released", "iterations": 1},
    "rk2-gated": {"kind": "rk2", "stage_coefficients": "gated"},
    "rk4": {"kind": "rk4"},
    "weight-sharing": {"kind": "weight-sharing", "repeats": 2},
    "pcformer": {"kind": "pcformer", "coefficient_init": "average"},
}
READINGS: dict[str, dict[str, Any]] = {
    "damped": {"kind": "iiet", "iterations": 2, "damping": 0.5},
    "unmerged": {"kind": "iiet", "iterations": [2, 0, 1, 3], "merge": False},
    "rk4-full": {"kind": "rk4", "stage_coefficients": "full"},
    "one-row": {"kind": "iiet", "variant": "released", "iterations": 1, "readout": "shared"},
    "normed": {"kind": "euler", "output_norm": "layer"},
    "pcformer-4": {"kind": "pcformer", "predictor_order": 4},
    "first-keys": {"kind": "iiet", "iterations": [2, 0, 1, 3], "key_values": "first"},
}
"""Solvers that are no axis of the matrix."""
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"ffn_hidden_size": 64, "init_std": 0.1},
    "biased": {"attention_bias": "qkvo", "head_dim": 6},
    "normed-heads": {
        "attention_bias": "qkv",
        "qk_norm": True,
        "head_dim": 8,
        "rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    },
}
"""Models of other families, by name."""
MODELS: dict[str, dict[str, Any]] = {
    "rk2-gated": {"init_std": 0.1},  # F_1 - F_2, what the gate learns from, is no rounding error then
    "pcformer": {"init_std": 0.1, "num_layers": 6},  # its window over the history moves from layer 4 on
}
"""Where a solver's model is another one."""
AXES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "pipeline": (1, 2, 4),
    "data": (1, 2),
    "stage": (0, 1, 2, 3),
    "recompute": ("off", "layer", "evaluation"),
    "solver": tuple(SOLVERS),
    "tied": (True, False),
    "accumulation": (1, 3),
    "documents": (False, True),
}
NOT_OF_THE_GRID = ("recompute", "solver", "tied", "accumulation", "documents")
GLOBAL_BATCH = 12
LENGTH = 16
VOCABULARY = 100
DISTILLATION = {"alpha": 0.7, "beta": 0.3, "temperature": 2.0}
TOLERANCES = {
    "fp32": (1e-5, 1e-5, 1e-5),
    "bf16": (5e-4, 5e-3, 0.1),
    "fp16": (5e-5, 1e-3, 0.03),
    "fp8": (3e-3, 2e-2, 0.2),
}
"""Of losses, gradient norms and tensors, relative. bf16's are a few times what was seen (6e-5, 1e-3, 0.06):
AdamW's first steps turn the sign of a gradient into a step, so that weights differ most. fp16 has three bits
more (seen: 9e-6, 1e-4, 7e-3). fp8 was seen where F matters more: 9e-4 and 6e-3, bf16 3e-4 and 2e-3 there."""


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    data: int = 1
    stage: int = 1
    recompute: str = "off"
    solver: str = "iiet-1"
    tied: bool = True
    accumulation: int = 1
    documents: bool = False
    backend: str = "cpu"
    history: str = "transposed"
    precision: str = "fp32"
    shape: str = ""
    """One of SHAPES."""
    teacher: str = ""
    """Solver of a model to learn from, see :func:`write_teacher`."""
    offload: bool = False
    """Whether the optimizer is in the memory of the CPU, as DeepSpeed means it."""
    guards: tuple[tuple[str, Any], ...] = ()
    """Keys of the section guards with their values."""
    optimizer: str = "adamw"
    fp8: str = "off"
    scaling: tuple[tuple[str, Any], ...] = ()
    """Keys of the section fp16 of the DeepSpeed JSON with their values."""

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tensor, self.pipeline, self.data

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def is_legal(self) -> bool:
        """Up to 8 ranks, and a combination that the product allows."""
        return (
            self.world_size <= 8
            and not (self.sequence and self.tensor == 1)
            and not (self.pipeline > 1 and self.stage > 1)
            and not (self.precision == "bf16" and self.stage == 0 and self.pipeline == 1)
            and not (self.precision == "fp16" and self.stage == 0)
        )

    def __str__(self) -> str:
        sequence = "s" if self.sequence else ""
        tied = "tied" if self.tied else "untied"
        documents = "documents-" if self.documents else ""
        return (
            f"t{self.tensor}{sequence}p{self.pipeline}d{self.data}-zero{self.stage}-{self.recompute}-"
            f"{self.solver}-{tied}-acc{self.accumulation}-{documents}{self.backend}-{self.history}-"
            f"{self.precision}{self.shape and '-' + self.shape}{self.teacher and '-from-' + self.teacher}"
            f"{self.optimizer if self.optimizer != 'adamw' else ''}{'-offload' if self.offload else ''}"
            f"{'-' + self.fp8 if self.fp8 != 'off' else ''}"
        )

    def config(self, paths: dict[str, str], steps: int = STEPS) -> RunConfig:
        """Four layers; vocabulary 100 leaves most of the last rank's rows to padding; grouped queries.

        ``paths``: keys of the data section, and of the folder of teachers."""
        paths = dict(paths)
        folder = paths.pop("teachers", "")
        return config_from_dict(
            {
                "model": {
                    "hidden_size": 32,
                    "ffn_hidden_size": 48,
                    "num_layers": 4,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 4,
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": LENGTH,
                    "tie_embeddings": self.tied,
                    **MODELS.get(self.solver, {}),
                    **SHAPES.get(self.shape, {}),
                },
                "solver": (SOLVERS | READINGS)[self.solver],
                "parallel": {
                    "tensor": self.tensor,
                    "pipeline": self.pipeline,
                    "sequence": self.sequence,
                },
                "data": {**paths, "sequence_length": LENGTH, "split": [1.0, 0.0, 0.0]},
                # A larger epsilon: where a gradient is all rounding, AdamW would turn it into a full step.
                "optimizer": {
                    "kind": self.optimizer,
                    "lr": 1e-2,
                    "eps": 1e-4,
                    "weight_decay": 0.1,
                    "gradient_clipping": 0.5,
                },
                "training": {
                    "steps": steps,
                    "global_batch_size": GLOBAL_BATCH,
                    "micro_batch_size": GLOBAL_BATCH // (self.data * self.accumulation),
                    "precision": self.precision,
                    "fp8": self.fp8,
                    "recompute": self.recompute,
                },
                "guards": dict(self.guards),
                "ops": {"backend": self.backend, "history_gradient": self.history},
                "distillation": {
                    "teacher": self.teacher and str(Path(folder) / f"{self.teacher}-{self.tied}"),
                    **DISTILLATION,
                },
            }
        )


def every_grid() -> list[Case]:
    """Each legal grid with and without sequence parallelism; the other axes take their values in turn."""
    turns = {name: itertools.cycle(AXES[name]) for name in NOT_OF_THE_GRID}
    turns["backend"] = itertools.cycle(("cpu", "cpu", "reference"))
    turns["history"] = itertools.cycle(("transposed", "transposed", "transposed", "per_edge"))
    cases = []
    for tensor, sequence, pipeline, data in itertools.product(
        *(AXES[name] for name in ("tensor", "sequence", "pipeline", "data"))
    ):
        stages = itertools.cycle((1, 0) if pipeline > 1 else (3, 2, 1, 0))
        stage = next(itertools.islice(stages, len(cases) % 4, None))
        case = Case(tensor, sequence, pipeline, data, stage)
        if case.is_legal:
            cases.append(replace(case, **{name: next(values) for name, values in turns.items()}))
    return cases


def pairwise(seed_cases: list[Case]) -> list[Case]:
    """The given cases and, greedily, as few more as cover every legal pair of values of two axes."""
    names = list(AXES)
    legal = [case for values in itertools.product(*AXES.values()) if (case := Case(*values)).is_legal]

    def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
        values = [getattr(case, name) for name in names]
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(names)), 2)}

    of_case = {case: pairs(case) for case in legal}
    missing: set[tuple[int, Any, int, Any]] = set().union(*of_case.values())
    chosen = list(seed_cases)
    for case in chosen:
        missing -= pairs(case)
    while missing:
        best = max(legal, key=lambda case: len(of_case[case] & missing))
        chosen.append(best)
        missing -= of_case[best]
    return chosen


def batches(
    config: RunConfig, rank: int = 0, size: int = 1, micro_batch_size: int = GLOBAL_BATCH
) -> TrainBatches:
    """The training micro-batches of one data-parallel rank."""
    splits = build_splits(
        config.data.prefix, config.data.sequence_length, config.data.split, vocab_size=config.model.vocab_size
    )
    return TrainBatches(
        [splits.train],
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
        seed=config.training.seed,
    )


def packed(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions, [G, T + 1], of a global batch of samples with several documents each.

    The later a row, the more of it is padding, and the last has no target at all: whoever reads the last rows
    has far fewer targets than whoever reads the first.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    positions = torch.zeros_like(tokens)
    for row in range(GLOBAL_BATCH - 1):
        stop = LENGTH + 1 - LENGTH * row // GLOBAL_BATCH
        at = 0
        while at < stop:
            length = min(int(torch.randint(1, 9, (), generator=generator)), stop - at)
            positions[row, at : at + length] = torch.arange(length)
            at += length
    return tokens, positions


def rows_of(micro_step: int, rank: int, size: int, micro_batch_size: int) -> slice:
    """The rows of a global batch that a data-parallel rank reads in a micro-step."""
    first = (micro_step * size + rank) * micro_batch_size
    return slice(first, first + micro_batch_size)


class PackedBatches:
    """:func:`packed` batches, dealt to ranks and micro-steps as :class:`TrainBatches` deals its own."""

    def __init__(self, rank: int = 0, size: int = 1, micro_batch_size: int = GLOBAL_BATCH) -> None:
        self.micro_steps = GLOBAL_BATCH // (micro_batch_size * size)
        self._place = rank, size, micro_batch_size
        self._delivered = 0

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> Batch:
        step, micro_step = divmod(self._delivered, self.micro_steps)
        self._delivered += 1
        tokens, positions = packed(step)
        rows = rows_of(micro_step, *self._place)
        counted = (positions[:, 1:] > 0).sum().item()
        return Batch(tokens[rows], positions[rows], counted / (self.micro_steps * self._place[1]))


def validation_batches(case: Case, rank: int = 0, size: int = 1) -> list[ValidationBatch]:
    """One data-parallel rank's part of a :func:`packed` batch, of which two rows are fillers."""
    tokens, positions = packed(STEPS)
    weights = torch.ones(GLOBAL_BATCH)
    weights[[0, 5]] = 0.0
    size_of_one = GLOBAL_BATCH // (case.data * case.accumulation)
    dealt = [rows_of(step, rank, size, size_of_one) for step in range(GLOBAL_BATCH // size_of_one // size)]
    return [
        ValidationBatch(tokens[rows], weights[rows], positions[rows] if case.documents else None)
        for rows in dealt
    ]


def batches_of(case: Case, config: RunConfig, rank: int = 0, size: int = 1) -> TrainBatches | PackedBatches:
    """The training micro-batches of one data-parallel rank in a case."""
    make = PackedBatches if case.documents else partial(batches, config)
    return make(rank, size, config.training.micro_batch_size)


def open_engine(
    case: Case, paths: dict[str, str], world: ParallelContext, steps: int
) -> tuple[RunConfig, Engine, TrainBatches | PackedBatches]:
    """A case's engine and data on the processes there are."""
    config = case.config(paths, steps)
    context = ParallelContext.on_grid(
        config.parallel, world.rank, world.world_size, world.local_rank, world.device
    )
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3 and case.accumulation == 1:  # DeepSpeed would keep parameters as small as these whole
        zero["stage3_param_persistence_threshold"] = 0
        # The whole of a tiny model is within reach otherwise, and nothing is ever let go.
        zero["stage3_max_reuse_distance"] = 0
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    ds_json = {"zero_optimization": zero} | ({"fp16": dict(case.scaling)} if case.scaling else {})
    size = check_combination(config, ds_json, world.world_size, "the test")
    ds_config = reconcile(ds_json, config, size)
    engine = engine_class(context)(config, ds_config, context, case.backend, teacher=open_teacher(config))
    return config, engine, batches_of(case, config, context.data.rank, size)


def step_once(config: RunConfig, engine: Engine, own: TrainBatches | PackedBatches, step: int) -> StepResult:
    """What the training loop does in a step."""
    iterations, merging = iterations_at(config, step)
    engine.set_iterations(iterations, merging=merging)
    return engine.train_step(own, learning_rate(config.optimizer, step, config.training.steps))


def train_cases(
    cases: list[Case], paths: dict[str, str], folder: Path
) -> list[tuple[list[float], list[float]]]:
    """On every rank: train all cases of one grid; losses and gradient norms of the steps. Checkpoints of the
    first and the last step are left in ``folder/<case>/<step>``."""
    results = []
    with ParallelContext.start(cases[0].config(paths).parallel) as world:
        for case in cases:
            config, engine, own = open_engine(case, paths, world, STEPS)
            losses, norms = [], []
            for step in range(STEPS):
                result = step_once(config, engine, own, step)
                losses.append(result.loss)
                norms.append(result.grad_norm)
                if step in (0, STEPS - 1):
                    engine.save(folder / str(case) / str(step), SAVE)
            results.append((losses, norms))
    return results


def evaluate_cases(cases: list[Case], paths: dict[str, str]) -> list[tuple[float, IterateStatistics]]:
    """On every rank: the validation loss of untrained models, and statistics of all ranks' first batch."""
    results = []
    with ParallelContext.start(cases[0].config(paths).parallel) as world:
        for case in cases:
            _, engine, own = open_engine(case, paths, world, STEPS)
            data = engine.context.data
            mine = validation_batches(case, data.rank, data.size)
            loss = engine.evaluate(cast(ValidationBatches, mine))
            assert engine.evaluate(cast(ValidationBatches, mine)) == loss
            results.append((loss, engine.observe(validation_batches(case)[0])))
            step_once(case.config(paths), engine, own, 0)  # and training goes on after it
    return results


def train_curve(case: Case, paths: dict[str, str], steps: int) -> list[float]:
    """On every rank: the losses of ``steps`` steps."""
    with ParallelContext.start(case.config(paths).parallel) as world:
        config, engine, own = open_engine(case, paths, world, steps)
        return [step_once(config, engine, own, step).loss for step in range(steps)]


def continue_case(
    case: Case, paths: dict[str, str], stored: Path, again: Path
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """On every rank: load ``stored``, which has STEPS steps, save it to ``again``, take one more step.

    Its loss and gradient norm, and the working weights before it."""
    with ParallelContext.start(case.config(paths).parallel) as world:
        config, engine, own = open_engine(case, paths, world, STEPS + 1)
        with FragmentReader(stored, SAVE) as reader:
            engine.load(reader, STEPS)
        engine.save(again, SAVE)
        weights = dict(engine.gathered_parameters())
        for _ in range(STEPS * own.micro_steps):
            next(own)
        result = step_once(config, engine, own, STEPS)
        return result.loss, result.grad_norm, weights


def train_and_save(case: Case, paths: dict[str, str], folder: Path) -> tuple[float, float]:
    """On every rank: STEPS steps, a checkpoint, one more step; its loss and gradient norm."""
    with ParallelContext.start(case.config(paths).parallel) as world:
        config, engine, own = open_engine(case, paths, world, STEPS + 1)
        for step in range(STEPS):
            step_once(config, engine, own, step)
        engine.save(folder, SAVE)
        result = step_once(config, engine, own, STEPS)
        return result.loss, result.grad_norm


@dataclass(frozen=True)
class Reference:
    """What plain torch does in one process, in fp32."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""
    noise: dict[str, float]
    """How much the gradients of this one process change, in absolute terms, if it merely adds up the batch in
    other portions: fp32's own rounding, large where a gradient is what remains of a near-cancellation (rows
    of the released variant, whose scale the next LayerNorm takes out)."""
    weights: dict[str, torch.Tensor]
    """After the last step."""
    weight_noise: Callable[[], dict[str, float]]
    """As ``noise``, of the weights: large where Adam divides the noise of a small gradient by its size, as
    that of the only number of a gate's bias. Five more trainings: to be asked only where weights differ."""

    def largest_of_matrix(self, name: str) -> float:
        """The largest gradient in the matrix that a parameter is a row of: all layers' rows for merge
        coefficients, gate_weight for a gate's bias, which is the weight of a constant; else 0."""
        kind = name.rpartition(".")[2]
        rows = [g for n, g in self.gradients.items() if n.endswith("." + kind)] if "coeff" in kind else []
        if kind == "gate_bias":
            rows = [self.gradients[name.replace("gate_bias", "gate_weight")]]
        return max((row.abs().max().item() for row in rows), default=0.0)


def alone(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a batch, [R, T] each, with every document in a row of its own; -100 behind it."""
    if batch.positions is None:
        return batch.tokens[:, :-1], batch.tokens[:, 1:]
    rows = []
    for tokens, positions in zip(batch.tokens, batch.positions, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, stop in itertools.pairwise([*starts, len(tokens)]):
            if stop - start > 1:
                rows.append(F.pad(tokens[start:stop], (0, LENGTH + 1 - (stop - start)), value=-1))
    documents = torch.stack(rows)
    return documents[:, :-1].clamp(min=0), documents[:, 1:].masked_fill(documents[:, 1:] < 0, -100)


def write_teacher(case: Case, paths: dict[str, str]) -> Transformer:
    """Draw a case's teacher, far from the student, and leave it in the folder of teachers."""
    config = replace(case, teacher="").config(paths)
    config.solver = replace(case, solver=case.teacher).config(paths).solver
    config.ops.history_gradient = "per_edge"
    model = Transformer(config, backend="reference")
    model.initialise(seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    folder = Path(case.config(paths).distillation.teacher)
    if not folder.exists():
        portable.save(config, model.state_dict(), folder)
    return model


def loss_of(
    model: Transformer, teacher: Transformer | None, tokens: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over the targets of torch's own cross-entropy on whole logits, and of what a teacher adds."""
    logits, outputs = outputs_of(model, tokens)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if teacher is None:
        return total
    with torch.no_grad():
        taught_logits, taught = outputs_of(teacher, tokens)
    counts = targets >= 0
    squares = [(a - b).square().mean(-1)[counts].sum() for a, b in zip(outputs, taught, strict=True)]
    t = DISTILLATION["temperature"]
    student, wanted = ((z / t).log_softmax(-1)[counts] for z in (logits, taught_logits))
    divergence = F.kl_div(student, wanted, reduction="sum", log_target=True) * t**2
    mse = torch.stack(squares).mean()
    return total + DISTILLATION["alpha"] * mse + DISTILLATION["beta"] * divergence


def outputs_of(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and the outputs of all layers."""
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda *arguments: outputs.append(arguments[2][0]))
        for layer in model.layers.values()
    ]
    logits = model(tokens)
    for handle in handles:
        handle.remove()
    return logits, outputs


def gradients_of(
    model: Transformer, batch: Batch, portion: int, teacher: Transformer | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of a batch and its gradients, accumulated over portions of ``portion`` sequences, and
    documents that never met."""
    model.zero_grad()
    total = 0.0
    inputs, targets = alone(batch)
    counted = (targets >= 0).sum()
    for tokens, wanted in zip(inputs.split(portion), targets.split(portion), strict=True):
        loss = loss_of(model, teacher, tokens, wanted) / counted
        loss.backward()
        total += loss.item()
    named = model.named_parameters()
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


PORTIONS = (1, 2, 4, 5, 7)
"""Sequences at a time of the trainings that measure rounding."""
SPREAD = 8
"""By how much a weight may be further off than these are: of a single number five tell little, and it
depends on the CPU's vectors (seen: 1 with AVX2, 5 with AVX-512)."""


def reference(case: Case, paths: dict[str, str]) -> Reference:
    """Train with torch alone: no kernels of ours, no gradient but autograd's."""
    train = partial(train_alone, case, paths, write_teacher(case, paths) if case.teacher else None)
    losses, norms, first, weights = train()

    def noise_of(which: int, steps: int) -> dict[str, float]:
        others = [train(portion, steps)[which] for portion in PORTIONS]
        wanted = first if which == 2 else weights
        return {n: max((wanted[n] - o[n]).abs().max().item() for o in others) for n in wanted}

    return Reference(losses, norms, first, noise_of(2, 1), weights, cache(partial(noise_of, 3, STEPS)))


def train_alone(
    case: Case,
    paths: dict[str, str],
    teacher: Transformer | None = None,
    portion: int = GLOBAL_BATCH,
    steps: int = STEPS,
    *,
    of: int = STEPS,
    left_out: Container[int] = (),
) -> tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The first ``steps`` of a training of ``of``, with torch alone, but for those ``left_out``: losses,
    gradient norms, the first step's gradients before clipping, and the last weights."""
    config = case.config(paths, of)
    config.ops.history_gradient = "per_edge"
    model = Transformer(config, backend="reference")
    model.initialise(config.training.seed)
    named = dict(model.named_parameters())
    muon = MuonAlone(named, config) if case.optimizer == "muon" else None
    left = {n: p for n, p in named.items() if muon is None or n not in muon.named}
    decayed = [p for n, p in left.items() if p.dim() == 2 and ".solver." not in n]
    others = [p for p in left.values() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        foreach=False,
    )
    reader = batches_of(case, config)
    losses, norms, first = [], [], {}
    for step in range(steps):
        batch = next(reader)
        if step in left_out:
            continue
        loss, gradients = gradients_of(model, batch, portion, teacher)
        first = first or gradients
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), config.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.training.steps)
        optimizer.step()
        if muon is not None:
            muon.step(optimizer.param_groups[0]["lr"])
        losses.append(loss)
        norms.append(norm.item())
    return losses, norms, first, {n: p.detach() for n, p in named.items()}


def reference_evaluation(case: Case, paths: dict[str, str]) -> tuple[float, IterateStatistics]:
    """What :func:`evaluate_cases` should find, in one process: the mean over targets of documents alone."""
    model = Transformer(case.config(paths), backend="reference")
    model.initialise(case.config(paths).training.seed)
    batches = validation_batches(case)
    tokens, weights, positions = (
        None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)
    )
    kept = weights > 0
    inputs, targets = alone(Batch(tokens[kept], None if positions is None else positions[kept]))
    tokens, weights, positions = batches[0]
    counts = weights > 0
    counting = ValidationBatch(
        tokens[counts], weights[counts], None if positions is None else positions[counts]
    )
    with observe_iterates(model) as statistics:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        model(*inputs_of(counting))
    return loss.item(), statistics


def differences(
    case: Case, expected: Reference, losses: list[float], norms: list[float], folder: Path
) -> Iterator[str]:
    """What of a case differs from the reference by more than the tolerance of its precision, relative to the
    tensor's largest value, and by more than a few times what one process differs from itself.

    Merge coefficients are one triangular matrix, whose rows are parameters: there the largest value is the
    matrix's. bf16 gradients are not compared: those of coefficients are mostly rounding.
    """
    config = case.config({})
    for_losses, for_norms, for_tensors = TOLERANCES[case.precision if case.fp8 == "off" else "fp8"]

    def compare(
        what: str,
        found: torch.Tensor,
        wanted: torch.Tensor,
        tolerance: float,
        floor: Callable[[], float] = lambda: 0.0,
    ) -> Iterator[str]:
        error, scale = (found - wanted).abs().max().item(), max(wanted.abs().max().item(), 1e-6)
        if not error <= tolerance * scale and not error <= floor():
            yield f"{case}: {what} differs by {error / scale:.1e} of its largest value"

    yield from compare("losses", torch.tensor(losses), torch.tensor(expected.losses), for_losses)
    yield from compare("gradient norms", torch.tensor(norms), torch.tensor(expected.norms), for_norms)
    # The first moment after one step is (1 - its decay) times the clipped gradient: what the optimizer saw.
    decays = {"exp_avg": "beta1", "momentum_buffer": "momentum"}
    clipped = min(1.0, config.optimizer.gradient_clipping / expected.norms[0])
    with FragmentReader(folder / "0", SAVE) as first, FragmentReader(folder / str(STEPS - 1), SAVE) as last:
        assert set(first.parameters) == set(expected.gradients)
        for name, gradient in expected.gradients.items():
            yield from compare(
                name,
                read_full(last, name),
                expected.weights[name],
                for_tensors,
                lambda name=name: SPREAD * expected.weight_noise()[name],
            )
            if case.precision == "fp32":
                floor = max(4 * expected.noise[name], for_tensors * expected.largest_of_matrix(name))
                moment = first.parameters[name].kinds[1]
                found = read_full(first, name, moment)
                found /= (1 - getattr(config.optimizer, decays[moment])) * clipped
                yield from compare(
                    f"gradient of {name}", found, gradient, for_tensors, lambda floor=floor: floor
                )
