"""Tokenizers behind one small protocol: SentencePiece ``.model`` or Hugging Face ``tokenizer.json``.

Both encode text only: whatever is written in a document, also a literal ``</s>``, becomes ordinary tokens.
Control ids (begin and end of document) are added by callers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

# SentencePiece needs about 44 bytes of memory per byte of one string; longer texts are encoded in parts.
MAX_PART_CHARACTERS = 1_000_000

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<eod>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """Id put behind every document."""

    @property
    def bos_id(self) -> int | None:
        """Id put in front of a prompt; None where the tokenizer has none."""

    def encode(self, text: str) -> TokenIds:
        """Ids of ``text``, int32 [tokens], without control ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """:meth:`encode` of every text, in the calling thread."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of ids [tokens]; control ids give nothing."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a SentencePiece ``.model`` or a Hugging Face ``tokenizer.json``.

    Raises:
        ValueError: the file is missing, unreadable, of neither kind, or has no end-of-document token.
    """
    file = Path(path)
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "is missing"
        raise ValueError(
            f"The tokenizer {file} {found}; give a SentencePiece .model or a tokenizer.json file."
        )
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


class SentencePieceTokenizer:
    """A SentencePiece model; its eos ends documents."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor  # only where it is used: workers start faster

        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({error}); give a .model or tokenizer.json file."
            ) from None
        self._path = path
        self.vocab_size = int(self._model.vocab_size())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise ValueError(f"{path} has no eos piece to end documents with; train it with an eos_id.")
        bos = int(self._model.bos_id())
        self.bos_id = bos if bos >= 0 else None
        self._space_id = int(self._model.piece_to_id("▁"))

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        if any(len(text) > MAX_PART_CHARACTERS for text in texts):
            return [self._encode_parts(text) for text in texts]
        return [np.array(ids, dtype=np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def _encode_parts(self, text: str) -> TokenIds:
        parts = [np.array(self._model.encode(part), dtype=np.int32) for part in split_text(text)]
        # The model puts a space before whatever it encodes; inside a document that one was not written.
        tails = [ids[1:] if ids.size and ids[0] == self._space_id else ids for ids in parts[1:]]
        return np.concatenate([*parts[:1], *tails])

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._model.decode(np.asarray(ids).tolist()))

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._path,)


class HuggingFaceTokenizer:
    """A fast tokenizer file.

    Which token ends documents: ``eos_token`` of a ``tokenizer_config.json`` in the same folder, else the
    first token with a customary name (``<|endoftext|>``, ``</s>``, ...). The same for ``bos_token``.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._model: Any = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every parse failure
            raise ValueError(
                f"{path} is not a Hugging Face tokenizer file ({error}); give the tokenizer.json itself."
            ) from None
        self._path = path
        self._model.encode_special_tokens = True  # text never yields control ids
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        declared = _declared_tokens(path.with_name("tokenizer_config.json"))
        eod = self._special_id(declared.get("eos_token"), _EOD_NAMES)
        if eod is None:
            raise ValueError(
                f"{path} has no end-of-document token: none of {', '.join(_EOD_NAMES)} is in its vocabulary; "
                "put a tokenizer_config.json that names eos_token beside it."
            )
        self.eod_id: int = eod
        self.bos_id = self._special_id(declared.get("bos_token"), _BOS_NAMES)
        self._refuse_leaks()

    def _special_id(self, declared: str | None, names: Sequence[str]) -> int | None:
        ids = (self._model.token_to_id(name) for name in ([declared] if declared else names))
        return next((int(token_id) for token_id in ids if token_id is not None), None)

    def _refuse_leaks(self) -> None:
        """Probe that text spelling a control token does not become it, as in word-level vocabularies."""
        control_ids = {self.eod_id} | ({self.bos_id} if self.bos_id is not None else set())
        for control_id in control_ids:
            name = self._model.id_to_token(control_id)
            for text in (name, f"a{name}b", f" {name} "):
                if control_ids & set(self.encode(text).tolist()):
                    raise ValueError(
                        f"{self._path} turns the plain text {text!r} into control id {control_id}: documents "
                        "could end themselves; use a tokenizer with byte or sub-word pieces."
                    )

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        parts = [list(split_text(text)) for text in texts]
        flat = [part for text_parts in parts for part in text_parts]
        encodings = iter(self._model.encode_batch_fast(flat, add_special_tokens=False))
        joined = ([next(encodings).ids for _ in text_parts] for text_parts in parts)
        return [np.concatenate([np.array(ids, dtype=np.int32) for ids in lists]) for lists in joined]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._path,)


def split_text(text: str, limit: int = MAX_PART_CHARACTERS) -> Iterator[str]:
    """Cut ``text`` into parts of at most ``limit`` characters, before a line break where there is one.

    Texts within the limit come back whole. Tokens across a cut are the only ones that can differ from
    encoding in one piece.
    """
    start = 0
    while len(text) - start > limit:
        newline = text.rfind("\n", start + 1, start + limit)
        cut = newline if newline > 0 else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def _declared_tokens(config: Path) -> dict[str, str]:
    """eos_token and bos_token of a tokenizer_config.json, whether given as strings or as objects."""
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON ({error}); repair or remove it.") from None
    tokens = {name: content.get(name) for name in ("eos_token", "bos_token")}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
        if token
    }
