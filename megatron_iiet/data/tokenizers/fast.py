"""gigatoken in the place of a slower tokenizer, once it has been shown to give the same ids.

gigatoken remembers the ids of every word it meets. That makes it many times as fast as the libraries that
define the ids, and its memory would grow with the corpus: here it is started afresh when it has grown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron_iiet.data.tokenizers.base import NotSupportedError, Tokenizer, lone_surrogate
from megatron_iiet.data.tokenizers.hard_texts import hard_texts

# Of the documents given for comparison so much is used: it costs about a quarter of a second.
SAMPLE_CHARACTERS = 1_000_000

# What the memory of words may take. Loading again costs 0.06 CPU-seconds, as much as 4 MB of text.
MEMORY_LIMIT = 40 << 20
_CHARACTERS_BETWEEN_LOOKS = 1 << 18

# Every symbol is searched for in every text; with many that takes longer than encoding.
_MOST_SYMBOLS = 32


def fast_encoder(exact: Tokenizer, sample: Iterable[str]) -> FastEncoder:
    """``exact`` done by gigatoken, compared on hard texts and on the first documents of ``sample``.

    Raises:
        NotSupportedError: gigatoken is not installed, does not take this tokenizer, or gives other ids.
    """
    texts = [*hard_texts(exact), *_first(sample)]
    expected = exact.encode_batch(texts)
    try:
        definition, symbols = exact.gigatoken_definition()
        if len(symbols) > _MOST_SYMBOLS:
            raise NotSupportedError(f"it has {len(symbols)} user-defined symbols")
        fast = FastEncoder(exact, definition, symbols)
        for text, ids in zip(texts, expected, strict=True):
            if not np.array_equal(ids, fast.encode(text)):
                raise NotSupportedError(f"its ids differ for {text[:60]!r}")
    except ImportError as error:
        raise NotSupportedError(f"it cannot be imported: {error}") from None
    except BaseException as error:
        # A panic of the Rust library is no Exception.
        if isinstance(error, NotSupportedError | KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise NotSupportedError(f"it failed with {type(error).__name__}: {error}") from None
    fast.rest()
    return fast


def _first(sample: Iterable[str]) -> Iterator[str]:
    """The first :data:`SAMPLE_CHARACTERS` characters, but for texts that no tokenizer takes."""
    left = SAMPLE_CHARACTERS
    for text in sample:
        if lone_surrogate(text) is None:
            yield text[:left]
        left -= len(text)
        if left <= 0:
            return


class FastEncoder(Tokenizer):
    """gigatoken with the ids of another tokenizer, made by :func:`fast_encoder`.

    It pickles as what gigatoken loads: worker processes neither convert nor compare anything.
    """

    def __init__(self, exact: Tokenizer, definition: bytes, symbols: Sequence[str]) -> None:
        self.path = exact.path
        self.name = f"gigatoken (checked against {exact.name})"
        self.vocab_size, self.bos_id = exact.vocab_size, exact.bos_id
        self.eod_id, self.eod_token = exact.eod_id, exact.eod_token
        self.eod_named_in = exact.eod_named_in
        self.control_ids, self.cutting = exact.control_ids, exact.cutting
        self._symbols = tuple(symbols)
        self._fast = BoundedEncoder(definition)
        self._exact: Tokenizer | None = exact
        self._load_exact: Callable[[], Tokenizer] = partial(exact.__class__, exact.path)  # type: ignore[call-arg]

    @property
    def exact(self) -> Tokenizer:
        """The tokenizer that defines the ids, loaded when first asked for."""
        if self._exact is None:
            self._exact = self._load_exact()
        self._exact.max_uncut_bytes = self.max_uncut_bytes
        return self._exact

    def _encode_short(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        return [
            self.exact.encode(text)
            if any(symbol in text for symbol in self._symbols)
            else self._fast.encode(text)
            for text in texts
        ]

    def decode(self, ids: npt.ArrayLike) -> str:
        return self.exact.decode(ids)

    def rest(self) -> None:
        self._exact = None
        self._fast.unload()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_exact": None}


class BoundedEncoder:
    """gigatoken's ids for text, its memory of words forgotten when it exceeds ``limit`` bytes.

    What it remembers never changes the ids.
    """

    def __init__(self, definition: bytes, limit: int = MEMORY_LIMIT) -> None:
        self.definition = definition
        self.limit = limit
        self._encode: Callable[[str], npt.NDArray[np.uint32]] | None = None
        self._characters = 0  # since memory was last looked at
        self._base = 0

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        if self._encode is None:
            self._load()
            assert self._encode is not None
        ids = self._encode(text)
        self._characters += len(text)
        if self._characters >= _CHARACTERS_BETWEEN_LOOKS:
            self._characters = 0
            if _private_memory() - self._base > self.limit:
                self.unload()
        return ids

    def _load(self) -> None:
        import gigatoken

        self._encode = gigatoken.Tokenizer.from_json(self.definition).backend.encode
        self._base = _private_memory()
        self._characters = 0

    def unload(self) -> None:
        self._encode = None
        _return_free_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundedEncoder, (self.definition, self.limit)


def _private_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _return_free_memory() -> None:
    """The C library keeps what was freed for later; thousands of small words would never be given back."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
