"""The shard format: round trips, Megatron's own reader and writer, and every way a pair can be wrong."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import resource
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora import mmididx
from megatron_iiet.data.corpora.indexed import (
    MAGIC,
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    shards_path,
)
from megatron_iiet.data.corpora.indexed_writer import DigestedFile, write_index
from megatron_iiet.data.corpora.mmididx import DocumentIndex, Shard
from tests.data.crash import run_until_killed

MakeShard = Callable[..., Path]


def document_bounds(shard: IndexedDataset) -> list[int]:
    return [shard.document_start(i) for i in range(shard.num_documents + 1)]


def digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def write_pair(
    prefix: Path, lengths: list[int], documents: list[int], offsets: list[int] | None = None, code: int = 8
) -> Path:
    """A pair by hand: lengths of the sequences, first sequence of each document and the end; token i is i."""
    itemsize = {4: 4, 8: 2}[code]
    offsets = [0, *(np.cumsum(lengths)[:-1] * itemsize).tolist()] if offsets is None else offsets
    index = struct.pack("<9sQBQQ", MAGIC, 1, code, len(lengths), len(documents))
    index += np.array(lengths, dtype="<i4").tobytes() + np.array(offsets, dtype="<i8").tobytes()
    idx_path(prefix).write_bytes(index + np.array(documents, dtype="<i8").tobytes())
    bin_path(prefix).write_bytes(np.arange(sum(lengths), dtype=f"<i{itemsize}").tobytes())
    return prefix


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 65498), min_size=1, max_size=30), min_size=1, max_size=12),
    vocab_size=st.sampled_from([65499, 65500, 300000]),
    packed=st.booleans(),
    data=st.data(),
)
def test_round_trip(
    tmp_path: Path, documents: list[list[int]], vocab_size: int, packed: bool, data: st.DataObject
) -> None:
    with IndexedDatasetWriter(tmp_path / "shard", vocab_size) as writer:
        for document in documents:
            ids = np.array(document, dtype=writer.dtype)
            writer.add_document(ids.tobytes() if packed else ids)
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


def test_damage_in_the_middle_is_met_by_reads(tmp_path: Path) -> None:
    lengths, documents, offsets = [4, 4, 4, 4], [0, 1, 2, 3, 4], [0, 8, 16, 24]
    for changed, message in (
        ({"documents": [0, 9, 2, 3, 4]}, "document 1 starts at sequence 9"),
        ({"documents": [0, -1, 2, 3, 4]}, "document 1 starts at sequence -1"),
        ({"offsets": [0, 9, 16, 24]}, "sequence 1 starts at byte 9"),
        ({"offsets": [0, -8, 16, 24]}, "sequence 1 starts at byte -8"),
        ({"offsets": [0, 800, 16, 24]}, "sequence 1 starts at byte 800"),
        ({"offsets": [0, 20, 16, 24]}, "document 1 starts at token 10 and ends at 8"),
    ):
        entries = {"lengths": lengths, "documents": documents, "offsets": offsets} | changed
        shard = IndexedDataset(write_pair(tmp_path / "a", **entries))
        with pytest.raises(ValueError, match=message):
            shard.document(1)
        if min(np.diff(entries["documents"]).min(), np.diff(entries["offsets"]).min()) < 0:
            with pytest.raises(ValueError, match="damaged"):
                list(shard.index.document_lengths())
        assert len(list(shard.index.defects())) == 1
        assert shard.read(0, 16).tolist() == list(range(16))
    for wrong in ([0, 2, 1, 3, 4], [0, 3, 3, 3, 4], [0, 0, 9, 3, 4]):
        shard = IndexedDataset(write_pair(tmp_path / "a", lengths, wrong))
        for start in range(16):
            try:
                found = shard.document_starts(start, 16)
            except ValueError as error:
                assert "damaged" in str(error)  # noqa: PT017
            else:
                assert np.all(np.diff(found) > 0)
                assert np.all((found >= start) & (found < 16))


@pytest.mark.parametrize("cut", [1, 3, 12, 20])
def test_tokens_cut_short_after_opening(make_shard: MakeShard, cut: int) -> None:
    shard = IndexedDataset(make_shard([4, 6]))
    os.truncate(bin_path(shard.prefix), 20 - cut)
    row = np.zeros(10, dtype=np.int64)
    with pytest.raises(ValueError, match=rf"ends at byte {20 - cut}, .*it had 20 bytes when it was opened"):
        shard.read_into(0, row)
    assert shard.read(0, (20 - cut) // 2).tolist() == list(range((20 - cut) // 2))


def test_index_cut_short_after_opening(make_shard: MakeShard) -> None:
    """Without a check the access ends the process (SIGBUS)."""
    shard = IndexedDataset(make_shard([1] * 3000))
    os.truncate(idx_path(shard.prefix), 100)
    for read in (
        lambda: shard.document_start(2500),
        lambda: shard.document(2999),
        lambda: shard.document_starts(0, 3000),
    ):
        with pytest.raises(ValueError, match="has 100 bytes but had 60042 when it was opened"):
            read()
    assert shard.read(2998, 3000).tolist() == [2998, 2999]


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


def damage_magic(prefix: Path) -> None:
    idx_path(prefix).write_bytes(b"PK\x03\x04" + bytes(60))


def damage_version(prefix: Path) -> None:
    idx_path(prefix).write_bytes(struct.pack("<9sQBQQ", MAGIC, 2, 8, 1, 2) + bytes(28))


def damage_dtype(prefix: Path) -> None:
    idx_path(prefix).write_bytes(struct.pack("<9sQBQQ", MAGIC, 1, 7, 1, 2) + bytes(28))


def damage_count(prefix: Path) -> None:
    idx_path(prefix).write_bytes(struct.pack("<9sQBQQ", MAGIC, 1, 8, 0, 1) + bytes(8))


def damage_documents(prefix: Path) -> None:
    data = bytearray(idx_path(prefix).read_bytes())
    data[-8:] = struct.pack("<q", 9)
    idx_path(prefix).write_bytes(data)


DAMAGES = {
    r"shard\.idx is missing; its partner shard\.bin is there": lambda p: idx_path(p).unlink(),
    r"shard\.bin is missing; its partner": lambda p: bin_path(p).unlink(),
    r"shard\.idx is missing; data\.prefix is the path without": lambda p: (
        idx_path(p).unlink(),
        bin_path(p).unlink(),
    ),
    r"shard\.idx is empty \(0 bytes\)": lambda p: idx_path(p).write_bytes(b""),
    r"shard\.bin is empty \(0 bytes\)": lambda p: bin_path(p).write_bytes(b""),
    r"not a Megatron index: it starts with b'PK": damage_magic,
    r"format version 2": damage_version,
    r"dtype code 7, which is no integer type": damage_dtype,
    r"describes no documents": damage_count,
    r"cut short: 12 bytes, not even a header": lambda p: idx_path(p).write_bytes(
        idx_path(p).read_bytes()[:12]
    ),
    r"cut short or damaged: 2 sequences and 2 documents need 82 bytes, the file has 77": lambda p: idx_path(
        p
    ).write_bytes(idx_path(p).read_bytes()[:-5]),
    r"describes 20 bytes of tokens, the file holds 18": lambda p: bin_path(p).write_bytes(bytes(18)),
    r"is damaged: first byte offset": damage_documents,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_pairs_are_refused(make_shard: MakeShard, message: str) -> None:
    prefix = make_shard([4, 6])
    DAMAGES[message](prefix)
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(prefix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_truncation_is_refused(make_shard: MakeShard, suffix: str) -> None:
    prefix = make_shard([4, 6, 1])
    path = Path(f"{prefix}.{suffix}")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            IndexedDataset(prefix)
        assert str(path) in str(error.value) or path.name in str(error.value)


def test_every_flip_of_an_index_is_an_error_or_readable(make_shard: MakeShard) -> None:
    """Without digests not all can be noticed; none may crash, or read what is not there."""
    prefix = make_shard([4, 6, 1])
    path = idx_path(prefix)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                shard = IndexedDataset(prefix)
                shard.document_starts(0, shard.num_tokens)
                tokens = [shard.document(i).size for i in range(shard.num_documents)]
                assert sum(tokens) <= 3 * shard.num_tokens
            except ValueError as error:
                assert "shard." in str(error)  # noqa: PT017


def test_modes_are_accepted_and_other_bytes_behind_are_not(make_shard: MakeShard) -> None:
    prefix = make_shard([4, 6, 1])
    whole = idx_path(prefix).read_bytes()
    for extra in range(1, 9):
        idx_path(prefix).write_bytes(whole + bytes(extra))
        if extra == 3:
            assert IndexedDataset(prefix).document(1).tolist() == list(range(4, 10))
        else:
            with pytest.raises(ValueError, match="cut short or damaged"):
                IndexedDataset(prefix)


def test_a_negative_length_is_a_defect_even_where_it_adds_up(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [4, -2, 5], [0, 1, 2, 3], offsets=[0, 8, 4])
    (defect,) = IndexedDataset(prefix).index.defects()
    assert "sequence 1 does not end where the next one starts" in defect


class TestWriter:
    def test_failure_leaves_nothing_and_the_old_pair(self, tmp_path: Path, make_shard: MakeShard) -> None:
        prefix = make_shard([4, 6])
        before = idx_path(prefix).read_bytes()
        with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(prefix, 100) as writer:  # noqa: PT012
            writer.add_document(np.arange(50))
            raise KeyboardInterrupt
        assert listing(tmp_path) == ["shard.bin", "shard.idx"]
        assert idx_path(prefix).read_bytes() == before
        assert IndexedDataset(prefix).num_tokens == 10

    def test_nothing_to_write(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="No documents"), IndexedDatasetWriter(tmp_path / "a", 100):
            pass
        assert listing(tmp_path) == []

    def test_killed_at_any_step(self, tmp_path: Path) -> None:
        """Whatever the moment: the old corpus, the new one, or nothing that opens; and the next run works."""

        def write(count: int) -> None:
            with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
                writer.add_documents(np.arange(count), [1] * count)

        outcomes = set()
        for step in range(1000):
            write(3)
            shards_path(tmp_path / "a").write_bytes(b"describes the old pair")
            finished = run_until_killed(lambda: write(5), step)
            try:
                found = IndexedDataset(tmp_path / "a").num_tokens
            except ValueError as error:
                assert "the writing did not finish" in str(error)  # noqa: PT017
                found = 0
            outcomes.add(found)
            if found != 3:  # a list must never outlive the pair it describes
                assert not shards_path(tmp_path / "a").exists()
            write(4)
            assert listing(tmp_path) == ["a.bin", "a.idx"]
            if finished:
                break
        assert outcomes == {3, 0, 5}
        assert found == 5

    def test_full_disk(self, tmp_path: Path, make_shard: MakeShard) -> None:
        """A limit on the size of files, met while writing and while closing."""
        prefix = make_shard([4, 6])
        limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limited in (5000, 30_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limited, hard))
            try:
                with pytest.raises(OSError, match="File too large"), IndexedDatasetWriter(prefix, 100) as w:
                    w.add_documents(np.zeros(10_000, dtype=np.int64), [1] * 10_000)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            assert listing(tmp_path) == ["shard.bin", "shard.idx"]
            assert IndexedDataset(prefix).num_tokens == 10

    def test_memory_does_not_grow_with_documents(self, tmp_path: Path) -> None:
        """A million documents: their lengths and index entries would be 20 MB."""
        with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
            tokens = np.zeros(50_000, dtype=writer.dtype).tobytes()
            tracemalloc.start()
            for _ in range(20):
                writer.add_documents(tokens, [1] * 50_000)
            writer.close()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert IndexedDataset(tmp_path / "a").num_documents == 1_000_000
        assert peak < 12e6

    def test_a_name_taken_while_waiting_for_the_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between opening and locking the other writer publishes: its file must not be emptied."""
        first = IndexedDatasetWriter(tmp_path / "a", 100)
        first.add_document(np.arange(3))
        lock = fcntl.flock

        def publish_first(file: object, operation: int) -> None:
            if first.num_tokens:
                first.num_tokens = 0
                first.close()
            lock(file, operation)  # type: ignore[arg-type]

        monkeypatch.setattr(fcntl, "flock", publish_first)
        second = IndexedDatasetWriter(tmp_path / "a", 100)
        assert IndexedDataset(tmp_path / "a").num_tokens == 3
        second.discard()
        assert listing(tmp_path) == ["a.bin", "a.idx"]

    def test_closing_twice_and_too_early(self, tmp_path: Path) -> None:
        with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
            writer.add_document(np.arange(3))
            with pytest.raises(RuntimeError, match="call close"):
                _ = writer.shard
            assert writer.close() is writer.shard
        assert writer.close().tokens == 3

    def test_a_folder_as_prefix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="ends in a slash"):
            IndexedDatasetWriter(f"{tmp_path}/", 100)
        (tmp_path / "shards").mkdir()
        with pytest.raises(ValueError, match=r"is a folder without a list shards\.shards"):
            IndexedDataset(tmp_path / "shards")

    def test_replaces_and_reuses_leftovers(self, tmp_path: Path, make_shard: MakeShard) -> None:
        (tmp_path / "shard.bin.partial").write_bytes(b"left by a killed run, longer than what follows")
        make_shard([4, 6])
        prefix = make_shard([3])
        assert listing(tmp_path) == ["shard.bin", "shard.idx"]
        assert IndexedDataset(prefix).num_tokens == 3

    def test_two_writers_of_one_prefix(self, tmp_path: Path) -> None:
        with IndexedDatasetWriter(tmp_path / "a", 100) as first:
            with pytest.raises(ValueError, match="being written by another process"):
                IndexedDatasetWriter(tmp_path / "a", 100)
            first.add_document(np.arange(3))
        assert IndexedDataset(tmp_path / "a").num_tokens == 3

    @pytest.mark.parametrize(
        ("ids", "message"),
        [([], "skip empty"), ([100], r"leave the vocabulary \[0, 100\)"), ([-1], "leave the vocabulary")],
    )
    def test_bad_documents(self, tmp_path: Path, ids: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message), IndexedDatasetWriter(tmp_path / "a", 100) as writer:
            writer.add_document(np.array(ids, dtype=np.int64))
        assert listing(tmp_path) == []

    def test_lengths_must_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="5 tokens do not fill"):  # noqa: SIM117
            with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
                writer.add_documents(np.arange(5), [2, 2])

    def test_no_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"a\.bin cannot be written: .*file is a file"):
            IndexedDatasetWriter(tmp_path / "file" / "a", 100)
