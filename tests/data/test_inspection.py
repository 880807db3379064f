"""What the inspection tells of a corpus, and that verification notices every damaged byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_iiet.data.corpora import mmididx
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.inspection import LengthCounts, summarize
from megatron_iiet.data.corpora.mmididx import bin_path, idx_path, shards_path
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.corpora.streams import ShardedDataset
from megatron_iiet.data.corpora.verification import MAX_DEFECTS, Verification, verify
from megatron_iiet.data.tokenizers.loading import load_tokenizer, tokenizer_digest

EOD = 2


def write(
    prefix: Path, shards: list[list[list[int]]], vocab_size: int = 500, listed: bool = True, **info: Any
) -> Path:
    """A corpus of the given documents by shard, PREFIX itself where it is one shard."""
    written = []
    for number, documents in enumerate(shards):
        name = prefix if len(shards) == 1 else prefix.with_name(f"{prefix.name}-{number}")
        with IndexedDatasetWriter(name, vocab_size) as writer:
            for document in documents:
                writer.add_document(np.array(document))
        written.append(writer.shard)
    if listed:
        write_shards(prefix, written, writer.dtype, info)
    return prefix


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two shards, EOD 2, all that can be known told."""
    return write(
        tmp_path / "corpus",
        [[[5, 6, EOD], [EOD]], [[7, 8, 9, EOD]]],
        tokenizer={"file": "a.model", "digest": "aa", "vocab_size": 500, "eod_id": EOD},
        append_eod=True,
    )


@given(st.lists(st.integers(0, 2**40) | st.integers(0, 5000), min_size=1, max_size=50))
def test_length_counts(lengths: list[int]) -> None:
    counts = LengthCounts()
    for part in (lengths[:20], lengths[20:]):
        if part:
            counts.add(np.array(part))
    assert (counts.documents, counts.tokens) == (len(lengths), sum(lengths))
    assert (counts.shortest, counts.longest) == (min(lengths), max(lengths))
    for percent in (1, 50, 99, 100):
        exact = int(np.percentile(lengths, percent, method="inverted_cdf"))
        assert exact * (1 - 1 / 2048) <= counts.percentile(percent) <= exact
        assert exact >= 4096 or counts.percentile(percent) == exact
    buckets = counts.buckets()
    assert sum(count for _, _, count in buckets) == len(lengths)
    for low, high, count in buckets:
        assert count == sum(low <= length <= high for length in lengths)


def test_summary(corpus: Path) -> None:
    summary = summarize(corpus)
    entry = json.loads(json.dumps(summary.as_dict()))
    assert entry["lengths"] == {
        "min": 1,
        "mean": 8 / 3,
        "max": 4,
        "percentiles": {"1": 1, "5": 1, "25": 1, "50": 3, "75": 4, "95": 4, "99": 4},
        "histogram": [
            {"from": 1, "to": 1, "documents": 1},
            {"from": 2, "to": 3, "documents": 1},
            {"from": 4, "to": 7, "documents": 1},
        ],
    }
    assert (entry["tokens"], entry["documents"], entry["shards"], entry["bytes"]) == (8, 3, 2, 16)
    assert (entry["dtype"], entry["has_list"], entry["info"]["append_eod"]) == ("uint16", True, True)
    text = str(summary)
    assert "8 (uint16, 16 bytes)" in text
    assert f"2 in {corpus}.shards" in text
    assert "a.model, 500 ids, eod 2, digest aa" in text
    assert "2-3              1 ████" in text
    assert "1, without a list" in str(summarize(f"{corpus}-1"))


