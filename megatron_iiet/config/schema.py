"""Every field of a run but those of solvers and optimizers, as typed nested dataclasses. The docstring under
a field is its ``--help`` text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_iiet.config.changes import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Change, Range, key
from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.kinds import Kinds
from megatron_iiet.config.optimizers import OPTIMIZERS, OptimizerConfig
from megatron_iiet.config.rope import RopeScaling, read_rope_scaling
from megatron_iiet.config.solvers import SOLVERS, Iterating, SolverConfig
from megatron_iiet.config.timeouts import Timeouts, read_timeouts

FUNCTION, ORDER, COURSE, FREE = Change


@dataclass
class ModelConfig:
    """Shape of the Transformer, whatever solver integrates it."""

    hidden_size: int = key(512, FUNCTION, POSITIVE)
    """Width d of the residual stream."""
    ffn_hidden_size: int = key(1408, FUNCTION, POSITIVE)
    """Inner width of the SwiGLU feed-forward."""
    num_layers: int = key(12, FUNCTION, POSITIVE)
    """Number of decoder layers N."""
    num_attention_heads: int = key(4, FUNCTION, POSITIVE)
    """Query heads; must divide hidden_size."""
    num_key_value_heads: int | None = key(None, FUNCTION, POSITIVE)
    """Key/value heads of grouped-query attention; must divide num_attention_heads.
    null: as many as query heads."""
    head_dim: int | None = key(None, FUNCTION, POSITIVE)
    """Width of one attention head, even; null: hidden_size / num_attention_heads."""
    attention_bias: Literal["none", "qkv", "qkvo"] = key("none", FUNCTION)
    """Biases of the attention's linear maps: none, on queries, keys and values (Qwen2), or on the output as
    well. They start at zero."""
    qk_norm: bool = key(False, FUNCTION)
    """RMSNorm of every head's query and key before they are rotated, one weight for all heads of a layer
    (Qwen3)."""
    vocab_size: int = key(32000, FUNCTION, POSITIVE)
    """Token ids V that the model knows; at least the tokenizer's size."""
    vocab_multiple: int = key(128, FUNCTION, POSITIVE)
    """Embedding and head get zero rows up to a multiple of this; they are masked and never trained.
    Independent of parallel.tensor, which must divide the padded size."""
    max_position_embeddings: int = key(2048, COURSE, POSITIVE)
    """Length of the rotary table; the longest sequence the model can read."""
    tie_embeddings: bool = key(True, FUNCTION)
    """Use the embedding matrix as output head."""
    embedding_scale: float | Literal["unit"] = key("unit", FUNCTION, POSITIVE)
    """Factor on the embedding output. 'unit' brings the initial output to rms 1 (1 / init_std);
    1 reproduces LLaMA. At rms 0.02 the corrector of an implicit solver is far from contractive."""
    rms_norm_eps: float = key(1.0e-6, FUNCTION, POSITIVE)
    """Epsilon of every RMSNorm."""
    rotary_base: float = key(10000.0, FUNCTION, POSITIVE)
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, float | bool | str] | None = key(None, FUNCTION)
    """How rotary positions reach beyond the length a model was first trained on: null, or an object with kind
    linear (factor), llama3 (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) or
    yarn (factor, original_max_position_embeddings; also beta_fast, beta_slow, attention_factor, mscale,
    mscale_all_dim, truncate); transformers' names and definitions."""
    init_std: float = key(0.02, COURSE, POSITIVE)
    """Standard deviation of the normal initialisation of every weight matrix."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_width(self) -> int:
        """Width of one attention head, null resolved."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, null resolved to the number of query heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def resolved_embedding_scale(self) -> float:
        """The factor on the embedding output, 'unit' resolved to 1 / init_std."""
        return 1.0 / self.init_std if self.embedding_scale == "unit" else float(self.embedding_scale)

    @property
    def resolved_rope_scaling(self) -> RopeScaling | None:
        """How rotary positions are scaled; None if they are not.

        Raises:
            ConfigError: ``rope_scaling`` is no such object.
        """
        return read_rope_scaling(self.rope_scaling)

    def resolved(self) -> dict[str, Any]:
        """Every key's value, equal where it means the same: null and 'unit' are the numbers that they stand
        for (but a head's width is null where it follows from others), an object has no defaults."""
        scaling = self.resolved_rope_scaling
        follows = self.head_width * self.num_attention_heads == self.hidden_size
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": None if follows else self.head_width,
            "embedding_scale": self.resolved_embedding_scale,
            "rope_scaling": None if scaling is None else scaling.to_mapping(),
        }


