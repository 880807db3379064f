"""What every tokenizer shares: long texts in parts, packed batches, and the promise that text stays text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, AnyStr

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.tokenizers.cutting import Cutting

TokenIds = npt.NDArray[np.int32]

MAX_PART_CHARACTERS = 250_000
"""Longer texts are encoded in parts of about so many."""
MAX_UNCUT_BYTES = 8 << 20
"""Most bytes of a part, where a text has no place to be cut at before."""
BYTES_A_BYTE = 44
"""Memory that SentencePiece needs for a byte of one text; the others need less."""

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<eod>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")


class NotSupportedError(Exception):
    """Why gigatoken cannot stand in for a tokenizer, as the end of a sentence."""


class UncuttableError(ValueError):
    """A text is too long to be encoded whole, and cannot be cut for certain."""


class Tokenizer(ABC):
    """A tokenizer of text alone: control ids are added by callers; a literal ``</s>`` stays text."""

    path: Path
    name: str  # for people: "sentencepiece", "gigatoken (checked against sentencepiece)", ...
    vocab_size: int  # one more than the largest id
    eod_id: int  # id put behind every document
    eod_token: str  # the name of that
    eod_named_in: Path  # the file that says so
    bos_id: int | None  # id put in front of a prompt; None where the tokenizer has none
    control_ids: frozenset[int]  # ids that no text may yield, eod_id among them
    cutting: Cutting | None = None  # where long texts may be cut; None: nowhere
    max_uncut_bytes = MAX_UNCUT_BYTES

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

    def rest(self) -> None:  # noqa: B027 most have nothing to give
        """Give memory back; what is needed is loaded again."""

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
            return [self.encode_parts([text]) for text in texts]
        return [ids.view(np.int32) for ids in self._encode_checked(list(texts))]

    def encode_parts(self, parts: Iterable[str]) -> TokenIds:
        """:meth:`encode` of one text given in parts, however they are cut."""
        joined = bytearray()  # grows in place: a giant text's ids are never held twice
        for ids in self.encode_pieces(parts):
            joined += ids.tobytes()
        return np.frombuffer(joined, np.int32)

    def encode_pieces(self, parts: Iterable[str]) -> Iterator[TokenIds]:
        """The ids of :meth:`encode_parts` piece by piece.

        Raises:
            UncuttableError: the text is longer than :attr:`max_uncut_bytes` without a place to cut it.
        """
        is_first, text, looked = True, "", 0
        for part in parts:
            start, text = 0, text + part
            while True:
                at, looked = self._cut(text, start, looked)
                if not at:
                    break
                yield self._encode_part(text[start:at], is_first)
                start, is_first = at, False
            text, looked = text[start:], looked - start
        if text or is_first:
            yield self._encode_part(text, is_first)

    def _cut(self, text: str, start: int, looked: int) -> tuple[int, int]:
        """Where the part that begins at ``start`` ends for certain, 0 if that is not known yet, and how far
        that was looked for; ``looked``: how far it was before."""
        end = len(text) - 2  # how a text goes on may matter
        low = max(start, looked)
        while low + MAX_PART_CHARACTERS <= end:
            high = low + MAX_PART_CHARACTERS
            if self.cutting and (at := self.cutting.last(text, low, high)):
                return at, at
            low = high
        left = len(text) - start
        if left > self.max_uncut_bytes // 4 and len(text[start:].encode()) > self.max_uncut_bytes:
            needed = BYTES_A_BYTE * self.max_uncut_bytes // 10**6
            raise UncuttableError(
                f"the text has no place for {self.max_uncut_bytes:,} bytes where {self.path} may cut it for "
                f"certain; raise --max-uncut-bytes (a text may now take {needed:,} MB of memory), or leave "
                "such texts out with --bad-rows skip."
            )
        return 0, low

    @cached_property
    def _lead_ids(self) -> TokenIds:
        lead = self.cutting.lead if self.cutting else ""
        return self._encode_checked([lead])[0].view(np.int32) if lead else np.empty(0, np.int32)

    def _encode_part(self, text: str, is_first: bool) -> TokenIds:
        if is_first or self.cutting is None:
            return self._encode_checked([text])[0].view(np.int32)
        ids = self._encode_checked([self.cutting.lead + text])[0].view(np.int32)
        lead = self._lead_ids
        if not np.array_equal(ids[: len(lead)], lead):
            raise RuntimeError(f"{self.name} with {self.path} encodes {self.cutting.lead!r} in another way.")
        return ids[len(lead) :]

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
    def _is_control(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(self.vocab_size, bool)
        table[[*self.control_ids]] = True
        return table

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
        leaked = ids[self._is_control[ids]]
        if leaked.size:
            raise RuntimeError(
                f"{self.name} made control id {leaked[0]} of plain text with {self.path}: a document "
                "would end or begin inside another; use another tokenizer file."
            )


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
