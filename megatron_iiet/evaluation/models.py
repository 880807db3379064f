"""Trained models as something the harness can ask: run by this package (runs, model folders, a Hugging Face
LLaMA or IIET on a grid), or by transformers, a whole model on each process (other Hugging Face folders)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.config.hugging_face import FAMILIES
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.data.loader.inputs import Inputs
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.evaluation.forward import DTYPES, ForwardModel, forward_config
from megatron_iiet.evaluation.harness import TextCodec, own_text_codec
from megatron_iiet.evaluation.scoring import Scorer, TokenScores, noting_scores, score_tokens
from megatron_iiet.hf import folders
from megatron_iiet.hf.generation import Codec, hugging_face_codec, only_below, own_codec, own_model
from megatron_iiet.ops import chosen_backend
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.serving.batch import Batch
from megatron_iiet.serving.continuation import Continuation, Order, Update
from megatron_iiet.storage import portable
from megatron_iiet.storage.hugging_face.llama import read_config
from megatron_iiet.storage.source import Source, open_model

Start = Literal["auto", "bos", "eos"]

_SPLIT = "a model that is split over processes only scores given text; run it without --parallel flags"
_OWN_FAMILIES = join_words([family.title for family in FAMILIES.values()], "and")
_OF_OTHERS = f"of Hugging Face folders only {_OWN_FAMILIES} do that here; run it with lm_eval --model hf"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs."""

    path: str
    """A run's output_dir, one of its checkpoints, a portable folder, or a Hugging Face folder."""
    step: int | None = None
    """Of a run: the checkpoint; None: the newest."""
    tokenizer: str = ""
    """A tokenizer file; empty: the model's own."""
    start: Start = "auto"
    """The token in front of a text without context. auto: bos where a Hugging Face tokenizer has one; eos for
    models trained here and their exports, whose documents follow an end-of-document token."""
    max_length: int | None = None
    """Longest input in tokens; None: the model's."""
    batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    trust_remote_code: bool = False
    """Run code that a Hugging Face folder brings."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class PreparedModel:
    """A model whose description is read and checked, not yet its weights."""

    description: str
    """What and where it is."""
    system: str
    """Its solver, for a table."""
    hidden_size: int
    num_layers: int
    codec: TextCodec
    no_generation: str
    """Why it generates no text; empty: it does."""
    load: Callable[..., OwnScorer | HuggingFaceScorer]
    """``load(context, generates=False)``; ``generates``: whether it is to generate text as well."""


def prepare_model(options: ModelOptions, world_size: int) -> PreparedModel:
    """Read and check everything but the weights; needs no process group.

    Raises:
        ValueError: (and its subclass ConfigError) no such model, a damaged one, no tokenizer, or a grid that
            fits neither the model nor the number of processes.
    """
    for name in ("batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    hugging_face = folders.is_hugging_face(options.path)
    if hugging_face and options.step is not None:
        raise ValueError(f"--step is given, but --model {options.path} is a model folder, which has no steps")
    if hugging_face and options.parallel.tensor * options.parallel.pipeline <= 1:
        return _prepare_hugging_face(options)
    return _prepare_own(options, open_model(options.path, "--model", step=options.step), world_size)


class OwnScorer(Scorer):
    """A model of this package on this process's place of the grid."""

    def __init__(self, source: Source, config: RunConfig, context: ParallelContext, batch_size: int) -> None:
        self.context = context
        self.max_length = config.data.sequence_length
        self.batch_size = batch_size
        self.multiple = context.tensor.size if context.tensor_parallel.cuts_sequence else 1
        self.model = ForwardModel(
            source, config, context, chosen_backend(context.device, tell=context.is_main)
        )

    def score(self, batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        for tokens in batches:
            tokens = tokens.to(self.context.device)
            inputs = Inputs(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, 1.0)
            with noting_scores(self.model.model) as found:
                self.model.run(inputs, with_loss=True)
            yield from found


class HuggingFaceScorer(Scorer):
    """A whole causal language model of transformers; processes are replicas."""

    def __init__(
        self,
        model: Any,
        context: ParallelContext,
        max_length: int,
        batch_size: int,
        codec: Codec | None = None,
    ) -> None:
        """``codec``: of a model that is to generate text.

        Raises:
            ValueError: it is to, but a batch would not give what it gives alone.
        """
        self.model = model.to(context.device).eval()
        self.context = context
        self.max_length = max_length
        self.batch_size = batch_size
        if codec is not None:
            self._batch = Batch(self.model, codec, places=batch_size, context=max_length)

    @torch.no_grad()
    def score(self, batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        for tokens in batches:
            tokens = tokens.to(self.context.device)
            logits_BTV = self.model(tokens[:, :-1], use_cache=False).logits
            yield score_tokens(logits_BTV, tokens[:, 1:].contiguous(), logits_BTV.shape[-1], Group())

    def continued(self, orders: Sequence[Order], tell: Callable[[Update], None]) -> list[str]:
        """What the model, loaded for it, writes behind each prompt, decoded without that; ``tell`` hears of
        all of them."""
        made = [Continuation(order, self._batch.codec, tell) for order in orders]
        # The longest prompts first: memory runs out early if at all, and prompts read together are alike.
        self._batch.run(sorted(made, key=lambda each: -len(each.order.prompt)))
        return [self._batch.codec.decode(each.tokens) for each in made]


def _prepare_own(options: ModelOptions, source: Source, world_size: int) -> PreparedModel:
    parallel, longest = options.parallel, source.config.model.max_position_embeddings
    if (options.max_length or 0) > longest:
        raise ValueError(
            f"--max-length is {options.max_length}, but the model {options.path} reads {longest} tokens at "
            f"most; give {longest} or less"
        )
    length = options.max_length or longest
    if parallel.sequence:
        length -= length % parallel.tensor
    config = forward_config(
        source.config,
        parallel,
        options.precision,
        length=length,
        micro_batch_size=1,
        world_size=world_size,
        tokenizer=options.tokenizer or portable.tokenizer_path(source.config.data.tokenizer, options.path),
    )
    follows = source.config.data.text_follows
    codec, model = _codec(options, config.data.tokenizer, config.model.vocab_size, follows), config.model

    def load(context: ParallelContext, generates: bool = False) -> OwnScorer | HuggingFaceScorer:
        if not generates:
            return OwnScorer(source, config, context, options.batch_size)
        # The same weights as an export would have them, for this package's own model has no cache.
        exported = own_model(source.config, source.weights, options.precision)
        writing = _writing_codec(options, config.data.tokenizer, follows)
        return HuggingFaceScorer(exported, context, length, options.batch_size, writing)

    return PreparedModel(
        source.description,
        source.config.solver.label,
        model.hidden_size,
        model.num_layers,
        codec,
        _SPLIT if parallel.tensor * parallel.pipeline > 1 else "",
        load,
    )


def _codec(options: ModelOptions, path: str, vocab_size: int, text_follows: str = "eod") -> TextCodec:
    """Of the tokenizer file ``path``; of a Hugging Face folder its own tokenizer's if none is given."""
    if folders.is_hugging_face(options.path) and not options.tokenizer:
        return _hugging_face_codec(options, vocab_size)
    if not path:
        raise ValueError(f"the model {options.path} names no tokenizer; give one with --tokenizer")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids, but the model {options.path} knows "
            f"{vocab_size}; give the tokenizer it was trained with"
        )
    codec = own_text_codec(tokenizer, text_follows)
    if options.start == "bos":
        if tokenizer.bos_id is None:
            raise ValueError(f"--start is bos, but the tokenizer {path} has no such token; give eos")
        return replace(codec, start_id=tokenizer.bos_id)
    return replace(codec, start_id=tokenizer.eod_id) if options.start == "eos" else codec


def _writing_codec(options: ModelOptions, path: str, text_follows: str = "eod") -> Codec:
    """As :func:`_codec`, of a model that generates text."""
    if folders.is_hugging_face(options.path) and not options.tokenizer:
        tokenizer = folders.load_tokenizer(options.path, options.trust_remote_code)
        return hugging_face_codec(tokenizer)
    return own_codec(load_tokenizer(path), text_follows)


def _prepare_hugging_face(options: ModelOptions) -> PreparedModel:
    fields = folders.read_fields(options.path)
    longest = int(fields.get("max_position_embeddings") or fields.get("n_positions") or 2048)
    length = options.max_length or longest
    codec = _codec(options, options.tokenizer, int(fields.get("vocab_size", 1 << 62)))
    system = "Transformer++" if fields.get("model_type") == "llama" else str(fields.get("model_type"))
    if fields.get("model_type") == "iiet":
        system = read_config(Path(options.path)).solver.label

    def load(context: ParallelContext, generates: bool = False) -> HuggingFaceScorer:
        model = folders.load_model(options.path, DTYPES[options.precision], options.trust_remote_code)
        writing = _writing_codec(options, options.tokenizer) if generates else None
        return HuggingFaceScorer(model, context, length, options.batch_size, writing)

    return PreparedModel(
        f"Hugging Face {options.path}",
        system,
        int(fields.get("hidden_size") or 0),
        int(fields.get("num_hidden_layers") or 0),
        codec,
        "" if fields.get("model_type") in FAMILIES else _OF_OTHERS,
        load,
    )


def _hugging_face_codec(options: ModelOptions, vocab_size: int) -> TextCodec:
    """Text as the folder's own tokenizer makes it, special tokens as it adds them."""
    tokenizer = folders.load_tokenizer(options.path, options.trust_remote_code)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = folders.follows_documents(options.path)
    wanted = {"bos": bos, "eos": eos, "auto": eos if own or bos is None else bos}[options.start]
    if wanted is None:
        lacking = "eos" if options.start == "auto" else options.start
        raise ValueError(
            f"the tokenizer of {options.path} has no {lacking} token to condition a text without "
            "context on; give another --start, or a tokenizer with --tokenizer"
        )
    encode = only_below(vocab_size, lambda text: list(tokenizer.encode(text)))
    return TextCodec(encode, wanted, wanted if eos is None else eos)
