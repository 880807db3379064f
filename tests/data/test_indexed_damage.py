"""Every way a pair of a shard can be wrong."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_iiet.data.corpora.mmididx import MAGIC, bin_path, idx_path
from megatron_iiet.data.corpora.streams import IndexedDataset
from tests.data.inputs import write_pair

MakeShard = Callable[..., Path]


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


def test_defects_of_one_kind_are_one_sentence(tmp_path: Path) -> None:
    """The first is named, the others are counted; a single one is alone."""
    lengths, documents = [4] * 5, [0, 1, 2, 3, 4, 5]
    shard = IndexedDataset(write_pair(tmp_path / "a", lengths, documents, offsets=[0, 8, 16, 20, 32]))
    (said,) = shard.index.defects()
    assert said.endswith("a.idx: sequence 2 does not end where the next one starts (and 1 more).")
    shard = IndexedDataset(write_pair(tmp_path / "b", lengths, documents, offsets=[0, 4, 16, 20, 32]))
    (said,) = shard.index.defects()
    assert said.endswith("b.idx: sequence 0 does not end where the next one starts (and 3 more).")
    shard = IndexedDataset(write_pair(tmp_path / "c", lengths, [0, 1, 9, 3, 4, 5]))
    (said,) = shard.index.defects()
    assert said.endswith("c.idx: document 1 does not end where the next one starts (and 1 more).")
    shard = IndexedDataset(write_pair(tmp_path / "d", lengths, [0, 1, 2, 3, 2, 5]))
    (said,) = shard.index.defects()
    assert said.endswith("d.idx: document 3 does not end where the next one starts.")


def test_a_negative_length_is_a_defect_even_where_it_adds_up(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [4, -2, 5], [0, 1, 2, 3], offsets=[0, 8, 4])
    (defect,) = IndexedDataset(prefix).index.defects()
    assert "sequence 1 does not end where the next one starts" in defect