@dataclass
class ParallelConfig:
    """The grid of processes: tensor x pipeline x data. The data-parallel size is what the number of
    processes leaves; ranks of one tensor-parallel group are neighbours."""

    tensor: int = key(1, COURSE, POSITIVE)
    """Tensor-parallel size: ranks that share every layer's matrices. Must divide the query heads, key/value
    heads, feed-forward width and padded vocabulary; keep it within one host."""
    pipeline: int = key(1, COURSE, POSITIVE)
    """Pipeline-parallel size: stages that share the layers; at most num_layers. With ZeRO stages 0 and 1."""
    sequence: bool = key(False, COURSE)
    """Sequence parallelism: residual stream, norms, merges and history on 1/tensor of the sequence each.
    Saves activation memory at the same traffic. No effect with tensor 1."""
    timeouts: dict[str, float] = key(factory=dict, change=FREE)
    """Seconds after which a run that gets no further names the rank that is to blame, writes every rank's
    stacks into output_dir and ends: {start: 1800, step: 120, save: 1800}. start is also for validation, tasks
    and diagnostics. Without step it is learned: ten times the longest step, at least 120 (for a rank that
    waits for data, at least 1.2 data.timeout)."""

    @property
    def resolved_timeouts(self) -> Timeouts:
        """The bounds, those not given as by default.

        Raises:
            ConfigError: ``timeouts`` is no such object.
        """
        return read_timeouts(self.timeouts)


@dataclass
class DataConfig:
    """Corpora and how samples are cut from them."""

    prefix: str = key("", FREE)
    """Path of the corpus without suffix, as tools/preprocess_data.py names it: a .shards list or a bare pair
    .bin/.idx. Or its URL, for fsspec: s3://bucket/corpus."""
    blend: dict[str, float] = key(factory=dict, change=ORDER)
    """Several corpora with weights, {prefix: weight}, instead of data.prefix. Samples are dealt in exactly
    these proportions, whose sum may be anything."""
    validation_prefix: str = key("", ORDER)
    """A corpus to validate on as a whole. All documents of the others train then, and data.split has no
    effect."""
    tokenizer: str = key("", FREE)
    """SentencePiece .model or Hugging Face tokenizer.json the corpora were made with."""
    text_follows: Literal["eod", "bos", "nothing"] = key("eod", FREE)
    """What stands before the first token of a text that is generated or evaluated: the end-of-document token,
    as between the documents of a corpus here; or, for a model that was trained elsewhere and is not trained
    on, what its tokenizer puts there (tools/convert_checkpoint.py records it). Without effect on training."""
    sequence_length: int = key(2048, ORDER, POSITIVE)
    """Tokens T per sample; the model sees T and predicts T (a window of T + 1)."""
    documents: Literal["ignore", "reset", "pack"] = key("ignore", ORDER)
    """Samples and borders of documents. ignore: windows of the stream, attention crosses borders. reset: the
    same windows, attention and positions start anew at each document. pack: the same, and documents are
    packed into samples instead of cut by them."""
    split: list[float] = key(factory=lambda: [0.98, 0.02, 0.0], change=ORDER)
    """Shares of documents for train, validation, test; must sum to 1. Nothing reads a test share."""
    skip_steps: list[int | list[int]] = key(factory=list, change=ORDER)
    """Steps, as numbers or [first, last], whose samples are left out: nothing is computed in them, while the
    step's number, the learning rate and the place in the data go on. May be changed for steps ahead."""
    num_workers: int = key(1, FREE, NOT_NEGATIVE)
    """Threads per rank that read ahead; 0 reads in the training thread."""
    timeout: float = key(300.0, FREE, POSITIVE)
    """Seconds to wait for a reading thread before the run is given up: a file system that hangs."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each corpus, by prefix; data.prefix alone is a blend of one."""
        return self.blend or {self.prefix: 1.0}

    @property
    def skipped(self) -> frozenset[int]:
        """The numbers of all steps in skip_steps."""
        ranges = [each if isinstance(each, list) else [each, each] for each in self.skip_steps]
        return frozenset(step for first, last in ranges for step in range(first, last + 1))