def test_samples_are_decoded(tmp_path: Path, sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    texts = [f"document number {number}" for number in range(9)] + ["long " * 300]
    documents = [tokenizer.encode(text).tolist() for text in texts]
    prefix = write(tmp_path / "a", [documents[:4], documents[4:]], vocab_size=tokenizer.vocab_size)
    samples = summarize(prefix, tokenizer, samples=3).samples
    assert [sample.document for sample in samples] == [0, 4, 9]
    assert [sample.text for sample in samples[:2]] == [texts[0], texts[4]]
    assert samples[2].tokens == len(documents[9])
    assert len(samples[2].text) < len(texts[9])
    assert texts[9].startswith(samples[2].text)
    assert len(summarize(prefix, tokenizer, samples=100).samples) == 10
    assert summarize(prefix, tokenizer, samples=0).samples == []
    foreign = write(tmp_path / "b", [[[tokenizer.vocab_size]]], vocab_size=2 * tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"has ids \d+ to \d+, the tokenizer .*not the one that made"):
        summarize(foreign, tokenizer)


def test_a_sample_that_is_shown_in_part_ends_in_dots(tmp_path: Path, sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    word = int(tokenizer.encode("the the")[-1])
    prefix = write(tmp_path / "a", [[[word] * 100, [word] * 101]], vocab_size=tokenizer.vocab_size)
    lines = str(summarize(prefix, tokenizer, samples=2)).splitlines()
    whole, part = (lines[lines.index(f"  document {n} ({100 + n} tokens):") + 1] for n in (0, 1))
    assert not whole.endswith(" ...")
    assert part == f"{whole} ..."


def test_verify_tells_what_it_checked(corpus: Path) -> None:
    result = verify(corpus)
    assert (result.num_defects, result.defects, result.unchecked) == (0, [], [])
    assert result.checked == [
        "digests of the list and of the files of its 2 shard(s)",
        "lengths, pointers and entries of 3 documents",
        "range of 8 token ids: [0, 500)",
        "end of every document: id 2",
    ]
    assert str(result).startswith(f"{corpus}: verified, no defect\n  checked    digests")
    bare = verify(f"{corpus}-0")
    assert bare.num_defects == 0
    assert len(bare.unchecked) == 2


@pytest.mark.parametrize(
    "suffix", ["corpus-0.bin", "corpus-1.bin", "corpus-0.idx", "corpus-1.idx", "corpus.shards"]
)
def test_every_damaged_byte_is_noticed(corpus: Path, suffix: str) -> None:
    path = corpus.with_name(suffix)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        result = verify(corpus)
        assert result.num_defects, f"byte {place} of {suffix}"
        assert suffix in " ".join(result.defects)
    path.write_bytes(whole)
    assert verify(corpus).num_defects == 0


@pytest.mark.parametrize("suffix", ["corpus-0.bin", "corpus-1.idx", "corpus.shards"])
def test_every_truncation_is_noticed(corpus: Path, suffix: str) -> None:
    path = corpus.with_name(suffix)
    whole = path.read_bytes()
    for data in [*(whole[:size] for size in range(len(whole))), whole + b"\0"]:
        path.write_bytes(data)
        assert verify(corpus).num_defects


def test_all_defects_are_told(corpus: Path) -> None:
    bin_path(f"{corpus}-0").unlink()
    data = bytearray(bin_path(f"{corpus}-1").read_bytes())
    data[0] ^= 1
    bin_path(f"{corpus}-1").write_bytes(data)
    index = bytearray(idx_path(f"{corpus}-1").read_bytes())
    index[34] ^= 1
    idx_path(f"{corpus}-1").write_bytes(index)
    text = str(verify(corpus))
    assert "corpus: 3 defect(s)" in text
    assert "corpus-0.bin is missing" in text
    assert "corpus-1.bin: the digest is not the one in the list" in text
    assert "corpus-1.idx is damaged" in text or "corpus-1.idx does not belong" in text


def test_many_defects_are_counted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[[number]] for number in range(MAX_DEFECTS + 5)])
    for number in range(MAX_DEFECTS + 5):
        bin_path(f"{prefix}-{number}").write_bytes(b"\xff\xff")
    result = verify(prefix)
    assert (len(result.defects), result.num_defects) == (MAX_DEFECTS, MAX_DEFECTS + 5)
    assert str(result).endswith("\n  and 5 more")


def test_ids_and_ends_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one, two, three ... tokens: no document's end is lost between two."""
    said = {"file": "a.model", "digest": "aa", "vocab_size": 300, "eod_id": EOD}
    documents = [[1, EOD], [EOD], [3, 4, EOD], [5, EOD, 6], [7, EOD], [EOD, 8]]
    prefix = write(tmp_path / "a", [documents], tokenizer=said, append_eod=True)
    for block in (2, 4, 6, 8, 1024):
        monkeypatch.setattr(mmididx, "BLOCK_BYTES", block)
        assert verify(prefix).defects == [
            f"{prefix}.bin: 2 documents do not end with 2, the first before "
            "token 9, where one ends with id 6."
        ]
    prefix = write(tmp_path / "b", [[[1, 300, EOD]]], tokenizer=said, append_eod=True)
    assert verify(prefix).defects == [f"{prefix}.bin: token ids go from 0 to 300, but the tokenizer has 300."]
    prefix = write(tmp_path / "c", [[[5, 6]]], tokenizer=said, append_eod=False)
    assert verify(prefix).defects == []


