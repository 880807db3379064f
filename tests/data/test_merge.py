"""Joining corpora: the bytes of one written at once, every refusal, and no trace of a failed merge."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter, write_index
from megatron_iiet.data.corpora.making import Identity, Making
from megatron_iiet.data.corpora.merge import expand_corpora, merge, shifted
from megatron_iiet.data.corpora.mmididx import (
    DigestedFile,
    DocumentIndex,
    bin_path,
    file_digest,
    idx_path,
    shards_path,
)
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.corpora.streams import IndexedDataset, ShardedDataset, open_corpus
from megatron_iiet.data.corpora.verification import verify
from tests.data.crash import run_until_killed
from tests.data.inputs import listing, write_pair

TOKENIZER = {"file": "a.model", "digest": "aa", "vocab_size": 60000, "eod_id": 2}


def write(prefix: Path, lengths: list[int], start: int = 0, listed: bool = True, **info: Any) -> Path:
    """A corpus of one pair; its tokens count up from ``start``."""
    vocab_size = info.pop("vocab_size", 60000)
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        writer.add_documents(np.arange(start, start + sum(lengths)), lengths)
    if listed:
        write_shards(prefix, [writer.shard], writer.dtype, info)
    return prefix


def join(inputs: list[Path], output: Path, **options: Any) -> str:
    return str(merge([str(path) for path in inputs], str(output), **options))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpora=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5),
    vocab_size=st.sampled_from([60000, 300000]),
    listed=st.booleans(),
    by_reference=st.booleans(),
)
def test_equals_one_corpus_written_at_once(
    tmp_path: Path, corpora: list[list[int]], vocab_size: int, listed: bool, by_reference: bool
) -> None:
    start, inputs = 0, []
    for number, lengths in enumerate(corpora):
        name = tmp_path / f"in{number}"
        shards_path(name).unlink(missing_ok=True)
        inputs.append(write(name, lengths, start, listed, vocab_size=vocab_size))
        start += sum(lengths)
    whole = write(tmp_path / "whole", [n for lengths in corpora for n in lengths], vocab_size=vocab_size)
    join(inputs, tmp_path / "out", by_reference=by_reference, overwrite=True)
    merged = open_corpus(tmp_path / "out")
    assert merged.read(0, start).tolist() == list(range(start))
    assert merged.num_documents == sum(map(len, corpora))
    assert (
        merged.document_starts(0, start).tolist() == IndexedDataset(whole).document_starts(0, start).tolist()
    )
    assert verify(tmp_path / "out").defects == []
    if by_reference:
        assert not bin_path(tmp_path / "out").exists()
    else:
        assert bin_path(tmp_path / "out").read_bytes() == bin_path(whole).read_bytes()
        assert idx_path(tmp_path / "out").read_bytes() == idx_path(whole).read_bytes()
        assert isinstance(merged, ShardedDataset)
        assert [shard.name for shard in merged.shards] == ["out"]


def test_documents_of_many_sequences_stay_as_they_are(tmp_path: Path) -> None:
    first = write_pair(tmp_path / "a", [4, 6, 5], [0, 2, 2, 3])
    second = write_pair(tmp_path / "b", [1, 2], [0, 2, 2])
    join([first, second], tmp_path / "out")
    index = DocumentIndex(idx_path(tmp_path / "out"))
    assert index.lengths.tolist() == [4, 6, 5, 1, 2]
    assert index.offsets.tolist() == [0, 8, 20, 30, 32]
    assert index.first_sequences.tolist() == [0, 2, 2, 3, 5, 5]
    assert open_corpus(tmp_path / "out").document(3).tolist() == [0, 1, 2]


def test_merging_merged_lists(tmp_path: Path) -> None:
    inputs = [write(tmp_path / name, [2, 3], start) for name, start in (("a", 0), ("b", 5), ("c", 10))]
    (tmp_path / "elsewhere").mkdir()
    join(inputs[:2], tmp_path / "ab", by_reference=True)
    join([tmp_path / "ab", inputs[2]], tmp_path / "elsewhere" / "abc", by_reference=True)
    corpus = open_corpus(tmp_path / "elsewhere" / "abc")
    assert isinstance(corpus, ShardedDataset)
    assert [shard.name for shard in corpus.shards] == [str(path) for path in inputs]
    assert [shard.name for shard in ShardedDataset(tmp_path / "ab").shards] == ["a", "b"]
    join([tmp_path / "elsewhere" / "abc"], tmp_path / "copy")
    assert open_corpus(tmp_path / "copy").read(0, 15).tolist() == list(range(15))


def test_entries_beyond_32_bits(tmp_path: Path) -> None:
    """Inputs of 2**31 tokens and more each, without a token file: the joined index is what counts."""
    half, inputs = 2**31 - 1, []
    for number, lengths in enumerate(([half, 7], [half, half])):
        with (tmp_path / f"{number}.idx").open("wb") as file:
            array = np.array(lengths)
            write_index(
                DigestedFile(file), np.dtype("<i4"), 2, 2, lambda a=array: iter([a]), iter([np.arange(2)])
            )
        inputs.append(IndexOnly(DocumentIndex(tmp_path / f"{number}.idx")))
    with (tmp_path / "out.idx").open("wb") as file:
        write_index(
            DigestedFile(file),
            np.dtype("<i4"),
            4,
            4,
            lambda: (block for pair in inputs for block in pair.index.length_blocks()),
            shifted(inputs),
        )
    index = DocumentIndex(tmp_path / "out.idx")
    assert [index.document_start(i) for i in range(5)] == [0, half, half + 7, 2 * half + 7, 3 * half + 7]
    assert list(index.defects()) == []


class IndexOnly:
    def __init__(self, index: DocumentIndex) -> None:
        self.index = index


def test_documents_are_counted_beyond_32_bits() -> None:
    class Huge:
        num_sequences, num_documents = 2**31, 1
        first_sequences = memoryview(np.array([2**31 - 1, 2**31]))

    found = [block.tolist() for block in shifted([IndexOnly(Huge()) for _ in range(3)])]  # type: ignore[arg-type]
    assert found == [[2**31 - 1], [2**32 - 1], [2**32 + 2**31 - 1]]


class TestInfo:
    def test_what_all_say_is_passed_on(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a", [2], tokenizer=TOKENIZER, append_eod=True, options={"seed": 1})
        second = write(
            tmp_path / "b", [3], tokenizer=TOKENIZER | {"file": "copy.model"}, append_eod=True, options={}
        )
        join([first, second], tmp_path / "out")
        merged = open_corpus(tmp_path / "out")
        assert isinstance(merged, ShardedDataset)
        assert merged.info == {
            "tokenizer": TOKENIZER,
            "append_eod": True,
            "made_by": "tools/merge_datasets.py",
        }

    def test_different_tokenizers_are_refused(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a", [2], tokenizer=TOKENIZER)
        second = write(tmp_path / "b", [3], tokenizer=TOKENIZER | {"file": "b.model", "digest": "bb"})
        with pytest.raises(ValueError, match=r"a\.model \(digest aa\), .*b with b\.model \(digest bb\)"):
            join([first, second], tmp_path / "out")
        assert not [name for name in listing(tmp_path) if name.startswith("out")]

    def test_different_types_are_refused(self, tmp_path: Path) -> None:
        inputs = [write(tmp_path / "a", [2]), write(tmp_path / "b", [3], vocab_size=100_000)]
        with pytest.raises(ValueError, match=r"a holds uint16 tokens, .*b int32"):
            join(inputs, tmp_path / "out")

    def test_an_unknown_tokenizer_is_told(self, tmp_path: Path) -> None:
        inputs = [write(tmp_path / "a", [2], tokenizer=TOKENIZER), write(tmp_path / "b", [3], listed=False)]
        report = join(inputs, tmp_path / "out")
        assert "note: " in report
        assert "b does not say which tokenizer made it" in report
        assert "tokenizer" not in ShardedDataset(tmp_path / "out").info


class TestInputs:
    def test_globs_are_sorted_and_the_order_given_is_kept(self, tmp_path: Path) -> None:
        for name in ("p2", "p10", "p1", "first"):
            write(tmp_path / name, [2], listed=name != "p1")
        found = expand_corpora([f"{tmp_path}/first.shards", f"{tmp_path}/p*"])
        assert [Path(prefix).name for prefix in found] == ["first", "p1", "p10", "p2"]
        assert expand_corpora([f"{tmp_path}/p*.shards"]) == [f"{tmp_path}/p10", f"{tmp_path}/p2"]
        assert expand_corpora([f"{tmp_path}/p1.idx"]) == [f"{tmp_path}/p1"]

    def test_a_name_with_brackets_is_a_name(self, tmp_path: Path) -> None:
        write(tmp_path / "a[1]", [2])
        assert expand_corpora([f"{tmp_path}/a[1]"]) == [f"{tmp_path}/a[1]"]

    def test_refusals(self, tmp_path: Path) -> None:
        first, second = write(tmp_path / "a", [2]), write(tmp_path / "b", [3])
        join([first, second], tmp_path / "list", by_reference=True)
        before = listing(tmp_path)
        for inputs, output, message in (
            (["nothing*"], "out", "No corpus matches .*nothing"),
            (["a", "b", "a.idx"], "out", "a is given twice"),
            (["list", "a"], "out", "hold the pair .*a twice"),
            (["a", "missing"], "out", r"missing\.idx is missing"),
            (["a", "b"], "b", "one of the inputs"),
            (["list"], "a", r"The inputs read .*a, the output prefix"),
            (["a", "b"], "a.bin/out", r"out cannot be written: .*a\.bin is a file"),
            (["a", "b"], "", "ends in a slash"),
        ):
            with pytest.raises(ValueError, match=message):
                join([f"{tmp_path}/{name}" for name in inputs], f"{tmp_path}/{output}", overwrite=True)
            assert listing(tmp_path) == before

    def test_what_preprocessing_claims_is_not_replaced(self, tmp_path: Path) -> None:
        claim = tmp_path / "out.preprocess" / "outputs" / "text_document"
        claim.parent.mkdir(parents=True)
        claim.write_text("{}")
        with pytest.raises(ValueError, match="_text_document is an output of preprocessing, which"):
            join([write(tmp_path / "a", [2])], tmp_path / "out_text_document", overwrite=True)

    @pytest.mark.parametrize("suffix", ["bin", "idx", "shards"])
    def test_existing_output_needs_overwrite(self, tmp_path: Path, suffix: str) -> None:
        inputs = [write(tmp_path / "a", [2])]
        write(tmp_path / "out", [9])
        path = tmp_path / f"out.{suffix}"
        for other in listing(tmp_path):
            if other.startswith("out.") and other != path.name:
                (tmp_path / other).unlink()
        content = path.read_bytes()
        with pytest.raises(ValueError, match=rf"out\.{suffix} exists; .*--overwrite"):
            join(inputs, tmp_path / "out")
        assert path.read_bytes() == content
        known = [Identity(len(content), file_digest(path).hex())] if suffix != "shards" else []
        Making(tmp_path / "out.merging").note(path, known)  # a merge was killed
        if known:  # and somebody put another file there since
            path.write_bytes(content[::-1])
            with pytest.raises(ValueError, match=rf"out\.{suffix} is there .*, and no shard list .* as it"):
                join(inputs, tmp_path / "out", overwrite=True)
            path.write_bytes(content)
        join(inputs, tmp_path / "out", overwrite=True)
        assert open_corpus(tmp_path / "out").num_tokens == 2
        assert "out.merging" not in listing(tmp_path)

    @pytest.mark.parametrize("by_reference", [False, True])
    def test_what_no_list_names_is_never_replaced(self, tmp_path: Path, by_reference: bool) -> None:
        """A bare pair, a pair beside a list of others, and a file that is no list."""
        inputs = [write(tmp_path / "a", [2])]
        write(tmp_path / "bare", [9], listed=False)
        write(tmp_path / "beside", [9], listed=False)
        shutil.copy(tmp_path / "a.shards", tmp_path / "beside.shards")
        (tmp_path / "foreign.shards").write_bytes(b"precious")
        over = bin_path(write(tmp_path / "over", [9]))  # and one that took the place of a listed one
        over.write_bytes(over.read_bytes()[::-1])
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        names = (("bare", "bare.bin"), ("beside", "beside.bin"), ("over", "over.bin"))
        for name, file in (*names, ("foreign", "foreign.shards")):
            with pytest.raises(ValueError, match=f"{file} is there already, and no shard list .* names it"):
                join(inputs, tmp_path / name, by_reference=by_reference, overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_list_takes_the_place_of_a_pair(self, tmp_path: Path) -> None:
        write(tmp_path / "out", [9])
        join([write(tmp_path / "a", [2])], tmp_path / "out", by_reference=True, overwrite=True)
        assert listing(tmp_path) == ["a.bin", "a.idx", "a.shards", "out.shards"]


DAMAGES = {
    r"b\.bin is damaged: its digest is": (bin_path, 3),
    r"b\.idx is damaged: its digest is": (idx_path, -9),  # the second of three documents starts earlier
    r"b\.idx: sequence 0 does not end where": (idx_path, 34),
    r"b\.idx is not a Megatron index": (idx_path, 0),
}


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_inputs_leave_no_trace(tmp_path: Path, message: str, by_reference: bool) -> None:
    inputs = [write(tmp_path / "a", [2]), write(tmp_path / "b", [3, 4, 1, 2])]
    name, place = DAMAGES[message]
    data = bytearray(name(inputs[1]).read_bytes())
    data[place if place >= 0 else len(data) - 8 * 3] ^= 1
    name(inputs[1]).write_bytes(data)
    before = listing(tmp_path)
    if by_reference and "bin" in message:
        join(inputs, tmp_path / "out", by_reference=True)  # reads no token: that is --verify's work
        assert verify(tmp_path / "out").num_defects == 1
        return
    with pytest.raises(ValueError, match=message):
        join(inputs, tmp_path / "out", by_reference=by_reference)
    assert listing(tmp_path) == before


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files, met in the tokens, in the index and in the list."""
    inputs = [write(tmp_path / name, [1] * 3000, notes="x" * 200_000) for name in ("a", "b")]
    before = listing(tmp_path)
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limited, by_reference in ((10_000, False), (60_000, False), (150_000, False), (100, True)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limited, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                join(inputs, tmp_path / "out", by_reference=by_reference)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("by_reference", [False, True])
def test_killed_at_any_step(tmp_path: Path, by_reference: bool) -> None:
    """The old corpus, the new one, or nothing that opens; and the next run works."""
    inputs = [write(tmp_path / "a", [2]), write(tmp_path / "b", [3], 2)]
    outcomes = set()
    for step in range(1000):
        write(tmp_path / "out", [4], 100)
        finished = run_until_killed(
            lambda: join(inputs, tmp_path / "out", by_reference=by_reference, overwrite=True), step
        )
        try:
            corpus = open_corpus(tmp_path / "out")
            outcomes.add(tuple(corpus.read(0, corpus.num_tokens).tolist()))
            assert corpus.document_starts(0, corpus.num_tokens)[0] == 0
        except ValueError as error:
            assert "the writing did not finish" in str(error)  # noqa: PT017
        join(inputs, tmp_path / "out", by_reference=by_reference, overwrite=True)
        assert open_corpus(tmp_path / "out").read(0, 5).tolist() == [0, 1, 2, 3, 4]
        assert not [name for name in listing(tmp_path) if name.endswith(".partial")]
        if finished:
            break
    assert outcomes == {(100, 101, 102, 103), (0, 1, 2, 3, 4)}


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[2] / "tools" / "merge_datasets.py"
    return subprocess.run(
        [sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path: Path) -> None:
    write(tmp_path / "a", [2])
    write(tmp_path / "b", [3], 2)
    os.truncate(bin_path(write(tmp_path / "bad", [3])), 2)
    done = run_tool("--inputs", tmp_path / "[ab]", "--output-prefix", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"{tmp_path}/out.shards: 5 tokens in 2 documents, joined from 2 corpora (2 shards)\n"
    )
    assert open_corpus(tmp_path / "out").read(0, 5).tolist() == [0, 1, 2, 3, 4]
    failed = run_tool("--inputs", tmp_path / "bad", "--output-prefix", tmp_path / "out2", "--by-reference")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ")
    assert "bad.bin does not belong to" in failed.stderr
    assert json.dumps(listing(tmp_path)).count("out") == 3
