"""The tokenizer of another Hugging Face folder, handed on with its model. transformers chooses the class that
reads a folder's files by the kind of model beside them too, so the same files can give other ids."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_iiet.config.hugging_face import read_json
from megatron_iiet.data.tokenizers.hard_texts import HARD_TEXTS
from megatron_iiet.durable import write_text
from megatron_iiet.hf.chat import CHAT_TEMPLATE_FILE
from megatron_iiet.hf.folders import has_tokenizer, load_tokenizer
from megatron_iiet.hf.tokenizer import CONFIG_FILE, to_json
from megatron_iiet.storage.hugging_face.llama import TOKENIZER_FILES, tokenizer_files

# What a Hugging Face folder may say of its tokenizer besides.
_ABOUT_TOKENIZERS = ("special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE_FILE)


def files_of_source(source: Path) -> dict[str, bytes]:
    """Contents by name, as they are; those of an older form (``vocab.json``, ``merges.txt``) as transformers
    reads and writes them today. Empty if there is no tokenizer.

    Raises:
        ValueError: one of an older form cannot be loaded.
    """
    if not has_tokenizer(source):
        return {}
    if tokenizer_files(source):
        names = (*TOKENIZER_FILES, *_ABOUT_TOKENIZERS)
        return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    with tempfile.TemporaryDirectory() as name:
        load_tokenizer(source, exact=False).save_pretrained(name)
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}


def text_follows(source: Path) -> Literal["eod", "bos", "nothing"]:
    """``data.text_follows`` of the model in a folder that was not trained here: what AutoTokenizer puts
    before a text.

    Raises:
        ValueError: it puts something else there.
    """
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:  # there is none, or one that whoever copies it tells of
        return "eod"
    plain, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    places = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    before = whole[: next(places, len(whole))]
    if not before:
        return "nothing"
    if before == [tokenizer.bos_token_id]:
        return "bos"
    if before == [tokenizer.eos_token_id]:
        return "eod"
    raise ValueError(
        f"the tokenizer of {source} puts the tokens {before} before a text; supported are its bos_token, its "
        "eos_token and nothing"
    )


def keep_ids(export: Path, source: Path, vocab_size: int) -> list[str]:
    """See that AutoTokenizer reads ``export`` as it reads ``source``, from which its tokenizer came: where
    the kind of model chose the class, the folder names it. What a user must know of it."""
    try:
        theirs, ours = (load_tokenizer(folder, exact=False) for folder in (source, export))
    except ValueError as error:
        return [f"the tokenizer is copied, but cannot be used: {error}"]
    notes = []
    if len(ours) > vocab_size:
        notes.append(
            f"the tokenizer of {source} has {len(ours):,} tokens, but the model knows {vocab_size:,}: a text "
            "with one of the others cannot be read"
        )
    if _first_difference(ours, theirs) is not None:
        name = type(theirs).__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        settings = export / CONFIG_FILE
        said = read_json(settings) if settings.is_file() else {}
        write_text(settings, to_json(said | {"tokenizer_class": name}).decode())
        notes.append(f"tokenizer_class is {name} in the folder, as transformers reads {source}")
        other = _first_difference(load_tokenizer(export, exact=False), theirs)
        if other is not None:
            notes[-1] = (
                f"with transformers {metadata.version('transformers')} the folder's tokenizer gives other "
                f"ids than that of {source}, first for {other[:40]!r}"
            )
    return notes


def _first_difference(one: Any, other: Any) -> str | None:
    return next((text for text in HARD_TEXTS if one(text).input_ids != other(text).input_ids), None)