def test_negative_ids(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[[5, 6]]], vocab_size=100_000, listed=False)
    bin_path(prefix).write_bytes(np.array([5, -6], dtype="<i4").tobytes())
    assert verify(prefix).defects == [f"{prefix}.bin: token ids go from -6 to 5, but no id is negative."]


def test_the_tokenizer_is_compared(tmp_path: Path, sentencepiece_model: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    said = {
        "file": "small.model",
        "digest": tokenizer_digest(sentencepiece_model),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
    }
    prefix = write(tmp_path / "a", [[[5, tokenizer.eod_id]]], tokenizer=said, append_eod=True)
    assert verify(prefix, sentencepiece_model).defects == []
    text = "\n".join(verify(prefix, tokenizer_json).defects)
    assert f"made with the tokenizer small.model with digest {said['digest']}" in text
    with pytest.raises(ValueError, match="missing"):
        verify(prefix, tmp_path / "nothing.model")
    silent = write(tmp_path / "b", [[[5]]])
    assert "the corpus does not name its tokenizer" in str(verify(silent, sentencepiece_model))
    foreign = write(tmp_path / "c", [[[tokenizer.vocab_size]]], listed=False, vocab_size=60_000)
    assert "token ids go from" in str(verify(foreign, sentencepiece_model))


@pytest.mark.parametrize(
    "info", [{"tokenizer": 5}, {"tokenizer": {"vocab_size": "many", "eod_id": None}, "append_eod": True}]
)
def test_strange_info_is_no_obstacle(tmp_path: Path, info: dict[str, Any]) -> None:
    prefix = write(tmp_path / "a", [[[5, 6]]], **info)
    assert verify(prefix).num_defects == 0
    assert summarize(prefix).corpus.info == info


def test_stale_combinations_are_noticed(corpus: Path) -> None:
    """A pair of equal size and counts beside the list of another."""
    shards = list(ShardedDataset(corpus).shards)
    with IndexedDatasetWriter(f"{corpus}-0", 500) as writer:
        writer.add_documents(np.array([9, 9, EOD, EOD]), [3, 1])
    assert [defect.split(": ")[1] for defect in verify(corpus).defects] == [
        "the digest is not the one in the list."
    ]
    write_shards(corpus, [replace(shards[0], documents=1), shards[1]], np.dtype("<u2"), {})
    assert "documents by the list: 1, in the file: 2" in str(verify(corpus))
    shards_path(corpus).unlink()
    assert "corpus.idx is missing" in str(verify(corpus))


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[2] / "tools" / "inspect_dataset.py"
    return subprocess.run(
        [sys.executable, tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


def test_command_line(corpus: Path, tmp_path: Path, sentencepiece_model: Path) -> None:
    done = run_tool(corpus, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified, no defect" in done.stdout
    bare = f"{corpus}-1"
    done = run_tool(corpus, bare, "--json", "--verify", "--samples", 1, "--tokenizer", sentencepiece_model)
    entries = json.loads(done.stdout)
    assert [entry["prefix"] for entry in entries] == [str(corpus), bare]
    assert [len(entry["samples"]) for entry in entries] == [1, 1]
    assert "digest aa" in entries[0]["verification"]["defects"][0]
    assert done.returncode == 1
    missing = run_tool(tmp_path / "nothing", bare)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert f"{bare}\n" in missing.stdout


def test_damage_is_told_on_the_command_line(corpus: Path) -> None:
    os.truncate(bin_path(f"{corpus}-1"), 3)
    done = run_tool(corpus, "--verify")
    assert done.returncode == 1
    assert "corpus: 1 defect(s)" in done.stdout
    os.truncate(shards_path(corpus), 30)
    done = run_tool(corpus, "--verify")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1


def test_a_verification_without_defects_is_silent_about_them() -> None:
    assert "DEFECT" not in str(Verification("a"))
