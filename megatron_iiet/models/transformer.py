"""The whole model: embedding, a stack of integrated layers, final norm, head."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_iiet.config import RunConfig
from megatron_iiet.models.attention_layout import AttentionLayout, Rotary, attention_layout
from megatron_iiet.models.history import History
from megatron_iiet.models.layer import DecoderLayer, KeysValues, RMSNorm
from megatron_iiet.models.solvers import Solver, build_solver
from megatron_iiet.ops import merge_norm
from megatron_iiet.ops.fp8 import Products
from megatron_iiet.parallel import TensorParallel
from megatron_iiet.parallel.head_loss import head_cross_entropy
from megatron_iiet.parallel.tensor import column_parallel, multiply_in, shard_of
from megatron_iiet.parallel.vocabulary import VocabularyEmbedding

VOCABULARY_WEIGHTS = ("embedding.weight", "head.weight")
"""Parameters with a row a token, padded to ``config.model.padded_vocab_size``."""


@dataclass
class BoundIncrement:
    """A decoder layer as the solver sees it: F with attention layout and recomputation bound."""

    layer: DecoderLayer
    layout: AttentionLayout
    recompute: bool
    keys_values: KeysValues | None = None
    """Of the step's first evaluation, where the layer keeps them."""

    def input_of(
        self, residual_BTD: Tensor, increments: Sequence[Tensor], coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        norm, backend = self.layer.input_norm, self.layer.backend
        return merge_norm(residual_BTD, increments, coefficients, norm.weight, eps=norm.eps, backend=backend)

    def __call__(self, y_BTD: Tensor, normed_BTD: Tensor | None, evaluation: int) -> Tensor:
        keys_values = self.keys_values if evaluation else None
        if self.recompute and torch.is_grad_enabled():
            evaluate = _Again(self.layer, normed_BTD)
            f_BTD, self.keys_values = checkpoint(
                evaluate, y_BTD, self.layout, keys_values, use_reentrant=False
            )
        else:
            f_BTD, self.keys_values = self.layer(y_BTD, normed_BTD, self.layout, keys_values)
        return cast(Tensor, f_BTD)


class _Again:
    """F with the normed input there is, once; again, it norms the input anew, which gives the same bits
    and is cheaper to do than to keep. Gradients take the way of the first time."""

    def __init__(self, layer: DecoderLayer, normed_BTD: Tensor | None) -> None:
        self._layer, self._normed = layer, [normed_BTD]
        self._is_normed = normed_BTD is not None

    def __call__(
        self, y_BTD: Tensor, layout: AttentionLayout, keys_values: KeysValues | None
    ) -> tuple[Tensor, KeysValues | None]:
        if self._normed:
            normed_BTD = self._normed.pop()
        elif self._is_normed:
            with torch.no_grad():
                normed_BTD = self._layer.input_norm(y_BTD)
            normed_BTD.requires_grad_()  # so that the same is kept as the first time
        else:
            normed_BTD = None
        return cast(tuple[Tensor, KeysValues | None], self._layer(y_BTD, normed_BTD, layout, keys_values))


class IntegratedLayer(nn.Module):
    """One decoder layer F (``increment``) and the solver that integrates it."""

    def __init__(self, config: RunConfig, layer: int, backend: str, parallel: TensorParallel) -> None:
        super().__init__()
        keeps_keys = config.solver.shares_first_keys
        self.increment = DecoderLayer(config.model, backend, parallel, keeps_keys=keeps_keys)
        multiply_in(self.increment, Products(config.training.fp8))
        self.solver: Solver[Any] = build_solver(config, layer, backend)
        self.recompute = config.training.recompute

    def forward(self, y_BTD: Tensor, history: History, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """``(y_{n+1}, the increment to keep)``, both [B, T, D]."""
        increment_fn = BoundIncrement(self.increment, layout, self.recompute == "evaluation")
        again = self.recompute == "layer" and torch.is_grad_enabled()
        step = partial(checkpoint, self.solver, use_reentrant=False) if again else self.solver
        return cast(tuple[Tensor, Tensor], step(y_BTD, increment_fn, history))


class Transformer(nn.Module):
    """A decoder-only language model whose layers are integrated by the configured solver; or one pipeline
    stage of it, with some of the layers.

    Parameters are named the same in every layout: ``embedding.weight``, ``layers.{n}.increment.…``,
    ``layers.{n}.solver.…``, ``norm.weight`` and, untied, ``head.weight``. The first stage has the embedding,
    the last one norm and head (tied: a copy of the embedding).
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        backend: str = "reference",
        parallel: TensorParallel | None = None,
        layers: range | None = None,
    ) -> None:
        """``parallel``: how matrices are split (default: not); ``layers``: those of a stage (default: all).

        Raises:
            ValueError: ``parallel`` does not divide heads, feed-forward or vocabulary.
        """
        super().__init__()
        model = config.model
        parallel = TensorParallel() if parallel is None else parallel
        layers = range(model.num_layers) if layers is None else layers
        self.config = config
        self.backend = backend
        self.parallel = parallel
        self.parameters_in_parts = False
        """Whether parameters are whole only while their module runs (ZeRO-3)."""
        self.loss_gradient: float | Tensor = 1.0
        """What the loss of a micro-batch will get as gradient; a tensor where a loss scale may change it."""
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.num_layers
        self.embedding_scale = model.resolved_embedding_scale
        self.embedding = self.norm = self.head = None
        if self.is_first or (self.is_last and model.tie_embeddings):
            self.embedding = VocabularyEmbedding(model.padded_vocab_size, model.hidden_size, parallel)
        self.rotary = Rotary(model)
        self.layers = nn.ModuleDict({str(n): IntegratedLayer(config, n, backend, parallel) for n in layers})
        if self.is_last:
            self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, backend)
            if not model.tie_embeddings:
                self.head = parallel.column_linear(model.hidden_size, (model.padded_vocab_size,))
        parallel.sum_replicated_gradients(self)

    @classmethod
    def on_meta(cls, config: RunConfig, backend: str = "reference") -> Transformer:
        """The whole model without memory: its counts, FLOPs and iterations."""
        with torch.device("meta"):
            return cls(config, backend=backend)

    @property
    def solvers(self) -> dict[int, Solver[Any]]:
        """The solver of every layer held here, by layer number."""
        return {int(n): cast(IntegratedLayer, layer).solver for n, layer in self.layers.items()}

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of token ids, or with targets their :meth:`loss`.

        ``positions_BT``: each token's place in its document within the sample, see
        :mod:`megatron_iiet.models.attention_layout`; default: each sample is one document.

        Raises:
            ValueError: the sequence is longer than the rotary table.
        """
        y_BTD, history = self.embed(tokens_BT)
        y_BTD = self.integrate(y_BTD, history, tokens_BT.shape[1], positions_BT)
        if targets_BT is None:
            assert self.parallel.group.size == 1, "logits are never gathered"
            return self.project(y_BTD)[..., : self.config.model.vocab_size]
        return self.loss(y_BTD, targets_BT, divisor)

    def embed(self, tokens_BT: Tensor) -> tuple[Tensor, History]:
        """y_0, [B, T, D] (T: this rank's part of the sequence), and the history it starts."""
        assert self.embedding is not None
        y_BTD = self.embedding(tokens_BT) * self.embedding_scale
        merges_embedding = any(s.merges_embedding and s.merging for s in self.solvers.values())
        return y_BTD, self.start_history([y_BTD] if merges_embedding else [])

    def start_history(self, entries: Iterable[Tensor], first: int = 0) -> History:
        """The history of one forward pass, with the entries there are before the first layer held here;
        ``first``: the number of the first of them."""
        return History(
            entries,
            first=first,
            rows=[row for solver in self.solvers.values() for row in solver.history_rows],
            backend=self.backend,
            transposed=self.config.ops.history_gradient == "transposed",
            rows_at_once=self.parameters_in_parts,
        )

    def integrate(
        self, y_BTD: Tensor, history: History, length: int, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Run the layers on y, appending to the history; length and positions are the whole sequence's."""
        layout = self.layout(length, y_BTD.dtype, positions_BT)
        return deque(self.trajectory(y_BTD, history, layout), maxlen=1).pop()

    def layout(self, length: int, dtype: torch.dtype, positions_BT: Tensor | None = None) -> AttentionLayout:
        """What :meth:`trajectory` needs to know of a micro-batch."""
        return attention_layout(self.rotary, length, dtype, positions_BT)

    def trajectory(self, y_BTD: Tensor, history: History, layout: AttentionLayout) -> Iterator[Tensor]:
        """The output y_{n+1} of every layer held here, in order, appending to the history."""
        solvers = self.solvers.values()
        # What nobody merges is not kept: its node would never run, and under recomputation that holds the
        # layer, which holds the history.
        read = max(solver.history_reads.stop for solver in solvers) if self.is_last else math.inf
        for layer in self.layers.values():
            y_BTD, increment_BTD = layer(y_BTD, history, layout)
            if cast(IntegratedLayer, layer).solver.keeps_increment:
                history.append(increment_BTD if len(history) < read else None)
            yield y_BTD

    def project(self, y_BTD: Tensor) -> Tensor:
        """Final norm and head: logits of this rank's part of the padded vocabulary, [B, T, V/size]."""
        assert self.norm is not None
        return column_parallel(self.norm(y_BTD), self.head_weight, self.parallel)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the head (tied: of the embedding), [V/size, D]."""
        head = self.embedding if self.head is None else self.head
        assert head is not None
        return head.weight

    def loss(self, y_BTD: Tensor, targets_BT: Tensor, divisor: float | Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of what norm and head make of the final stream: the mean over all targets;
        or, with a divisor, the sum over those that are not IGNORED, divided by it (fp32 scalar). Logits are
        never whole."""
        assert self.norm is not None
        count = targets_BT.numel() if divisor is None else divisor
        total = head_cross_entropy(
            self.norm(y_BTD),
            self.head_weight,
            targets_BT,
            vocab_size=self.config.model.vocab_size,
            parallel=self.parallel,
            upstream=self.gradient_of_sum(count),
            backend=self.backend,
        )
        return total / count

    def gradient_of_sum(self, count: float | Tensor) -> Tensor | None:
        """The gradient that a sum of losses will get whose mean over ``count`` is the loss; None where it
        need not be known before, which is but in fp16."""
        return self.loss_gradient / count if isinstance(self.loss_gradient, Tensor) else None

    def set_iterations(self, iterations: list[int], *, merging: bool = True) -> None:
        """Change the corrector iterations r_n of every layer from the next forward pass on.

        ``iterations`` has one number for each layer of the whole model. ``merging=False`` runs every layer as
        plain explicit Euler, whatever the counts: the first stage of two-stage training.

        Raises:
            ValueError: a count other than 0 for a solver without corrector, or not one a layer.
        """
        if len(iterations) != self.config.model.num_layers:
            raise ValueError(
                f"{len(iterations)} iteration counts for {self.config.model.num_layers} layers; "
                "give one a layer"
            )
        for n, solver in self.solvers.items():
            if iterations[n] and not solver.iterative:
                raise ValueError(
                    f"layer {n} is integrated by {type(solver).__name__}: no corrector to iterate "
                    f"{iterations[n]} times"
                )
            solver.iterations = iterations[n]
            solver.merging = merging

    @torch.no_grad()
    def initialise(
        self,
        seed: int,
        writable: Callable[[nn.Parameter], AbstractContextManager[Any]] = nullcontext,
        keep: frozenset[str] = frozenset(),
    ) -> None:
        """Draw every weight matrix from normal(0, init_std).

        Each matrix has a generator keyed by the seed and its own name and is drawn whole: initial weights
        depend neither on the solver nor on how the model is spread over processes. Rows of the vocabulary's
        padding are zero. Inside ``writable(parameter)`` a parameter must be there to write to, for engines
        that keep them in parts. Those named in ``keep`` are left as they are.
        """
        model = self.config.model
        for name, parameter in self.named_parameters():
            shard = shard_of(parameter)
            if shard is None or name in keep or name.endswith(".bias"):
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            with writable(parameter):
                shape = list(parameter.shape)
                shape[shard.dim] = sum(shard.blocks)
                values = torch.zeros(shape)
                drawn = values[: model.vocab_size] if name in VOCABULARY_WEIGHTS else values
                drawn.normal_(0.0, model.init_std, generator=generator)
                parameter.copy_(shard.take(values, self.parallel.group.size, self.parallel.group.rank))

    def forward_flops(self, length: int) -> int:
        """FLOPs of the forward pass of one sequence, iterations counted, as the IIET paper counts them."""
        return self.layer_flops(length) + self.head_flops(length)

    def layer_flops(self, length: int) -> int:
        """FLOPs of all evaluations of all layers on one sequence: E·(2(4d² + 3·d·ffn) + 4·d·T)·T, less where
        keys and values are those of the first evaluation."""
        layers = cast(Iterable[IntegratedLayer], self.layers.values())
        return sum(int(layer.increment.forward_flops(length, layer.solver.evaluations)) for layer in layers)

    def head_flops(self, length: int) -> int:
        """FLOPs of the output head on one sequence: 2·d·V·T."""
        return 2 * self.config.model.vocab_size * self.config.model.hidden_size * length

    def num_parameters(self) -> int:
        """Parameters held here, tied ones once, merge coefficients and solver norms included, the
        vocabulary's padding not."""
        model = self.config.model
        padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
        tables = sum(name in VOCABULARY_WEIGHTS for name, _ in self.named_parameters())
        return sum(p.numel() for p in self.parameters()) - tables * padding

    def num_solver_parameters(self) -> int:
        """Parameters that belong to solvers: merge coefficients and the released variant's norms."""
        return sum(p.numel() for solver in self.solvers.values() for p in solver.parameters())
