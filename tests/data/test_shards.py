"""Corpora of many pairs: equal to one long array, lazily opened, and every way a list can be wrong."""

from __future__ import annotations

import os
import pickle
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora import shard_list
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.mmididx import Shard, bin_path, idx_path, shards_path
from megatron_iiet.data.corpora.shard_list import ShardList, write_shards
from megatron_iiet.data.corpora.streams import IndexedDataset, ShardedDataset, open_corpus
from tests.data.crash import run_until_killed
from tests.processes import die_with_parent

WriteCorpus = Callable[..., Path]


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """A corpus of shards of documents of the given lengths; token i of the stream is i."""

    def write(shards: list[list[int]], name: str = "corpus", vocab_size: int = 60000, **info: Any) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        written, start = [], 0
        for number, lengths in enumerate(shards):
            with IndexedDatasetWriter(tmp_path / name / f"{number:03d}", vocab_size) as writer:
                writer.add_documents(np.arange(start, start + sum(lengths)), lengths)
            start += sum(lengths)
            written.append(replace(writer.shard, name=f"{name}/{number:03d}"))
        write_shards(tmp_path / name, written, writer.dtype, info)
        return tmp_path / name

    return write


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6),
    vocab_size=st.sampled_from([60000, 300000]),
    max_open=st.integers(1, 3),
    data=st.data(),
)
def test_equal_to_one_array(
    write_corpus: WriteCorpus, shards: list[list[int]], vocab_size: int, max_open: int, data: st.DataObject
) -> None:
    corpus = ShardedDataset(write_corpus(shards, vocab_size=vocab_size), max_open)
    bounds = np.cumsum([0, *(length for lengths in shards for length in lengths)]).tolist()
    total = bounds[-1]
    assert (corpus.num_tokens, corpus.num_documents) == (total, len(bounds) - 1)
    assert corpus.dtype == ("uint16" if vocab_size < 65500 else "int32")
    assert [corpus.document_start(i) for i in range(len(bounds))] == bounds
    for _ in range(4):
        start = data.draw(st.integers(0, total))
        stop = data.draw(st.integers(start, total))
        tokens = corpus.read(start, stop)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == list(range(start, stop))
        row = np.full(total + 2, -1, dtype=np.int64)
        corpus.read_into(start, row[1 : 1 + stop - start])
        assert row.tolist() == [-1, *range(start, stop), *[-1] * (total + 1 - stop + start)]
        starts = corpus.document_starts(start, stop)
        assert starts.dtype == np.int64
        assert starts.tolist() == [p for p in bounds[:-1] if start <= p < stop]
    documents = [corpus.document(i).tolist() for i in range(corpus.num_documents)]
    assert documents == [list(range(start, stop)) for start, stop in pairwise(bounds)]
    assert len(corpus._open) <= max_open


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(
        st.builds(
            Shard,
            st.text(min_size=1, max_size=9).filter(
                lambda name: "\0" not in name and name[-1] != "/" and ".." not in name.split("/")
            ),
            st.integers(1, 2**50),
            st.integers(1, 2**40),
            st.binary(min_size=16, max_size=16),
            st.binary(min_size=16, max_size=16),
        ),
        min_size=1,
        max_size=9,
    ),
    info=st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.booleans() | st.none()),
)
def test_lists_round_trip(tmp_path: Path, shards: list[Shard], info: dict[str, Any]) -> None:
    path = write_shards(tmp_path / "a", shards, np.dtype("<i4"), info)
    found = ShardList(path)
    assert (list(found), found[len(shards) - 1]) == (shards, shards[-1])
    assert found.num_tokens == sum(shard.tokens for shard in shards)
    assert found.num_documents == sum(shard.documents for shard in shards)
    assert (found.info, found.dtype) == (info, np.dtype("<i4"))
    before = path.read_bytes()
    assert (
        write_shards(tmp_path / "a", shards, np.dtype("<i4"), dict(reversed(info.items()))).read_bytes()
        == before
    )
    for outside in (-1, len(shards)):
        with pytest.raises(IndexError, match=f"shard {outside} of"):
            found[outside]
    assert os.listdir(tmp_path) == ["a.shards"]


