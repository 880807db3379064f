"""Writing a shard: all of it or nothing, whatever happens meanwhile."""

from __future__ import annotations

import fcntl
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.mmididx import idx_path, shards_path
from megatron_iiet.data.corpora.streams import IndexedDataset
from tests.data.crash import run_until_killed
from tests.data.inputs import listing

MakeShard = Callable[..., Path]


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

    @pytest.mark.slow
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
            tokens = np.zeros(50_000, dtype=writer.dtype)
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
            assert writer.shard is None
            assert writer.close() is writer.shard
        assert writer.close().tokens == 3

    def test_a_published_pair_leaves_the_next_writer_alone(self, tmp_path: Path) -> None:
        """Which has temporary files of the same names."""
        first = IndexedDatasetWriter(tmp_path / "a", 100)
        first.add_document(np.array([1, 2]))
        first.close()
        with IndexedDatasetWriter(tmp_path / "a", 100) as second:
            second.add_document(np.array([3]))
            first.discard()
        assert IndexedDataset(tmp_path / "a").document(0).tolist() == [3]

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

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
    def test_both_files_may_be_read_by_whom_the_user_lets(
        self, mask: int, mode: int, tmp_path: Path, make_shard: MakeShard
    ) -> None:
        before = os.umask(mask)
        try:
            make_shard([4, 6])
        finally:
            os.umask(before)
        assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [mode, mode]

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
