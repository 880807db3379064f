"""Joins corpora into one: copied into a single pair, or by reference in a list of the pairs that are there.

Everything is streamed, so memory does not grow with the corpora, and checked on the way: the index of every
pair before the first token is copied, digests (where the input has a shard list) while copying.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_iiet.data.corpora.indexed_writer import PairWriter, write_index
from megatron_iiet.data.corpora.making import Identity, Making, listed
from megatron_iiet.data.corpora.mmididx import (
    BLOCK_ENTRIES,
    Shard,
    bin_path,
    check_prefix,
    file_digest,
    idx_path,
    int64_block,
    new_digest,
    shards_path,
)
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.corpora.streams import IndexedDataset, OpenShard, open_corpus
from megatron_iiet.data.preprocess.ownership import claims_to
from megatron_iiet.data.stores import is_url
from megatron_iiet.durable import check_output, make_parent

_MADE_BY = "tools/merge_datasets.py"
_SUFFIXES = (".shards", ".idx", ".bin")


@dataclass
class MergeReport:
    """What a merge made; ``str()`` is the line for the user."""

    list_path: Path
    corpora: int
    notes: list[str]
    shards: int = 0
    tokens: int = 0
    documents: int = 0

    def __str__(self) -> str:
        made = (
            f"{self.list_path}: {self.tokens:,} tokens in {self.documents:,} documents, "
            f"joined from {self.corpora:,} corpora ({self.shards:,} shards)"
        )
        return "\n".join([made, *(f"note: {note}" for note in self.notes)])


def merge(
    inputs: Sequence[str], output_prefix: str, by_reference: bool = False, overwrite: bool = False
) -> MergeReport:
    """Join corpora into one; a bar on a terminal shows how far the copying is.

    Args:
        inputs: prefixes of corpora (pairs or shard lists) or globs of prefixes; joined in this order.
        output_prefix: prefix of the joined corpus.
        by_reference: write a list of the inputs' pairs and copy no token.
        overwrite: replace a corpus of that prefix: the list, and the pair that it names.

    Raises:
        ValueError: an input is missing or damaged, inputs have different token types or tokenizers, one is
            given twice, or the output is there already and may not be replaced. Nothing is left behind.
        OSError: the disk is full, or the like. Nothing is left behind.
    """
    prefixes = expand_corpora(inputs)
    making, old = _check_output(output_prefix, overwrite, prefixes)
    dtype, info, notes = _common(prefixes)
    report = MergeReport(shards_path(output_prefix), len(prefixes), notes)
    _check_pairs(output_prefix, prefixes, report)
    make_parent(Path(output_prefix))
    pair = [idx_path(output_prefix), bin_path(output_prefix)]
    making.note(shards_path(output_prefix), old)  # what a merge that is killed leaves without its list
    try:
        shards = (
            _refer(output_prefix, prefixes)
            if by_reference
            else [_copy(output_prefix, prefixes, dtype, report, making)]
        )
        try:
            write_shards(output_prefix, shards, dtype, info)
        except BaseException:
            if not by_reference:  # without its list the pair does not stay
                for file in pair:
                    file.unlink(missing_ok=True)
            raise
        if by_reference:  # the pair of that name is no part of the new corpus
            for file in pair:
                making.remove(file)
    finally:
        making.clear()
    return report


def expand_corpora(patterns: Sequence[str]) -> list[str]:
    """Prefixes of corpora in the order given, those of a glob sorted; suffixes may be left on.

    Raises:
        ValueError: a glob matches nothing, or a prefix is given twice.
    """
    prefixes = [prefix for pattern in patterns for prefix in _expand(pattern)]
    seen = set()
    for prefix in prefixes:
        if _place(prefix) in seen:
            raise ValueError(
                f"{prefix} is given twice; give each corpus once (data.blend repeats and weighs)."
            )
        seen.add(_place(prefix))
    return prefixes


def _expand(pattern: str) -> list[str]:
    suffix = next((suffix for suffix in _SUFFIXES if pattern.endswith(suffix)), "")
    stem = pattern.removesuffix(suffix)
    if is_url(stem) or not glob.has_magic(stem) or shards_path(stem).exists() or idx_path(stem).exists():
        return [stem]
    suffixes = [suffix] if suffix else [".shards", ".idx"]
    found = {path.removesuffix(end) for end in suffixes for path in glob.glob(stem + end)}
    if not found:
        raise ValueError(
            f"No corpus matches {pattern!r}; a corpus is a file .shards, or a pair .bin and .idx."
        )
    return sorted(found)


def _check_output(output: str, overwrite: bool, prefixes: Sequence[str]) -> tuple[Making, list[Identity]]:
    """Where the pair is made, and what is known of what may be replaced."""
    check_prefix(output)
    check_output(Path(output))
    if os.path.abspath(output) in map(os.path.abspath, prefixes):
        raise ValueError(f"The output prefix {output} is one of the inputs; choose another.")
    claim = next((claim for claim in claims_to(output) if claim.exists()), None)
    if claim is not None:
        raise ValueError(
            f"{output} is an output of preprocessing, which claimed it by {claim}; choose another "
            "--output-prefix."
        )
    files = shards_path(output), bin_path(output), idx_path(output)
    there = [path for path in files if os.path.lexists(path)]
    if there and not overwrite:
        raise ValueError(
            f"{there[0]} exists; choose another --output-prefix, or give --overwrite to replace it."
        )
    folder = Path(f"{output}.merging")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a merge that was killed; move it away.")
    making = Making(folder, lambda: listed(shards_path(output)))
    if (path := next((path for path in there if not making.made(path)), None)) is not None:
        raise ValueError(
            f"{path} is there already, and no shard list {output}.shards names it as it is; choose another "
            "--output-prefix, or remove it yourself if nobody needs it."
        )
    return making, [*making.known]


def _common(prefixes: Sequence[str]) -> tuple[np.dtype[Any], dict[str, Any], list[str]]:
    """Token type and info that all inputs agree on, and what is to be told; refuses what cannot be joined."""
    first = open_corpus(prefixes[0])
    dtype, info = first.dtype, first.info
    known: tuple[str, dict[str, Any]] | None = None  # a corpus that names its tokenizer
    silent: list[str] = []
    for prefix in prefixes:
        corpus = open_corpus(prefix)  # one at a time: each holds files open
        if corpus.dtype != dtype:
            raise ValueError(
                f"{first.prefix} holds {dtype} tokens, {prefix} {corpus.dtype}: they were made with "
                "vocabularies of different size and cannot be joined."
            )
        info = {key: value for key, value in info.items() if corpus.info.get(key, ...) == value}
        tokenizer = corpus.info.get("tokenizer")
        if not isinstance(tokenizer, dict):
            silent.append(prefix)
        elif known is None:
            known = (prefix, tokenizer)
        elif tokenizer.get("digest") != known[1].get("digest"):
            raise ValueError(
                f"{known[0]} was made with the tokenizer {_describe(known[1])}, {prefix} with "
                f"{_describe(tokenizer)}: their ids mean different text and cannot be joined."
            )
    info["made_by"] = _MADE_BY
    notes = []
    if known and not silent:
        info["tokenizer"] = known[1]
    elif known:
        notes.append(
            f"{silent[0]} does not say which tokenizer made it, so neither does the joined corpus; "
            f"{known[0]} was made with {_describe(known[1])}."
        )
    return dtype, info, notes


def _describe(tokenizer: dict[str, Any]) -> str:
    return f"{tokenizer.get('file')} (digest {tokenizer.get('digest')})"


def _check_pairs(output: str, prefixes: Sequence[str], report: MergeReport) -> None:
    """Read every index and count; no token is read."""
    seen = set()
    for pair in _open_pairs(prefixes):
        place = _place(pair.prefix)
        if place == os.path.abspath(output):
            raise ValueError(f"The inputs read {pair.prefix}, the output prefix; choose another.")
        if place in seen:
            raise ValueError(f"The inputs hold the pair {pair.prefix} twice; leave out one that lists it.")
        seen.add(place)
        for defect in pair.index.defects():
            raise ValueError(f"{defect} Restore the file, or make the pair again.")
        if pair.listed is not None:
            _require_digest(pair.index.path, file_digest(pair.index.path), pair.listed.idx_digest)
        report.shards += 1
        report.tokens += pair.index.num_tokens
        report.documents += pair.index.num_documents


def _open_pairs(prefixes: Iterable[str]) -> Iterator[IndexedDataset | OpenShard]:
    """All pairs of all corpora in order, one open at a time."""
    for prefix in prefixes:
        yield from open_corpus(prefix).pairs()


def _copy(
    output_prefix: str, prefixes: Sequence[str], dtype: np.dtype[Any], report: MergeReport, making: Making
) -> Shard:
    total = report.tokens * dtype.itemsize
    with (
        PairWriter(output_prefix, dtype, making) as output,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="merging", disable=None
        ) as bar,  # on a terminal only
    ):
        for pair in _open_pairs(prefixes):
            digest = new_digest()
            for _, block in pair.tokens.blocks():
                output.bin.write(block)
                digest.update(block.data)
                bar.update(block.nbytes)
            if pair.listed is not None:
                _require_digest(pair.tokens.path, digest.digest(), pair.listed.bin_digest)
        if output.bin.num_bytes != total:
            raise ValueError("An input changed while it was read; start again when nothing writes to it.")
        write_index(
            output.idx,
            dtype,
            sum(pair.index.num_sequences for pair in _open_pairs(prefixes)),
            report.documents,
            lambda: (block for pair in _open_pairs(prefixes) for block in pair.index.length_blocks()),
            shifted(_open_pairs(prefixes)),
        )
        return output.publish(report.documents)


def shifted(pairs: Iterable[Any]) -> Iterator[npt.NDArray[np.int64]]:
    """First sequence of every document when the sequences of all ``pairs`` are counted through."""
    before = 0
    for pair in pairs:
        index = pair.index
        for at in range(0, index.num_documents, BLOCK_ENTRIES):
            stop = min(at + BLOCK_ENTRIES, index.num_documents)
            yield int64_block(index.first_sequences, at, stop) + before
        before += index.num_sequences


def _refer(output_prefix: str, prefixes: Sequence[str]) -> list[Shard]:
    folder = os.path.join(os.path.abspath(os.path.dirname(output_prefix)), "")
    shards = []
    for pair in _open_pairs(prefixes):
        digests = (
            (pair.listed.bin_digest, pair.listed.idx_digest)
            if pair.listed is not None
            else (file_digest(pair.tokens.path), file_digest(pair.index.path))
        )
        name = _place(pair.prefix).removeprefix(folder)
        shards.append(Shard(name, pair.index.num_tokens, pair.index.num_documents, *digests))
    return shards


def _place(prefix: str) -> str:
    return prefix if is_url(prefix) else os.path.abspath(prefix)


def _require_digest(path: str, found: bytes, listed: bytes) -> None:
    if found != listed:
        raise ValueError(
            f"{path} is damaged: its digest is {found.hex()}, its shard list says {listed.hex()}; restore "
            "the file, or make the shard again."
        )
