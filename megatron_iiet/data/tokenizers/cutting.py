"""Where a giant text may be cut such that its parts give, for certain, the ids of the whole.

Libraries need tens of bytes of memory for a byte of text, so giant texts are encoded in parts. A place is
proven in one of two ways; a tokenizer that knows neither encodes texts whole.

* :class:`BetweenPieces`: merges, be it of the whole text, make pieces of neighbouring characters. Where no
  piece of the vocabulary holds the two characters at a cut, none reaches over it, and the merges of one side
  do not depend on the other. What the model puts before every text is put before a character that no piece
  holds, and cut off again with it.
* :class:`BetweenWords`: text is cut into words by a known pattern. Its words end at the place whether or not
  something follows, and begin there whatever came before; merges stay inside words.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

SPACE = "▁"
"""How SentencePiece and its like write a space."""

_WINDOW = 1 << 16
_LEADS = "\n\t\r" + "".join(map(chr, range(1, 9)))

# A word, then a space and a word; or a line that begins with a letter, behind one line break.
_BORDER = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[!-~]\n)(?=[A-Za-z])")

_SPACES = r"\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"


def _by_letters(digits: str) -> str:
    return rf"{_CONTRACTION}|{_OTHER}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"


def _by_case(contraction: str, digits: str) -> str:
    return (
        rf"{_OTHER}{_UPPER}*{_LOWER}+{contraction}|{_OTHER}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
CL100K = _by_letters(r"\p{N}{1,3}")
QWEN = _by_letters(r"\p{N}")
O200K = _by_case(f"{_CONTRACTION}?", r"\p{N}{1,3}")
TEKKEN = _by_case("", r"\p{N}")
KNOWN_PATTERNS = frozenset({GPT2, CL100K, QWEN, O200K, TEKKEN})
"""Patterns of words for which :data:`_BORDER` holds: no word has a space or a line break before a letter
inside it, and nothing that they look ahead for changes which word ends there."""


class Cutting(ABC):
    """Finds places to cut."""

    lead: str = ""
    """Put before every part but the first; its ids are the same before any part."""

    @abstractmethod
    def last(self, text: str, start: int, stop: int) -> int:
        """The last place in (start, stop] to cut ``text``, which is longer; 0 if there is none."""


@dataclass(frozen=True)
class BetweenPieces(Cutting):
    """Between characters that stand side by side in no piece."""

    neighbours: frozenset[str]
    """Pairs of characters that do; spaces as :data:`SPACE`."""
    lead: str

    @classmethod
    def of(cls, pieces: Iterable[str], *, adds_space: bool) -> BetweenPieces | None:
        """``pieces``: all that a text may yield, but for single bytes."""
        texts = [piece.replace(" ", SPACE) for piece in pieces]
        taken = frozenset("".join(texts))
        lead = next((lead for lead in _LEADS if lead not in taken), "")
        if adds_space and not lead:
            return None
        pairs = frozenset(a + b for text in texts for a, b in pairwise(text))
        return cls(pairs, lead if adds_space else "")

    def last(self, text: str, start: int, stop: int) -> int:
        for high in range(stop, start, -_WINDOW):
            low = max(start, high - _WINDOW)
            window = text[low : high + 1].replace(" ", SPACE)
            for at in range(high - low, 0, -1):
                if window[at - 1 : at + 1] not in self.neighbours:
                    return low + at
        return 0


class BetweenWords(Cutting):
    """Between words of one of :data:`KNOWN_PATTERNS`."""

    def last(self, text: str, start: int, stop: int) -> int:
        for high in range(stop, start, -_WINDOW):
            low = max(start, high - _WINDOW)
            before = min(low, 1)  # with what a border looks back at and ahead to
            window = text[low - before : high + 2]
            places = [found.start() - before for found in _BORDER.finditer(window, before + 1)]
            if places := [place for place in places if place <= high - low]:
                return low + places[-1]
        return 0