def test_layout(tmp_path: Path) -> None:
    """The bytes, by the description of the format."""
    shards = [Shard("a", 5, 2, b"b" * 16, b"i" * 16), Shard("/d/é", 7, 1, b"B" * 16, b"I" * 16)]
    data = write_shards(tmp_path / "a", shards, np.dtype("<u2"), {"append_eod": True}).read_bytes()
    head = b'{"documents": 3, "dtype": "uint16", "info": {"append_eod": true}, "shards": 2, "tokens": 12}'
    assert data[:16] == b"TOKSHARD" + (1).to_bytes(4, "little") + len(head).to_bytes(4, "little")
    assert data[16 : 16 + len(head)] == head
    at = -(-(16 + len(head)) // 8) * 8
    assert np.frombuffer(data[at : at + 72], "<i8").tolist() == [0, 5, 12, 0, 2, 3, 0, 1, 6]
    assert data[at + 72 : -16] == b"b" * 16 + b"B" * 16 + b"i" * 16 + b"I" * 16 + "a/d/é".encode()


def test_open_corpus(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus([[3], [4]], name="many", made_by="a test")
    corpus = open_corpus(prefix)
    assert isinstance(corpus, ShardedDataset)
    assert corpus.info == {"made_by": "a test"}
    assert open_corpus(f"{prefix}.shards").prefix == str(prefix)
    assert isinstance(open_corpus(tmp_path / "many" / "000"), IndexedDataset)
    assert isinstance(open_corpus(tmp_path / "many" / "000.bin"), IndexedDataset)
    with pytest.raises(ValueError, match=r"nothing\.idx is missing"):
        open_corpus(tmp_path / "nothing")


def test_absolute_names_and_moved_folders(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus([[3], [4]])
    shards = [replace(shard, name=str(tmp_path / shard.name)) for shard in ShardedDataset(prefix).shards]
    (tmp_path / "far" / "away").mkdir(parents=True)
    write_shards(tmp_path / "far" / "away" / "list", shards, np.dtype("<u2"), {})
    assert open_corpus(tmp_path / "far" / "away" / "list").read(0, 7).tolist() == list(range(7))
    (tmp_path / "moved").mkdir()
    for name in ("corpus", "corpus.shards"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert open_corpus(tmp_path / "moved" / "corpus").read(2, 5).tolist() == [2, 3, 4]


@pytest.mark.slow
def test_opening_touches_no_shard(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    """100,000 entries without files open; only what is read must be there."""
    shards = [Shard(f"nowhere/{i}", 10**7, 10**4, bytes(16), bytes(16)) for i in range(100_000)]
    corpus = ShardedDataset(write_shards(tmp_path / "many", shards, np.dtype("<u2"), {}).with_suffix(""))
    assert (corpus.num_tokens, corpus.num_documents) == (10**12, 10**9)
    with pytest.raises(ValueError, match=r"nowhere/77777\.bin is missing, and .*many\.shards names it"):
        corpus.read(777_770_000_000, 777_770_000_010)
    with pytest.raises(ValueError, match=r"nowhere/99999\.bin is missing"):
        corpus.document_start(10**9 - 1)
    assert corpus.document_start(10**9) == 10**12


def test_tokens_are_read_without_their_index(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus([[3], [4]])
    idx_path(prefix / "001").unlink()
    corpus = open_corpus(prefix)
    assert corpus.read(0, 7).tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"001\.idx is missing"):
        corpus.document_starts(2, 5)


def test_pickles_by_name(write_corpus: WriteCorpus) -> None:
    corpus = ShardedDataset(write_corpus([[3], [4]]), max_open_shards=1)
    corpus.read(0, 7)
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.read(2, 5).tolist() == [2, 3, 4]
    assert copy._max_open == 1


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 8)])
def test_ranges_outside_raise(write_corpus: WriteCorpus, start: int, stop: int) -> None:
    corpus = open_corpus(write_corpus([[3], [4]]))
    for read in (corpus.read, corpus.document_starts):
        with pytest.raises(IndexError, match="leaves the 7 tokens"):
            read(start, stop)
    for document in (-1, 3):
        with pytest.raises(IndexError, match=f"document {document} of 2"):
            corpus.document_start(document)
    with pytest.raises(IndexError, match="leaves the 7 tokens"):
        corpus.read_into(6, np.zeros(2, dtype=np.int64))
    with pytest.raises(IndexError, match="document 2 of 2"):
        corpus.document(2)


@pytest.mark.slow
def test_many_threads_and_few_open_files(write_corpus: WriteCorpus) -> None:
    """Shards are dropped by one thread while another reads them."""
    corpus, wrong = ShardedDataset(write_corpus([[40, 60]] * 20), max_open_shards=2), []
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> None:
        row = np.empty(150, dtype=np.int64)
        for start in np.random.default_rng(seed).integers(0, 2000 - 150, 400).tolist():
            corpus.read_into(start, row)
            starts = corpus.document_starts(start, start + 150)
            if not np.array_equal(row, np.arange(start, start + 150)) or np.any(starts % 100 % 40):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_low_limit_of_open_files(write_corpus: WriteCorpus) -> None:
    corpus = ShardedDataset(write_corpus([[5]] * 30))
    used = len(os.listdir("/proc/self/fd"))
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        assert corpus.read(0, 150).tolist() == list(range(150))
        assert len(corpus.document_starts(0, 150)) == 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_the_shards_read_last_stay_open(write_corpus: WriteCorpus) -> None:
    corpus = ShardedDataset(write_corpus([[5]] * 3), max_open_shards=2)
    for start in (0, 5, 0, 10):
        corpus.read(start, start + 5)
    assert sorted(corpus._open) == [0, 2]


def other_pair(tmp_path: Path, lengths: list[int], vocab_size: int = 60000) -> Path:
    with IndexedDatasetWriter(tmp_path / "other", vocab_size) as writer:
        writer.add_documents(np.zeros(sum(lengths), dtype=np.int64), lengths)
    return tmp_path / "other"


STALE = {
    r"001\.bin does not belong to .*corpus\.shards: bytes by the list: 8, in the file: 6": [3],
    r"001\.idx does not belong to .*: documents by the list: 2, in the file: 3": [1, 1, 2],
    r"001\.idx does not belong to .*: tokens by the list: 4, in the file: 2": [1, 1],
}


@pytest.mark.parametrize("message", STALE)
def test_a_shard_that_was_replaced(write_corpus: WriteCorpus, tmp_path: Path, message: str) -> None:
    prefix = write_corpus([[3], [1, 3]])
    other = other_pair(tmp_path, STALE[message])
    if ".bin" in message:
        bin_path(other).replace(bin_path(prefix / "001"))
    else:
        idx_path(other).replace(idx_path(prefix / "001"))
    corpus = open_corpus(prefix)
    assert corpus.read(0, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=message):
        corpus.document(2) if ".bin" not in message else corpus.read(3, 4)


def test_an_index_of_another_type(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus([[3], [1, 3]])
    idx_path(other_pair(tmp_path, [1, 3], vocab_size=100_000)).replace(idx_path(prefix / "001"))
    with pytest.raises(ValueError, match="token type by the list: uint16, in the file: int32"):
        open_corpus(prefix).document_start(2)


def test_a_new_pair_takes_an_old_list_away(tmp_path: Path) -> None:
    for count in (5, 5):
        with IndexedDatasetWriter(tmp_path / "a", 100) as writer:
            writer.add_documents(np.arange(count), [count])
        assert isinstance(open_corpus(tmp_path / "a"), IndexedDataset)
        write_shards(tmp_path / "a", [writer.shard], writer.dtype, {})
        assert open_corpus(tmp_path / "a").read(0, 5).tolist() == [0, 1, 2, 3, 4]


def test_every_flip_and_every_truncation_of_a_list(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus([[3], [1, 3]], made_by="a test")
    path = shards_path(prefix)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for data in [*flipped, *(whole[:size] for size in range(len(whole))), whole + b"x"]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"corpus\.shards (is (cut short|not a shard list)|has format)"):
            open_corpus(prefix)


HEADS = {
    r"format version 2, only 1": b"TOKSHARD" + bytes([2, 0, 0, 0]),
    r"not a shard list: it starts with b'MMIDIDX": b"MMIDIDX\0\0\1\0\0",
}


@pytest.mark.parametrize("message", HEADS)
def test_other_heads_are_named(write_corpus: WriteCorpus, message: str) -> None:
    path = shards_path(write_corpus([[3], [1, 3]]))
    path.write_bytes(HEADS[message] + path.read_bytes()[len(HEADS[message]) :])
    with pytest.raises(ValueError, match=message):
        ShardList(path)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard("../a", 5, 2, bytes(16), bytes(16)), r"'\.\./a' is no name"),
        (Shard("", 5, 2, bytes(16), bytes(16)), r"'' is no name"),
        (Shard("\udcff", 5, 2, bytes(16), bytes(16)), "surrogates not allowed"),
        (Shard("a", 0, 2, bytes(16), bytes(16)), "0 tokens and 2 documents"),
        (Shard("a", 5, 0, bytes(16), bytes(16)), "5 tokens and 0 documents"),
        (Shard("a", 5, 2, bytes(16), bytes(15)), "digests of another size"),
    ],
)
def test_shards_that_cannot_be_written(tmp_path: Path, shard: Shard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "a", [shard], np.dtype("<u2"), {})
    assert os.listdir(tmp_path) == []


