"""Flags of Megatron-LM's ``tools/preprocess_data.py`` that mean something for GPT's data: each works, or is
answered in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_iiet.config.keys import did_you_mean
from megatron_iiet.data.tokenizers.hugging_face import merges_file
from megatron_iiet.data.tokenizers.loading import kind_of_tokenizer

_TYPES = {
    "GPT2BPETokenizer": "vocabulary and merges",
    "SentencePieceTokenizer": "SentencePiece",
    "GPTSentencePieceTokenizer": "SentencePiece",
    "Llama2Tokenizer": "SentencePiece",
    "HuggingFaceTokenizer": "tokenizer.json",
    "TikTokenizer": "tekken.json",
}
"""Names of ``--tokenizer-type`` and the kind of file each reads."""
_WITHOUT_EFFECT = {
    "keep_newlines": "line breaks are always kept",
    "keep_sequential_samples": "documents stay in the order of the inputs without --shuffle",
    "log_interval": "a line of progress comes every 30 seconds, a bar on a terminal",
}
_REFUSED = {
    "split_sentences": "a GPT's samples are cut from documents, whatever their sentences; leave it out",
    "lang": "it is the language of --split-sentences, which a GPT does not need; leave it out",
    "partitions": "inputs are shared by --num-jobs and --job, or by a SLURM array; give those",
}
_SIZES = "the tokenizer's file says how many ids there are, and model.vocab_size how many a model has"
_FILES = "the tokenizer's own files decide, and no text becomes a special token"
_CHATS = "a text is encoded as it stands; there are no chats and no pictures"
_WORKERS = "a worker takes one core, whatever the text; give --workers"
_NOT_HERE = {
    **dict.fromkeys(
        ("vocab-size", "padded-vocab-size", "vocab-extra-ids", "make-vocab-size-divisible-by"), _SIZES
    ),
    **dict.fromkeys(("tokenizer-metadata", "metadata-path", "legacy-tokenizer"), _FILES),
    **dict.fromkeys(("special-tokens", "tokenizer-special-tokens", "trust-remote-code"), _FILES),
    **dict.fromkeys(("tokenizer-sentencepiece-legacy", "tokenizer-hf-use-fast"), _FILES),
    **dict.fromkeys(("tokenizer-hf-no-use-fast", "tokenizer-hf-include-special-tokens"), _FILES),
    "tokenizer-hf-no-include-special-tokens": _FILES,
    **dict.fromkeys(
        ("tiktoken-pattern", "tiktoken-num-special-tokens", "tiktoken-special-tokens"),
        "tekken.json, or a FILE.json beside tiktoken's ranks, says so",
    ),
    **dict.fromkeys(("tokenizer-prompt-format", "sft-tokenizer-prompt-format", "chat-template"), _CHATS),
    **dict.fromkeys(("image-tag-type", "force-system-message"), _CHATS),
    **dict.fromkeys(("null-tokenizer-eod-id", "null-tokenizer-pad-id"), "every tokenizer has a file"),
    **dict.fromkeys(("find-optimal-num-workers", "workers-to-check", "performance-dir"), _WORKERS),
    **dict.fromkeys(("max-documents", "chunk-size"), _WORKERS),
    "use-gigatoken": "it is used where it is proven to give the same ids",
}
"""Other flags of its tool, of this and earlier years, and why they are not here."""


def refuse_unknown(rest: Sequence[str], known: Iterable[str]) -> None:
    """Refuse what no option took of a command line.

    Args:
        known: the options.

    Raises:
        ValueError: there is something; the message answers the first.
    """
    if not rest:
        return
    flag = rest[0].partition("=")[0]
    if not flag.startswith("-"):
        raise ValueError(f"{flag!r} belongs to no option; give inputs behind --input, or see --help.")
    if why := _NOT_HERE.get(flag.lstrip("-")):
        raise ValueError(f"{flag} is Megatron-LM's and has no place here: {why}; leave it out.")
    raise ValueError(f"There is no option {flag}{did_you_mean(flag, known) or '; see --help.'}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, as a group of their own."""
    add = parser.add_argument_group("Megatron-LM's names").add_argument
    add("--vocab-file", metavar="FILE", help="GPT-2's vocab.json, in place of --tokenizer-model")
    add("--merge-file", metavar="FILE", help="its merges.txt; beside it")
    add("--tokenizer-type", metavar="TYPE", help="checked against the file, which tells by itself")
    add("--dataset-impl", metavar="mmap", help="the only kind")
    for name in ("keep_newlines", "keep_sequential_samples"):
        add(_flag(name), action="store_true", help=f"without effect: {_WITHOUT_EFFECT[name]}")
    add("--log-interval", type=int, metavar="N", help=f"without effect: {_WITHOUT_EFFECT['log_interval']}")
    add("--split-sentences", action="store_true", help="refused: GPT's data has no use for it")
    add("--lang", metavar="NAME", help="refused, as --split-sentences")
    add("--partitions", type=int, metavar="N", help="refused: --num-jobs")


def translate(values: dict[str, Any], log: Callable[[str], None]) -> None:
    """Replace Megatron's names in parsed ``values`` by ours, in place.

    Raises:
        ValueError: what is asked for is not done here, or contradicts itself; one sentence says what to do.
    """
    given = {name: values.pop(name) for name in (*_WITHOUT_EFFECT, *_REFUSED)}
    for name, why in _REFUSED.items():
        if given[name]:
            raise ValueError(f"{_flag(name)}: {why}.")
    for name, why in _WITHOUT_EFFECT.items():
        if given[name]:
            log(f"note: {_flag(name)} has no effect: {why}")
    if (kind := values.pop("dataset_impl")) not in (None, "mmap"):
        raise ValueError(f"--dataset-impl is {kind!r}; give mmap, the only kind, or leave it out.")
    vocabulary, merges = values.pop("vocab_file"), values.pop("merge_file")
    if (vocabulary is None) == (values["tokenizer_model"] is None):
        raise ValueError("Give either --tokenizer-model or --vocab-file.")
    if merges is not None:
        if vocabulary is None:
            raise ValueError("--merge-file goes with --vocab-file.")
        expected = merges_file(Path(vocabulary))
        if not (expected.exists() and Path(merges).exists() and expected.samefile(merges)):
            raise ValueError(
                f"--merge-file is {merges}, but {vocabulary} is read with {expected}; put it there."
            )
    values["tokenizer_model"] = values["tokenizer_model"] or vocabulary
    wanted = values.pop("tokenizer_type")
    if wanted is None:
        return
    if wanted not in _TYPES:
        raise ValueError(
            f"--tokenizer-type is {wanted}, which makes no data for a GPT; there are {', '.join(_TYPES)}."
        )
    found = kind_of_tokenizer(values["tokenizer_model"])
    if found != _TYPES[wanted]:
        raise ValueError(
            f"--tokenizer-type is {wanted}, which reads {_TYPES[wanted]}, but {values['tokenizer_model']} is "
            f"{found}; leave the type out, or give the other file."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
