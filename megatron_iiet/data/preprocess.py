"""Text files to token shards: read here, parse and tokenize in worker processes, write here.

Workers receive raw lines and return packed token bytes; no Python list of ids ever crosses a process
border. Results are written in input order, so the shard does not depend on the number of workers.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_iiet.data.indexed import IndexedDatasetWriter, token_dtype
from megatron_iiet.data.text import Chunk, expand_inputs, parse_chunk, read_chunks
from megatron_iiet.data.tokenizer import Tokenizer, load_tokenizer

_CHUNKS_PER_WORKER = 4  # in flight: enough to keep workers busy, little enough to keep memory flat


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make of which files."""

    inputs: Sequence[str]
    """Files or globs: .jsonl, .jsonl.gz, .jsonl.zst."""
    output_prefix: str
    """The pair of key ``text`` is OUTPUT_PREFIX_text_document.bin and .idx."""
    tokenizer_model: str
    """SentencePiece .model or Hugging Face tokenizer.json."""
    json_keys: Sequence[str] = ("text",)
    """Each key makes its own pair."""
    append_eod: bool = False
    """Put the tokenizer's end-of-document id behind every document."""
    workers: int = 1
    """Tokenizing processes; 1 works in this process."""
    chunk_bytes: int = 1 << 20
    """Text handed to a worker at a time."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class PreprocessReport:
    """What was written."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents' text."""
    empty_documents: int = 0
    """Documents left out because their text is empty."""
    files: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = f", {self.empty_documents:,} empty documents skipped" if self.empty_documents else ""
        size = sum(path.stat().st_size for path in self.files)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens from {self.text_bytes:,} bytes of text"
            f"{skipped}; wrote {size:,} bytes: {', '.join(map(str, self.files))}"
        )


@dataclass(frozen=True)
class _Packed:
    """One key of one chunk, tokenized."""

    tokens: bytes
    lengths: npt.NDArray[np.int64]
    text_bytes: int
    empty: int


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize all documents of all inputs into one shard a key.

    Empty documents are left out and counted.

    Raises:
        ValueError: a bad input, line or tokenizer, or no documents at all; nothing is left behind.
        RuntimeError: a worker process died; nothing is left behind.
    """
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; give at least 1.")
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        raise ValueError(f"--json-keys are {list(options.json_keys)}; give one or more, each once.")
    paths = expand_inputs(options.inputs)
    encoder = _ChunkEncoder(options)
    chunks = (chunk for path in paths for chunk in read_chunks(path, options.chunk_bytes))
    report = PreprocessReport()
    with ExitStack() as stack:
        writers = []
        for key in options.json_keys:
            prefix = f"{options.output_prefix}_{key}_document"
            writers.append(stack.enter_context(IndexedDatasetWriter(prefix, encoder.vocab_size)))
        bar = stack.enter_context(
            tqdm(unit="tok", unit_scale=True, desc="tokenizing", disable=not options.progress)
        )
        for results in _encode_all(encoder, chunks, options):
            for writer, packed in zip(writers, results, strict=True):
                writer.add_documents(packed.tokens, packed.lengths)
                report.documents += len(packed.lengths)
                report.text_bytes += packed.text_bytes
                report.empty_documents += packed.empty
                bar.update(len(packed.tokens) // writer.dtype.itemsize)
        for key, writer in zip(options.json_keys, writers, strict=True):
            if writer.num_documents == 0:
                raise ValueError(f"The inputs hold no documents: every text under {key!r} is empty.")
        for writer in writers:
            report.tokens += writer.num_tokens
            report.files += writer.close()
    return report


class _ChunkEncoder:
    """Chunk -> packed tokens of every key; travels to workers once, as their start-up argument."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._tokenizer: Tokenizer = load_tokenizer(options.tokenizer_model)
        self._keys = list(options.json_keys)
        self._append_eod = options.append_eod
        self.vocab_size = self._tokenizer.vocab_size

    def __call__(self, chunk: Chunk) -> list[_Packed]:
        rows = parse_chunk(chunk, self._keys)
        return [self._pack([row[column] for row in rows]) for column in range(len(self._keys))]

    def _pack(self, texts: list[str]) -> _Packed:
        encoded = self._tokenizer.encode_batch([text for text in texts if text])
        # Some normalisers leave nothing of a text of white space: that is an empty document as well.
        documents = [ids for ids in encoded if ids.size]
        if self._append_eod:
            eod = np.array([self._tokenizer.eod_id], dtype=np.int32)
            documents = [np.concatenate([ids, eod]) for ids in documents]
        joined = np.concatenate(documents) if documents else np.empty(0, dtype=np.int32)
        return _Packed(
            tokens=joined.astype(token_dtype(self.vocab_size)).tobytes(),
            lengths=np.array([ids.size for ids in documents], dtype=np.int64),
            text_bytes=sum(len(text.encode()) for text in texts),
            empty=len(texts) - len(documents),
        )


def _encode_all(
    encoder: _ChunkEncoder, chunks: Iterable[Chunk], options: PreprocessOptions
) -> Iterator[list[_Packed]]:
    """Encoded chunks in input order, a bounded number of them in flight."""
    if options.workers == 1:
        yield from map(encoder, chunks)
        return
    # Spawned, not forked: the caller may hold threads and locks.
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"), _start_worker, (encoder,))
    pending: deque[Future[list[_Packed]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= _CHUNKS_PER_WORKER * options.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "A tokenizing process died, most likely killed for memory; lower --workers and run again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encode: Callable[[Chunk], list[_Packed]]  # of a worker process, set when it starts


def _start_worker(encoder: _ChunkEncoder) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent cleans up
    Thread(target=_exit_with_parent, daemon=True).start()
    _encode = encoder


def _exit_with_parent() -> None:
    """A parent killed outright cannot stop its workers, which would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> list[_Packed]:
    return _encode(chunk)
