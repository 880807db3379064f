"""The shard format: round trips, Megatron's own reader and writer, and every way a pair can be wrong."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.indexed import MAGIC, IndexedDataset, IndexedDatasetWriter, bin_path, idx_path

MakeShard = Callable[..., Path]


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
    assert shard.document_bounds.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens = shard.read(start, stop)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == stream[start:stop].tolist()


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
    assert shard.document_bounds.tolist() == [0, 10, 10, 15]
    assert shard.document(0).tolist() == list(range(10))
    assert shard.document(1).tolist() == []
    assert shard.read(8, 12).tolist() == [8, 9, 10, 11]


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
    assert shard.document_bounds.tolist() == [0, half, 2 * half, 3 * half]
    assert shard.read(3 * half - 4, 3 * half).tolist() == [0, 7, 8, 9]


def test_pickles_by_name(make_shard: MakeShard) -> None:
    shard = IndexedDataset(make_shard([50_000]))
    data = pickle.dumps(shard)
    assert len(data) < 1000
    assert pickle.loads(data).read(10, 12).tolist() == [10, 11]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_ranges_outside_raise(make_shard: MakeShard, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="leaves the 10 tokens"):
        IndexedDataset(make_shard([10])).read(start, stop)


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

    def test_no_stale_index_beside_new_tokens(
        self, make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Die between the two renames: the old index must be gone, the error must say so."""
        prefix = make_shard([4, 6])
        rename = Path.rename

        def die_at_index(path: Path, target: Path) -> Path:
            if target.suffix == ".idx":
                raise OSError(28, "No space left on device")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", die_at_index)
        with pytest.raises(OSError, match="No space"), IndexedDatasetWriter(prefix, 100) as writer:
            writer.add_document(np.arange(10))
        with pytest.raises(ValueError, match="writing did not finish"):
            IndexedDataset(prefix)

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

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"The folder .*nowhere of the output prefix is missing"):
            IndexedDatasetWriter(tmp_path / "nowhere" / "a", 100)
