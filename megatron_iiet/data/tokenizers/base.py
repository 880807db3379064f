"""What every tokenizer shares: long texts in parts, packed batches, and the promise that text stays text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, AnyStr

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

# SentencePiece needs about 44 bytes of memory per byte of one string; longer texts are encoded in parts.
MAX_PART_CHARACTERS = 1_000_000

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<eod>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")


class NotSupportedError(Exception):
    """Why gigatoken cannot stand in for a tokenizer, as the end of a sentence."""


class Tokenizer(ABC):
    """A tokenizer of text alone: control ids are added by callers; a literal ``</s>`` stays text."""

    path: Path
    name: str  # for people: "sentencepiece", "gigatoken (checked against sentencepiece)", ...
    vocab_size: int  # one more than the largest id
    eod_id: int  # id put behind every document
    bos_id: int | None  # id put in front of a prompt; None where the tokenizer has none
    control_ids: frozenset[int]  # ids that no text may yield, eod_id among them
    prefix_id: int | None = None  # id of the space that the model puts before every text, where it does

    @property
    def spelled_out(self) -> tuple[str, ...]:
        """Control pieces and symbols as a text could spell them."""
        return ()

    @abstractmethod
    def _encode_short(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """Ids of texts of at most :data:`MAX_PART_CHARACTERS` characters, 32-bit integers [tokens] each."""

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of ids [tokens]; control ids give nothing."""

    def gigatoken_definition(self) -> tuple[bytes, tuple[str, ...]]:
        """A tokenizer.json that gigatoken encodes alike, for texts without the symbols given with it.

        Raises:
            NotSupportedError: there is none; the message says why.
        """
        raise NotSupportedError("it has no such form")

    def encode(self, text: str) -> TokenIds:
        """Ids of ``text``, int32 [tokens], without control ids.

        Raises:
            ValueError: the text holds a lone surrogate.
            RuntimeError: a control id came of it, against all precautions.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """:meth:`encode` of every text, in the calling thread."""
        if any(len(text) > MAX_PART_CHARACTERS for text in texts):
            return [self.encode_parts(split_text(text)) for text in texts]
        return [ids.view(np.int32) for ids in self._encode_checked(list(texts))]

    def encode_parts(self, parts: Iterable[str]) -> TokenIds:
        """:meth:`encode` of one text given in the parts that :func:`split_text` cuts it into."""
        joined = bytearray()  # grows in place: a giant text's ids are never held twice
        for ids in self.encode_pieces(parts):
            joined += ids.tobytes()
        return np.frombuffer(joined, np.int32)

    def encode_pieces(self, parts: Iterable[str]) -> Iterator[TokenIds]:
        """The ids of :meth:`encode_parts` part by part."""
        is_first = True
        for part in parts:
            ids = self._encode_checked([part])[0].view(np.int32)
            if ids.size:
                # Inside a document the space that a model puts before every text was not written.
                yield ids if is_first or ids[0] != self.prefix_id else ids[1:]
                is_first = False

    def _encode_checked(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        try:
            documents = self._encode_short(texts)
        except Exception:
            _refuse_surrogates(texts)
            raise
        for ids in documents:
            self._refuse_control_ids(ids)
        return documents

    @cached_property
    def _control_range(self) -> tuple[int, int]:
        return min(self.control_ids), max(self.control_ids)

    def _refuse_control_ids(self, ids: npt.NDArray[Any]) -> None:
        """A second lock on the door; the first is how each kind of tokenizer is set up."""
        if not ids.size:
            return
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise RuntimeError(
                f"{self.name} made id {lowest if lowest < 0 else highest} of a text, but {self.path} has "
                f"{self.vocab_size} ids; this is a defect of the tokenizer library, please report it."
            )
        # Control ids stand at one end of nearly every vocabulary: two comparisons settle it.
        first, last = self._control_range
        if highest < first or last < lowest:
            return
        leaked = np.intersect1d(ids, [*self.control_ids])
        if leaked.size:
            raise RuntimeError(
                f"{self.name} made control id {leaked[0]} of plain text with {self.path}: a document "
                "would end or begin inside another; use another tokenizer file."
            )


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


def possible_merges(order: Mapping[AnyStr, float]) -> list[tuple[AnyStr, AnyStr]]:
    """Every way to put a token together from two others: what is lower in ``order`` first, leftmost first."""
    merges = [
        (place, -cut, cut - len(token), token)
        for token, place in order.items()
        for cut in range(1, len(token))
        if token[:cut] in order and token[cut:] in order
    ]
    merges.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in merges]


def lone_surrogate(text: str) -> int | None:
    """Place of the first half of a surrogate pair without its other half; such a text has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        if (at := lone_surrogate(text)) is not None:
            raise ValueError(
                f"A text has the lone surrogate {text[at]!r} at character {at} "
                f"({text[max(0, at - 20) : at + 20]!r}), which stands for nothing; "
                "repair or leave out that document."
            )


def token_before(tokenizer: Tokenizer, text_follows: str) -> int | None:
    """The id that ``data.text_follows`` puts before a text.

    Raises:
        ValueError: the tokenizer has none.
    """
    if text_follows == "bos" and tokenizer.bos_id is None:
        raise ValueError(
            f"data.text_follows is 'bos', but the tokenizer {tokenizer.path} has no such token; give 'eod'"
        )
    return {"eod": tokenizer.eod_id, "bos": tokenizer.bos_id}.get(text_follows)
