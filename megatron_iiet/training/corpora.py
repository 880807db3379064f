"""The corpora of a run: opened, checked against each other and the tokenizer, and described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iiet.config import ConfigError, RunConfig
from megatron_iiet.config.schema import DataConfig
from megatron_iiet.data.corpora.identity import corpus_identity
from megatron_iiet.data.corpora.streams import TokenStream
from megatron_iiet.data.loader.blend import Blend
from megatron_iiet.data.loader.samples import Samples, Splits, build_splits
from megatron_iiet.data.loader.validation import FIRST, ValidationBatches, spread_over
from megatron_iiet.data.tokenizers.loading import load_tokenizer, tokenizer_digest

_LOOKED_AT = 32
"""Documents of a corpus that does not say how they end."""
MANY_EPOCHS = 4
"""Times a corpus may be read before repetition clearly costs quality (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Corpora:
    """What a run trains and validates on."""

    prefixes: list[str]
    """Of the corpora trained on, in the order of data.blend."""
    weights: list[float]
    """Their weights."""
    train: list[Samples]
    """Their samples for training."""
    validation: list[Samples]
    """What is validated on; empty if nothing."""
    validation_weights: list[float]
    """Weights of those."""

    @property
    def names(self) -> list[str]:
        """Of the corpora, for metrics: the last parts of their prefixes where those tell them apart."""
        short = [Path(prefix).name for prefix in self.prefixes]
        return short if len(set(short)) == len(short) else self.prefixes


def open_corpora(data: DataConfig, vocab_size: int) -> Corpora:
    """Open what the ``data`` section names, for a model that knows ``vocab_size`` ids.

    Raises:
        ValueError: a corpus is unreadable, too small for its share, or was made with another tokenizer.
    """

    def opened(prefix: str, split: list[float]) -> Splits:
        # In a blend the other corpora make up for what one lacks.
        may_lack = ("validation",) if len(data.weights) > 1 and split == data.split else ()
        length, kind = data.sequence_length, data.documents
        return build_splits(prefix, length, split, kind, vocab_size=vocab_size, may_lack=may_lack)

    split = [1.0, 0.0, 0.0] if data.validation_prefix else data.split
    splits = [opened(prefix, split) for prefix in data.weights]
    weights = list(data.weights.values())
    train, validation = [part.train for part in splits], [part.validation for part in splits]
    validation_weights = weights
    if data.validation_prefix:
        validation, validation_weights = [opened(data.validation_prefix, [0.0, 1.0, 0.0]).validation], [1.0]
    elif not data.split[1]:
        validation, validation_weights = [], []
    elif not any(map(len, validation)):
        raise ValueError(
            f"No corpus of data.blend has a window of {data.sequence_length + 1} tokens in its validation "
            f"split; data.split is {data.split}: give validation a larger share (or 0), or use more text."
        )
    Blend(weights)  # refuses what cannot be blended before anything expensive is built
    check_tokenizers([*train, *validation], data.tokenizer)
    return Corpora(list(data.weights), weights, train, validation, validation_weights)


def contents_of(data: DataConfig, corpora: Corpora) -> dict[str, Any]:
    """What the corpora and the tokenizer of a run hold, wherever they lie, as plain data for its checkpoints.

    Raises:
        ValueError: a file is missing or damaged.
    """
    return {
        "train": [corpus_identity(part.stream) for part in corpora.train],
        "validation": corpus_identity(corpora.validation[0].stream) if data.validation_prefix else None,
        "tokenizer": tokenizer_digest(data.tokenizer),
    }


def check_tokenizers(samples: Sequence[Samples], tokenizer: str) -> None:
    """Refuse corpora that were made with another tokenizer, as far as they say."""
    digest = tokenizer_digest(tokenizer)
    for part in samples:
        made_with = getattr(part.stream, "info", {}).get("tokenizer", {})
        if made_with.get("digest", digest) != digest:
            raise ConfigError(
                f"the corpus {part.stream.prefix} was made with the tokenizer {made_with.get('file')} "
                f"(digest {made_with['digest']}), but data.tokenizer is {tokenizer} (digest {digest}); give "
                "the tokenizer that made the corpus, or make it again with this one"
            )


def describe_corpora(config: RunConfig, corpora: Corpora) -> str:
    """A line for each corpus: its share, size, and how often the run reads it; and what validates."""
    length = config.data.sequence_length
    total = config.training.steps * config.training.global_batch_size
    shares, counts = Blend(corpora.weights).shares, Blend(corpora.weights).counts(total)
    kind = {"ignore": "windows", "reset": "windows, each document by itself", "pack": "packed samples"}
    lines = [f"data: {kind[config.data.documents]} of {length} tokens; {config.training.steps} steps read"]
    for prefix, share, count, part in zip(corpora.prefixes, shares, counts, corpora.train, strict=True):
        epochs = count / len(part)
        lines.append(f"  {prefix}: {len(part):,} samples, {epochs:.3g} times ({share:.4g} of the batches)")
        if epochs > MANY_EPOCHS:
            lines.append(
                f"  warning: {prefix} is read {epochs:.1f} times; more than {MANY_EPOCHS} cost quality: "
                "lower its weight in data.blend, train fewer steps, or add text"
            )
    if config.data.validation_prefix:
        lines.append("  all documents of these train: data.split has no effect beside data.validation_prefix")
    return "\n".join(lines)


def doubts_about(data: DataConfig, corpora: Corpora) -> list[str]:
    """Sentences: which corpora do not name their tokenizer, and in which nobody sees where a document ends.

    Raises:
        ValueError: a corpus is damaged.
    """
    told = []
    streams = {part.stream.prefix: part.stream for part in (*corpora.train, *corpora.validation)}
    for prefix, stream in streams.items():
        info = getattr(stream, "info", {})
        if not info.get("tokenizer", {}).get("digest"):
            told.append(
                f"{prefix} does not name its tokenizer; that {data.tokenizer} made it is believed, and its "
                "ids are checked against model.vocab_size alone, as they are read"
            )
        lack = _lacks_ends(stream, info.get("append_eod"), data)
        if lack:
            told.append(
                f"{prefix} has documents without an end-of-document token ({lack}), and with data.documents "
                "ignore nothing else parts them; make it with --append-eod, or set data.documents to reset "
                "or pack"
            )
    return told


def _lacks_ends(stream: TokenStream, appended: bool | None, data: DataConfig) -> str:
    """How it is known that documents go on without a sign; "" if they do not, by what the list says or, if
    it does not, as some of them show. Empty ones, which Megatron writes, have no end."""
    if data.documents != "ignore" or appended:
        return ""
    if appended is not None:
        return "its list says so"
    eod = load_tokenizer(data.tokenizer).eod_id
    numbers = spread_over(stream.num_documents, min(_LOOKED_AT, stream.num_documents)).tolist()
    bounds = [(stream.document_start(number), stream.document_start(number + 1)) for number in numbers]
    last = [int(stream.read(stop - 1, stop)[0]) for start, stop in bounds if stop > start]
    without = sum(token != eod for token in last)
    return f"{without} of {len(last)} looked at do not end with the id {eod}" if without else ""


def describe_validation(batches: ValidationBatches, wanted: int) -> str:
    """What is validated on: which windows, and how many of each corpus; and where there are too few."""
    parts = [
        f"{count:,} of {len(source):,} of {source.stream.prefix}"
        for source, count in zip(batches.sources, batches.counts, strict=True)
    ]
    lines = [f"validation: {batches.samples:,} windows, rule {batches.rule}: {', '.join(parts)}"]
    if batches.rule == FIRST:
        lines.append(
            "  the first ones, as this run began before there was another rule; a new run spreads them over "
            "the split"
        )
    if batches.samples < wanted:
        lines.append(
            f"  warning: evaluation.samples asks for {wanted:,}; give validation a larger share in "
            "data.split, or a data.validation_prefix, or ask for fewer"
        )
    return "\n".join(lines)