@dataclass
class TrainingConfig:
    """The loop: steps, batches, precision."""

    steps: int = key(1000, COURSE, POSITIVE)
    """Optimizer steps of the whole run."""
    global_batch_size: int = key(128, COURSE, POSITIVE)
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: int = key(8, COURSE, POSITIVE)
    """Sequences per forward pass on one rank."""
    precision: Literal["fp32", "bf16", "fp16"] = key("bf16", COURSE)
    """Arithmetic of the layers; master weights, merges' accumulation and the loss are fp32 in all. In fp16
    the loss is scaled as the DeepSpeed JSON's section fp16 says (docs/performance.md)."""
    fp8: Literal["off", "tensorwise", "rowwise"] = key("off", COURSE)
    """Linear maps of the layers in fp8, of bf16 inputs, weights and gradients, with a scale for each tensor
    or row; head, embedding and attention stay bf16 (docs/performance.md)."""
    recompute: Literal["off", "layer", "evaluation"] = key("off", COURSE)
    """Activation recomputation: off, once per layer (all its iterations), or per F evaluation."""
    compile: Literal["off", "layer"] = key("off", COURSE)
    """layer: torch.compile runs F, one graph for all layers and evaluations; the first step takes a minute
    more, once (what was compiled is kept in output_dir/compiled, or in TORCHINDUCTOR_CACHE_DIR)."""
    seed: int = key(1234, ORDER, NOT_NEGATIVE)
    """Seed of initial weights and of the sample order."""
    initial_weights: str = key("", FUNCTION)
    """A model of the same shape to start from instead of random weights, whatever its solver: a model folder
    of tools/convert_checkpoint.py in either form, a run's output_dir or one of its checkpoints, or a
    Hugging Face folder of a LLaMA, Mistral, Qwen2 or Qwen3 (model.from takes over its shape). What the solver
    has more starts at its initial values. Without effect once there is a checkpoint to resume."""
    stop_after: int | None = key(None, FREE, POSITIVE)
    """Stop (with a checkpoint) once this step is reached, leaving schedules as they are; for tests and
    time limits. null: run to the end."""
    stop_signals: list[Literal["USR1", "TERM"]] = key(factory=lambda: ["USR1", "TERM"], change=FREE)
    """Signals, of SIGUSR1 and SIGTERM, to any process of the run after which it finishes the step, saves and
    exits with status 75; one that is not named ends the process at once. Ctrl-C is always heard."""
    max_wall_time: str | float | None = key(None, FREE, POSITIVE)
    """Seconds, or a text H:MM:SS, from the start of the process, after which it does the same: a job's limit
    less the time of a step and a save. null: no limit."""

    @property
    def wall_seconds(self) -> float | None:
        """``max_wall_time`` in seconds.

        Raises:
            ConfigError: it is no time.
        """
        if not isinstance(self.max_wall_time, str):
            return self.max_wall_time
        parts = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", self.max_wall_time.strip())
        hours, minutes, seconds = (int(part) for part in parts.groups()) if parts else (0, 0, 0)
        total = 3600 * hours + 60 * minutes + seconds
        if not total:
            raise ConfigError(
                f"training.max_wall_time is '{self.max_wall_time}', but must be seconds or H:MM:SS, more "
                "than 0"
            )
        return total


@dataclass
class EvaluationConfig:
    """Validation loss and evaluation tasks during training."""

    interval: int = key(200, FREE, NOT_NEGATIVE)
    """Steps between validations; 0: only before the first and after the last step."""
    samples: int = key(256, COURSE, POSITIVE)
    """Validation sequences read each time, always the same ones, which a rule spreads over the whole split
    (docs/data.md); fewer if it is smaller."""
    tasks: list[str] = key(factory=list, change=FREE)
    """Tasks of lm-evaluation-harness to run while training, e.g. [lambada_openai, piqa]; 'paper' stands for
    the paper's seven. Texts are cut to data.sequence_length. Empty: none."""
    tasks_interval: int = key(1000, FREE, NOT_NEGATIVE)
    """Steps between runs of the tasks; 0: only after the last step."""
    tasks_limit: int | None = key(100, COURSE, POSITIVE)
    """Rows of each task, the first ones; null: all."""
    tasks_data_dir: str = key("", FREE)
    """Folder with the tasks' data, NAME.jsonl each (docs/evaluation.md); empty: from the Hugging Face hub."""
    tasks_include_path: str = key("", FREE)
    """Folder with definitions of tasks of your own, as lm-evaluation-harness reads them; empty: none."""


