"""The shard format: round trips, Megatron's own reader and writer, reading anywhere and from anywhere."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora import mmididx
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter, write_index
from megatron_iiet.data.corpora.mmididx import MAGIC, DigestedFile, DocumentIndex, Shard, bin_path, idx_path
from megatron_iiet.data.corpora.streams import IndexedDataset
from tests.data.inputs import write_pair

MakeShard = Callable[..., Path]


def document_bounds(shard: IndexedDataset) -> list[int]:
    return [shard.document_start(i) for i in range(shard.num_documents + 1)]


def digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 65498), min_size=1, max_size=30), min_size=1, max_size=12),
    vocab_size=st.sampled_from([65499, 65500, 300000]),
    data=st.data(),
)
def test_round_trip(tmp_path: Path, documents: list[list[int]], vocab_size: int, data: st.DataObject) -> None:
    with IndexedDatasetWriter(tmp_path / "shard", vocab_size) as writer:
        for document in documents:
            ids = np.array(document, dtype=writer.dtype)
            writer.add_document(ids)
    shard = IndexedDataset(tmp_path / "shard")
    stream = np.concatenate([np.array(document) for document in documents])
    assert shard.dtype == ("uint16" if vocab_size < 65500 else "int32")
    assert (shard.num_documents, shard.num_tokens) == (len(documents), len(stream))
    bounds = np.cumsum([0, *map(len, documents)]).tolist()
    assert document_bounds(shard) == bounds
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens = shard.read(start, stop)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == stream[start:stop].tolist()
    row = np.full(len(stream) + 2, -1, dtype=np.int64)
    shard.read_into(start, row[1 : 1 + stop - start])
    assert row.tolist() == [-1, *stream[start:stop].tolist(), *[-1] * (len(row) - 1 - stop + start)]
    assert shard.document_starts(start, stop).tolist() == [p for p in bounds[:-1] if start <= p < stop]
    assert writer.shard == Shard(
        "shard", len(stream), len(documents), digest(bin_path(shard.prefix)), digest(idx_path(shard.prefix))
    )


@pytest.mark.parametrize("vocab_size", [32000, 100000])
def test_megatron_reads_what_we_write(make_shard: MakeShard, vocab_size: int) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = make_shard([3, 1, 70], vocab_size=vocab_size)
    theirs, ours = megatron.IndexedDataset(str(prefix)), IndexedDataset(prefix)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    assert theirs.sequence_lengths.tolist() == [3, 1, 70]
    assert [theirs[i].tolist() for i in range(3)] == [ours.document(i).tolist() for i in range(3)]
    assert theirs.index.dtype == ours.dtype == megatron.DType.optimal_dtype(vocab_size)


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    prefix = tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    builder.add_document(torch.arange(10), [4, 6])  # one document of two sequences
    builder.add_document(torch.tensor([], dtype=torch.int64), [])  # what it makes of an empty text
    builder.add_document(torch.arange(10, 15), [5])
    builder.finalize(str(idx_path(prefix)))
    shard = IndexedDataset(prefix)
    assert document_bounds(shard) == [0, 10, 10, 15]
    assert shard.document(0).tolist() == list(range(10))
    assert shard.document(1).tolist() == []
    assert shard.read(8, 12).tolist() == [8, 9, 10, 11]
    assert shard.document_starts(0, 15).tolist() == [0, 10]
    assert [lengths.tolist() for lengths in shard.index.document_lengths()] == [[10, 0, 5]]
    assert list(shard.index.defects()) == []


def test_our_files_equal_megatrons_bytes(tmp_path: Path, make_shard: MakeShard) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    ours, theirs = make_shard([5, 2]), tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(str(bin_path(theirs)), dtype=np.uint16)
    builder.add_document(torch.arange(5), [5])
    builder.add_document(torch.arange(5, 7), [2])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


def test_pointers_beyond_32_bits(tmp_path: Path) -> None:
    """A sparse file of 12 GB: two documents of 3 * 2**30 tokens would overflow 32-bit positions."""
    half, prefix = 2**31 - 1, tmp_path / "sparse"
    with bin_path(prefix).open("wb") as file:
        file.truncate(2 * (3 * half))
        file.seek(2 * (3 * half) - 6)
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes())
    index = struct.pack("<9sQBQQ", MAGIC, 1, 8, 3, 4)
    index += np.array([half] * 3, dtype="<i4").tobytes()
    index += np.array([0, 2 * half, 4 * half], dtype="<i8").tobytes() + np.arange(4, dtype="<i8").tobytes()
    idx_path(prefix).write_bytes(index)
    shard = IndexedDataset(prefix)
    assert document_bounds(shard) == [0, half, 2 * half, 3 * half]
    assert shard.read(3 * half - 4, 3 * half).tolist() == [0, 7, 8, 9]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=8),
    code=st.sampled_from([4, 8]),
    data=st.data(),
)
def test_document_starts_of_any_pair(
    tmp_path: Path, documents: list[list[int]], code: int, data: st.DataObject
) -> None:
    """Documents of none, one or many sequences, empty sequences: all that the format allows."""
    lengths = [length for document in documents for length in document]
    if sum(lengths) == 0:
        return
    first = np.cumsum([0, *map(len, documents)]).tolist()
    shard = IndexedDataset(write_pair(tmp_path / "any", lengths, first, code=code))
    bounds = np.cumsum([0, *map(sum, documents)]).tolist()
    assert document_bounds(shard) == bounds
    start = data.draw(st.integers(0, bounds[-1]))
    stop = data.draw(st.integers(start, bounds[-1]))
    assert shard.document_starts(start, stop).tolist() == sorted(
        {p for p in bounds[:-1] if start <= p < stop}
    )
    assert np.concatenate(list(shard.index.document_lengths())).tolist() == np.diff(bounds).tolist()
    assert list(shard.index.defects()) == []


def test_blocks_are_seamless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that works in blocks, in blocks of three entries or tokens."""
    monkeypatch.setattr(mmididx, "BLOCK_ENTRIES", 3)
    monkeypatch.setattr("megatron_iiet.data.corpora.indexed_writer.BLOCK_ENTRIES", 3)
    monkeypatch.setattr(mmididx, "BLOCK_BYTES", 6)
    lengths = [2, 1, 7, 3, 1, 1, 4, 2]
    with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
        writer.add_documents(np.arange(21), lengths)
    shard = IndexedDataset(tmp_path / "a")
    assert document_bounds(shard) == np.cumsum([0, *lengths]).tolist()
    assert shard.read(1, 21).tolist() == list(range(1, 21))
    assert np.concatenate(list(shard.index.document_lengths())).tolist() == lengths
    assert list(shard.index.defects()) == []
    blocks = list(shard.tokens.blocks())
    assert [start for start, _ in blocks] == list(range(0, 21, 3))
    assert np.concatenate([block for _, block in blocks]).tolist() == list(range(21))
    whole = idx_path(tmp_path / "a").read_bytes()
    for place in range(mmididx.HEADER.size, len(whole), 4):  # a change of any entry, wherever blocks meet
        damaged = bytearray(whole)
        damaged[place] ^= 64
        idx_path(tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|does not"):  # noqa: PT012
            for defect in IndexedDataset(tmp_path / "a").index.defects():
                raise ValueError(defect)


def test_index_beyond_32_bits(tmp_path: Path) -> None:
    """More than 2**31 tokens, and an index of a sparse file of more than 2**31 documents."""
    path, half = tmp_path / "big.idx", 2**31 - 1
    with path.open("wb") as file:
        write_index(
            DigestedFile(file),
            np.dtype("<i4"),
            6,
            2,
            lambda: iter([np.array([half, half]), np.array([half, 5, half, half])]),
            iter([np.array([0, 4])]),
        )
    index = DocumentIndex(path)
    assert index.num_tokens == 5 * half + 5
    assert index.offsets.tolist() == [4 * half * i for i in (0, 1, 2)] + [
        12 * half,
        12 * half + 20,
        16 * half + 20,
    ]
    assert list(index.defects()) == []
    many = 2**31 + 10
    with path.open("wb") as file:  # one token each: only the entries looked at below are there
        file.write(struct.pack("<9sQBQQ", MAGIC, 1, 8, many, many + 1))
        offsets, documents = 34 + 4 * many, 34 + 12 * many
        for at, value in ((many - 2, many - 2), (many - 1, many - 1), (many, many)):
            file.seek(documents + 8 * at)
            file.write(struct.pack("<q", value))
        for at in (many - 2, many - 1):
            file.seek(34 + 4 * at)
            file.write(struct.pack("<i", 1))
            file.seek(offsets + 8 * at)
            file.write(struct.pack("<q", 2 * at))
    index = DocumentIndex(path)
    assert (index.num_documents, index.num_tokens, index.num_bytes) == (many, many, 2 * many)
    assert [index.document_start(many - i) for i in (2, 1, 0)] == [many - 2, many - 1, many]
    assert index.document_starts(many - 1, many).tolist() == [many - 1]


def test_reads_from_many_threads(make_shard: MakeShard) -> None:
    shard, wrong = IndexedDataset(make_shard([50_000])), []

    def read(seed: int) -> None:
        row = np.empty(257, dtype=np.int64)
        for start in np.random.default_rng(seed).integers(0, 50_000 - 257, 2000).tolist():
            shard.read_into(start, row)
            if row[0] != start or not np.array_equal(row, np.arange(start, start + 257)):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_are_closed(make_shard: MakeShard) -> None:
    prefix = make_shard([3])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        IndexedDataset(prefix).read(0, 3)
    assert len(os.listdir("/proc/self/fd")) == before


def test_pickles_by_name(make_shard: MakeShard) -> None:
    shard = IndexedDataset(make_shard([50_000]))
    data = pickle.dumps(shard)
    assert len(data) < 1000
    assert pickle.loads(data).read(10, 12).tolist() == [10, 11]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_ranges_outside_raise(make_shard: MakeShard, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="leaves the 10 tokens"):
        IndexedDataset(make_shard([10])).read(start, stop)
    with pytest.raises(IndexError, match="leaves the 10 tokens"):
        IndexedDataset(make_shard([10])).document_starts(start, stop)


def test_read_into_outside_raises(make_shard: MakeShard) -> None:
    shard = IndexedDataset(make_shard([10]))
    for start, size in ((-1, 2), (9, 2), (11, 0)):
        with pytest.raises(IndexError, match="leaves the 10 tokens"):
            shard.read_into(start, np.zeros(size, dtype=np.int64))
    shard.read_into(10, np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("document", [-1, 2])
def test_documents_outside_raise(make_shard: MakeShard, document: int) -> None:
    shard = IndexedDataset(make_shard([4, 6]))
    with pytest.raises(IndexError, match=f"document {document} of 2"):
        shard.document(document)
    with pytest.raises(IndexError, match="of 2"):
        shard.document_start(document if document < 0 else 3)
