"""A corpus is known by what it holds: the same wherever it lies, another one after one token in place."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_iiet.data.corpora import identity
from megatron_iiet.data.corpora.identity import corpus_identity, identity_difference
from megatron_iiet.data.corpora.mmididx import Shard, bin_path, file_digest, idx_path
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.corpora.streams import IndexedDataset, open_corpus
from tests.tiny import write_shard


def listed(folder: Path, names: list[str]) -> str:
    """Prefix of a list of pairs in ``folder``."""
    shards = []
    for name in names:
        pair, prefix = IndexedDataset(folder / name), folder / name
        digests = file_digest(bin_path(prefix)), file_digest(idx_path(prefix))
        shards.append(Shard(name, pair.num_tokens, pair.num_documents, *digests))
    write_shards(folder / "all", shards, pair.dtype, {})
    return str(folder / "all")


def difference(one: str | Path, other: str | Path) -> tuple[str, str] | None:
    return identity_difference(*(corpus_identity(open_corpus(prefix)) for prefix in (one, other)))


def test_moved_and_renamed_it_is_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_shard(tmp_path / "one" / name, seed=seed)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for file in (tmp_path / "other").glob("a.*"):
        file.rename(file.with_name(f"renamed{file.suffix}"))
    assert difference(tmp_path / "one" / "a", tmp_path / "other" / "renamed") is None
    one, other = listed(tmp_path / "one", ["a", "b"]), listed(tmp_path / "other", ["renamed", "b"])
    assert difference(one, other) is None
    swapped = difference(one, listed(tmp_path / "other", ["b", "renamed"]))
    assert swapped is not None
    assert swapped[0].startswith("shards of digest ")


def test_a_list_of_one_pair_is_that_pair(tmp_path: Path) -> None:
    write_shard(tmp_path / "a")
    assert difference(tmp_path / "a", listed(tmp_path, ["a"])) is None


@pytest.mark.parametrize("position", [0, 5000, -1])
@pytest.mark.parametrize("by_list", [False, True])
def test_a_token_changed_in_place(position: int, by_list: bool, tmp_path: Path) -> None:
    """Also under a list whose digests are of the file as it was."""
    write_shard(tmp_path / "a")
    prefix = listed(tmp_path, ["a"]) if by_list else tmp_path / "a"
    before = corpus_identity(open_corpus(prefix))
    tokens = np.memmap(tmp_path / "a.bin", dtype=np.uint16, mode="r+")
    tokens[position] += 1
    tokens.flush()
    found = identity_difference(before, corpus_identity(open_corpus(prefix)))
    assert found is not None
    assert found[0].startswith("tokens of digest ")


def test_a_border_of_documents_moved(tmp_path: Path) -> None:
    """Tokens, sizes and number of documents stay."""
    from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter

    for name, cut in (("a", 30), ("b", 31)):
        with IndexedDatasetWriter(tmp_path / name, 96) as writer:
            writer.add_document(np.arange(cut))
            writer.add_document(np.arange(cut, 90))
    found = difference(tmp_path / "a", tmp_path / "b")
    assert found is not None
    assert found[0].startswith("tokens of digest ")


def test_other_sizes_come_first(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", documents=20)
    write_shard(tmp_path / "b", documents=21)
    found = difference(tmp_path / "a", tmp_path / "b")
    assert found is not None
    assert [words.split()[1] for words in found] == ["tokens", "tokens"]


def test_a_large_corpus_is_sampled_at_both_ends_and_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large it is, a bounded part is read; a small one is read whole."""
    write_shard(tmp_path / "a")
    read: list[tuple[int, int]] = []
    whole = IndexedDataset.read
    monkeypatch.setattr(IndexedDataset, "read", lambda self, a, b: read.append((a, b)) or whole(self, a, b))
    stream = IndexedDataset(tmp_path / "a")
    corpus_identity(stream)
    covered = np.zeros(stream.num_tokens, dtype=bool)
    for start, stop in read:
        covered[start:stop] = True
    assert covered.all()
    read.clear()
    monkeypatch.setattr(identity, "BLOCK_TOKENS", 16)
    corpus_identity(stream)
    assert len(read) == identity.BLOCKS
    assert (read[0][0], read[-1][1]) == (0, stream.num_tokens)
    gaps = {after[0] - before[0] for before, after in itertools.pairwise(read)}
    assert max(gaps) - min(gaps) <= 1