@dataclass
class CheckpointConfig:
    """What is saved, and when."""

    interval: int = key(500, FREE, NOT_NEGATIVE)
    """Steps between checkpoints; 0: only the last step."""
    keep: int = key(2, FREE, NOT_NEGATIVE)
    """Newest checkpoints kept; older ones are removed after a newer one is complete. 0 keeps all. Pinned ones
    (tools/checkpoints.py) stay, and the one that a start has gone on from stays until the next start."""
    keep_every: int = key(0, FREE, NOT_NEGATIVE)
    """Checkpoints at multiples of so many steps are kept for good; 0: none."""
    mirror: str = key("", FREE)
    """Folder of another file system, as fsspec names it (s3://bucket/run, with s3fs installed; file:///…), to
    which every checkpoint is copied once it is in force; before that none is removed here. Empty: none."""
    mode: Literal["auto", "async", "sync"] = key("auto", FREE)
    """async: a checkpoint is copied to the host's memory and written while training goes on; it counts once
    all of it is on disk. sync: training waits. auto: async where the copies take at most half of every host's
    free memory."""
    resume: bool = key(True, FREE)
    """Continue from the newest checkpoint in output_dir; false refuses to write over one."""


@dataclass
class LoggingConfig:
    """Console and TensorBoard."""

    interval: int = key(10, FREE, POSITIVE)
    """Steps between console lines and TensorBoard points."""
    tensorboard: bool = key(True, FREE)
    """Write TensorBoard events to output_dir/tensorboard."""
    solver_interval: int = key(200, FREE, NOT_NEGATIVE)
    """Steps between solver diagnostics (relative residual per layer and iteration); 0 turns them off."""
    peak_tflops: float | None = key(None, FREE, POSITIVE)
    """Peak dense TFLOP/s of one device at the run's precision, the base of MFU and HFU.
    null: known GPUs from a table, CPUs from a matmul timed at start-up."""
    profile: list[int] | None = key(None, FREE)
    """[first, last] step to profile: a trace of every rank and a table of a step's phases in
    output_dir/profile. Such steps are slower, and their traces large: a few say enough."""


@dataclass
class GuardsConfig:
    """What happens at numbers that training should not go on from."""

    nonfinite: Literal["stop", "skip"] = key("stop", COURSE)
    """At a loss or gradient that is no number: stop the run, or leave the step out. Either way it moves
    nothing."""
    spike: Literal["off", "skip", "rewind"] = key("off", COURSE)
    """At a loss or gradient norm far above those of the steps before: off trains on it, skip leaves the step
    out, rewind goes back to the newest checkpoint and leaves out the steps that led there, at most
    guards.window of them."""
    window: int = key(100, COURSE, Range("be at least 2", least=2))
    """Steps over which mean and deviation of loss and gradient norm are taken; before that many there is no
    spike."""
    deviations: float = key(6.0, COURSE, POSITIVE)
    """How many standard deviations above the mean a spike begins."""
    max_skips: int = key(10, COURSE, POSITIVE)
    """The run ends after more than that many steps in a row that guards left out, or as many returns to one
    checkpoint."""
    replicas: int = key(0, FREE, NOT_NEGATIVE)
    """Steps between comparisons of the parameters that several ranks hold, by checksums: a rank that holds
    others is named, and the run ends. 0: never. Not with ZeRO-3, where every rank holds a part."""


@dataclass
class OpsConfig:
    """Kernels."""

    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = key("auto", COURSE)
    """Backend of merge_norm: 'cpu' and 'cuda' are the compiled extension, 'reference' is plain torch. 'auto'
    takes the extension where it fits and says at start-up why not; any other value is an error where it can't
    run."""
    history_gradient: Literal["transposed", "per_edge"] = key("transposed", COURSE)
    """How kept increments get the gradients of the merges that read them: 'transposed' computes each
    increment's in one pass when all are known; 'per_edge' is plain autograd, several times the traffic."""


