"""Tokenizers by their files: SentencePiece, Hugging Face ``tokenizer.json``, GPT-2's ``vocab.json`` with
``merges.txt``, tiktoken ranks, Mistral's ``tekken.json``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_iiet.data.tokenizers.base import NotSupportedError, Tokenizer
from megatron_iiet.data.tokenizers.fast import fast_encoder
from megatron_iiet.data.tokenizers.hugging_face import (
    HuggingFaceTokenizer,
    VocabularyAndMergesTokenizer,
    declared_tokens,
    merges_file,
)
from megatron_iiet.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_iiet.data.tokenizers.tiktoken import (
    TekkenTokenizer,
    TiktokenTokenizer,
    looks_like_ranks,
    ranks_side_file,
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer of any kind, by its file.

    Raises:
        ValueError: the file is missing, unreadable, of no such kind, or has no end-of-document token.
    """
    file = Path(path)
    return _kind(file, _read(file))(file)


def load_encoder(path: str | os.PathLike[str], sample: Iterable[str] = ()) -> Tokenizer:
    """:func:`load_tokenizer` for encoding much text: through gigatoken where that is proven to be the same.

    Proven on hard texts, the vocabulary and the first million characters of ``sample``; otherwise the result
    is what :func:`load_tokenizer` gives, and its ``name`` says why. It pickles without the proof.

    Raises:
        ValueError: as :func:`load_tokenizer`.
    """
    exact = load_tokenizer(path)
    try:
        return fast_encoder(exact, sample)
    except NotSupportedError as reason:
        exact.name = f"{exact.name} (not gigatoken: {reason})"
        return exact


def check_eod_token(path: str | os.PathLike[str], token: str) -> None:
    """Refuse a tokenizer that ends documents with another token than ``token``.

    Its file alone says which, so that training, generation and exports all mean the same one.

    Raises:
        ValueError: it does, or as :func:`load_tokenizer`.
    """
    found = load_tokenizer(path)
    if found.eod_token != token:
        raise ValueError(
            f"--eod-token is {token!r}, but {path} ends documents with {found.eod_token!r}, which "
            f"{found.eod_named_in} decides for training and exports as well; name the token there "
            "(eos_token), or give another tokenizer."
        )


def tokenizer_digest(path: str | os.PathLike[str]) -> str:
    """Digest, 32 hexadecimal digits, of all that decides which ids a text gets and which id ends it.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    file = Path(path)
    contents = [_read(file)]
    kind = _kind(file, contents[0])
    declares = kind in (HuggingFaceTokenizer, VocabularyAndMergesTokenizer)
    if declares and (declared := declared_tokens(file.with_name("tokenizer_config.json"))):
        contents.append(json.dumps(declared, sort_keys=True).encode())
    if kind is TiktokenTokenizer and ranks_side_file(file).is_file():
        contents.append(_read(ranks_side_file(file)))
    elif kind is VocabularyAndMergesTokenizer and merges_file(file).is_file():
        contents.append(_read(merges_file(file)))
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        if len(contents) > 1:
            digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def kind_of_tokenizer(path: str | os.PathLike[str]) -> str:
    """What a tokenizer's file is, for people.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    file = Path(path)
    return _NAMES[_kind(file, _read(file))]


Kind = type[SentencePieceTokenizer | HuggingFaceTokenizer]
_NAMES: dict[Kind, str] = {
    SentencePieceTokenizer: "SentencePiece",
    HuggingFaceTokenizer: "tokenizer.json",
    VocabularyAndMergesTokenizer: "vocabulary and merges",
    TiktokenTokenizer: "tiktoken's ranks",
    TekkenTokenizer: "tekken.json",
}


def _kind(path: Path, content: bytes) -> Kind:
    """By content: LLaMA-3's ranks are called tokenizer.model as well."""
    if path.suffix == ".tiktoken" or looks_like_ranks(content):
        return TiktokenTokenizer
    if path.suffix != ".json" and content.lstrip()[:1] != b"{":
        return SentencePieceTokenizer
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return HuggingFaceTokenizer  # which says what is wrong with it
    if isinstance(found, dict) and isinstance(found.get("vocab"), list) and "config" in found:
        return TekkenTokenizer
    if isinstance(found, dict) and found and all(isinstance(number, int) for number in found.values()):
        return VocabularyAndMergesTokenizer
    return HuggingFaceTokenizer


def _read(path: Path) -> bytes:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is missing"
        raise ValueError(
            f"The tokenizer {path} {found}; give a SentencePiece .model, a tokenizer.json or a file of "
            "tiktoken ranks."
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"The tokenizer {path} cannot be read: {error.strerror}; make it readable."
        ) from None
