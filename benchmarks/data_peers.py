#!/usr/bin/env python
"""The same corpus tokenized by other tools, each as documented by it; run by ``benchmarks/data.py``.

    python benchmarks/data_peers.py NAME INPUT TOKENIZER OUTPUT_FOLDER WORKERS

``sentencepiece-pool`` is the floor of every tool around SentencePiece: a pool that encodes and writes uint16,
nothing else. INPUT is a .jsonl.zst file, for datatrove a folder of them. Prints the number of tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def sentencepiece_pool(source: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """1 MB chunks of lines over a process pool, packed ids back, written in order."""
    tokens = 0
    pool = get_context("fork").Pool(workers, _load_sentencepiece, (str(tokenizer),))
    with pool, (output / "tokens.bin").open("wb") as file:
        for packed in pool.imap(_encode_lines, _chunks(source)):
            tokens += file.write(packed) // 2
    return tokens


_model: Any = None


def _load_sentencepiece(path: str) -> None:
    global _model
    from sentencepiece import SentencePieceProcessor

    _model = SentencePieceProcessor(path)


def _encode_lines(lines: bytes) -> bytes:
    import numpy as np

    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    return b"".join(np.array(ids, dtype=np.uint16).tobytes() for ids in _model.encode(texts, num_threads=1))


def _chunks(source: Path) -> Iterator[bytes]:
    import zstandard

    with source.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        rest = b""
        while block := reader.read(CHUNK_BYTES):
            whole, line_end, rest = (rest + block).rpartition(b"\n")
            if line_end:
                yield whole
        if rest:
            yield rest


def datatrove(source: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """JsonlReader into DocumentTokenizer over a folder of files, which is how it splits work."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(source), compression="zstd"),
            DocumentTokenizer(str(output / "out"), str(tokenizer), shuffle_documents=False),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(output / "logs"),
        start_method="fork",  # CPU time of the default's processes, no children of this one, gets lost
    ).run()
    return sum(path.stat().st_size for path in (output / "out").glob("*.ds")) // 2


def datasets_map(source: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """The customary load_dataset, map, save_to_disk."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer))

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in model.encode_batch_fast(rows["text"], add_special_tokens=False)]}

    cache = str(output / "cache")
    data = load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=workers, remove_columns=data.column_names)
    data.save_to_disk(str(output / "out"))
    return sum(len(ids) for batch in data.iter(1000) for ids in batch["ids"])


PEERS: dict[str, Callable[[Path, Path, Path, int], int]] = {
    "sentencepiece-pool": sentencepiece_pool,
    "datatrove": datatrove,
    "datasets.map": datasets_map,
}

if __name__ == "__main__":
    name, source, tokenizer, output, workers = sys.argv[1:]
    print(PEERS[name](Path(source), Path(tokenizer), Path(output), int(workers)))