@dataclass
class GuidanceConfig:
    """Influence-guided training: each layer's own corrector iterations, measured as training goes on. Only
    for solver.kind iiet."""

    interval: int = key(0, FUNCTION, NOT_NEGATIVE)
    """Steps between measurements of the influence of every iteration, after each of which the layers get new
    iteration counts; 0: off, every layer has solver.iterations."""
    budget: float = key(0.5, FUNCTION, BELOW_ONE)
    """Share of the evaluations of F that full iterations (solver.iterations in every layer) would take:
    what the layers may use together. Below 1, and at least one evaluation a layer."""
    start: float = key(0.1, FUNCTION, BELOW_ONE)
    """Fraction of the steps before the first measurement. Until then iterations are even over the layers,
    within the budget."""
    samples: int = key(32, FUNCTION, POSITIVE)
    """Validation sequences measured on (the same ones every time); fewer if the split is smaller."""
    decay: float = key(0.5, FUNCTION, BELOW_ONE)
    """Weight of what was measured before in the running mean of influence that a plan is made from; 0: only
    the newest measurement counts."""
    inertia: float = key(0.5, FUNCTION, NOT_NEGATIVE)
    """How much larger than the influence of an iteration in force, as a share, that of another must be to
    take its place: equals would take turns with every measurement, and the layers never settle."""


@dataclass
class DistillationConfig:
    """Iteration influence-aware distillation (IIAD): a model with fewer iterations learns from one with all
    of them, whose weights it starts from. The loss is CE + alpha · MSE + beta · KL."""

    teacher: str = key("", FUNCTION)
    """Folder of the teacher: a run's output_dir, one of its checkpoints, or a model folder of
    tools/convert_checkpoint.py; of this run's shape, with a solver and iterations of its own. Empty: no
    distillation."""
    alpha: float = key(0.01, COURSE, NOT_NEGATIVE)
    """Weight of the mean squared difference between the outputs of each teacher's and student's layer. It is
    not relative to the stream's size: choose it so that the term is a small part of the loss."""
    beta: float = key(1.0, COURSE, NOT_NEGATIVE)
    """Weight of the Kullback-Leibler divergence of the student's prediction from the teacher's."""
    temperature: float = key(1.0, COURSE, POSITIVE)
    """What both models' logits are divided by in the divergence, which is multiplied by its square."""


@dataclass
class DebugConfig:
    """For trying a run out."""

    inject: list[str] = key(factory=list, change=FREE)
    """Faults that the run brings upon itself, KIND@step=N,rank=R each: kill, stop (SIGSTOP), raise, nan (a
    gradient) and drift (a weight) before that step; enospc, slow_disk (seconds=S) and flip (a bit, once it is
    in force) at the checkpoint of that step; not in what torchrun restarts. Empty: none."""


@dataclass
class RunConfig:
    """Everything that defines one pretraining run."""

    output_dir: str = key("runs/default", FREE)
    """Folder of checkpoints, TensorBoard events and the resolved configuration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the Transformer."""
    solver: SolverConfig = field(default_factory=SOLVERS.default)
    """How its layers are integrated; its keys depend on its kind."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""
    data: DataConfig = field(default_factory=DataConfig)
    """Token shards and samples."""
    optimizer: OptimizerConfig = field(default_factory=OPTIMIZERS.default)
    """How parameters move; its keys depend on its kind."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, batches, precision."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation in the loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console and TensorBoard."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """Numbers that training should not go on from."""
    ops: OpsConfig = field(default_factory=OpsConfig)
    """Kernel choice."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Influence-guided iteration counts."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Learning from a teacher."""
    debug: DebugConfig = field(default_factory=DebugConfig)
    """Injected faults."""


KINDS: dict[str, Kinds[Any]] = {kinds.section: kinds for kinds in (SOLVERS, OPTIMIZERS)}
"""The sections whose keys depend on their kind, by name."""


def iterations_per_layer(config: RunConfig) -> list[int]:
    """Corrector iterations r_n of every layer at the end of training; zeros for kinds without a corrector."""
    return config.solver.iterations_per_layer(config.model.num_layers)


def evaluations_in_budget(config: RunConfig) -> int:
    """Evaluations of F that guidance lets all layers use together; ``solver.iterations`` is a number."""
    assert isinstance(config.solver, Iterating)
    assert isinstance(config.solver.iterations, int)
    full = config.model.num_layers * config.solver.evaluations(config.solver.iterations)
    return int(config.guidance.budget * full + 1e-9)  # 0.7 · 10 is 7, whatever fp64 says