def test_a_forged_name_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is right, whoever wrote it; files of the names in a list may be removed."""
    shard = Shard("../other", 5, 1, b"1" * 16, b"2" * 16)
    with monkeypatch.context() as patch:
        patch.setattr(shard_list, "_check_shard", lambda _: None)
        path = write_shards(tmp_path / "a", [shard], np.dtype("<i4"), {})
    with pytest.raises(ValueError, match=r"'\.\./other' is no name of a pair below the folder"):
        list(ShardList(path))


def test_lists_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No shards for"):
        write_shards(tmp_path / "a", [], np.dtype("<u2"), {})
    for info in ({"a": {1}}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            write_shards(tmp_path / "a", [Shard("a", 5, 2, bytes(16), bytes(16))], np.dtype("<u2"), info)
    assert os.listdir(tmp_path) == []


def test_concurrent_writers_of_one_list(tmp_path: Path) -> None:
    """Readers see a whole list at every moment, whoever writes it."""
    shards = [Shard(f"s/{i}", 5, 2, bytes(16), bytes(16)) for i in range(500)]
    write_shards(tmp_path / "a", shards, np.dtype("<u2"), {})
    children = []
    for _ in range(2):
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            die_with_parent(parent)
            for _ in range(30):
                write_shards(tmp_path / "a", shards, np.dtype("<u2"), {})
            os._exit(0)
        children.append(child)
    for _ in range(50):
        assert len(ShardList(shards_path(tmp_path / "a"))) == 500
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert os.listdir(tmp_path) == ["a.shards"]


def test_a_kill_leaves_the_old_list_or_the_new_one(tmp_path: Path) -> None:
    def write(tokens: int) -> None:
        write_shards(tmp_path / "a", [Shard("a", tokens, 2, bytes(16), bytes(16))], np.dtype("<u2"), {})

    outcomes = []
    for step in range(100):
        write(5)
        finished = run_until_killed(lambda: write(6), step)
        outcomes.append(ShardList(shards_path(tmp_path / "a")).num_tokens)
        if finished:
            break
    assert sorted(set(outcomes)) == [5, 6]
    assert outcomes == sorted(outcomes)
