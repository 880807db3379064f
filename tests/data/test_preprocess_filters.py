"""Sample, held-out splits, duplicates: which documents are kept, and that only their text decides."""

from __future__ import annotations

import random
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, dedup, preprocess
from megatron_iiet.data.preprocess.dedup import DigestFiles, Duplicates, find_duplicates
from megatron_iiet.data.preprocess.estimate import estimate
from megatron_iiet.data.preprocess.records import Unit
from megatron_iiet.data.preprocess.tasks import Filters, text_digest
from megatron_iiet.data.reading.sources import InputFile, list_inputs
from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from tests.data.inputs import listing, make_texts
from tests.data.preprocess_runs import documents, write_rows

TEXTS = make_texts(400, seed=5)


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    (tmp_path / "in").mkdir()
    for number in range(4):
        rows = ({"text": text} for text in TEXTS[number * 100 : number * 100 + 100])
        write_rows(tmp_path / "in" / f"{number}.jsonl.zst", rows)
    return PreprocessOptions(
        inputs=[f"{tmp_path}/in"],
        output_dir=f"{tmp_path}/out",
        tokenizer_model=str(sentencepiece_model),
        progress=False,
    )


@pytest.fixture
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_model)


def run(options: PreprocessOptions) -> PreprocessReport:
    report = preprocess(options, log=lambda _: None)
    assert report.exit_code == 0, [str(failure) for failure in report.failures]
    return report


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text).tolist() for text in texts]


# Sample


@pytest.mark.slow
def test_sample_is_a_choice_by_text_alone(
    options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpus_tokens = sum(map(len, encoded(tokenizer, TEXTS)))
    options = replace(options, sample_tokens=corpus_tokens // 3, corpus_tokens=corpus_tokens)
    report = run(options)
    filters = Filters(rate=options.sample_tokens / corpus_tokens, seed=1234)  # type: ignore[operator]
    kept = [text for text in TEXTS if filters.sampled(text_digest(text))]
    assert documents(tmp_path / "out" / "text_document") == encoded(tokenizer, kept)
    assert 90 < len(kept) < 180
    assert report.all_units.counts.sampled_out == 400 - len(kept)
    assert f"tokens of {corpus_tokens // 3 / 1000:.4g} K wanted (rate 0.3333)" in str(report)

    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    path = write_rows(tmp_path / "shuffled.jsonl", ({"text": text} for text in shuffled))
    run(replace(options, inputs=[str(path)], output_dir=f"{tmp_path}/shuffled"))
    found = documents(tmp_path / "shuffled" / "text_document")
    assert found == encoded(tokenizer, [text for text in shuffled if text in set(kept)])

    run(replace(options, seed=1, output_dir=f"{tmp_path}/other"))
    other = documents(tmp_path / "other" / "text_document")
    assert other != encoded(tokenizer, kept)
    assert abs(len(other) - len(kept)) < 60


def test_estimated_rate(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    lines: list[str] = []
    options = replace(options, sample_tokens=4000)
    report = preprocess(options, log=lines.append)
    tokens = sum(map(len, encoded(tokenizer, TEXTS)))
    assert report.rate == pytest.approx(4000 / tokens, rel=0.02)
    assert any("of 4 inputs)" in line and line.startswith("sample: ") for line in lines)
    assert run(replace(options, num_jobs=2, job=1)).rate == report.rate


@pytest.mark.slow
@pytest.mark.parametrize("append_eod", [True, False])
def test_an_estimate_counts_ends_of_documents(
    append_eod: bool, options: PreprocessOptions, tokenizer: Tokenizer
) -> None:
    """All of these small files are looked at, so what was counted is exact."""
    lines: list[str] = []
    preprocess(replace(options, sample_tokens=4000, append_eod=append_eod), log=lines.append)
    (line,) = (line for line in lines if line.startswith("sample: "))
    counted = int(line.split("by ")[1].split()[0].replace(",", ""))
    assert counted == sum(map(len, encoded(tokenizer, TEXTS))) + append_eod * len(TEXTS)


def test_an_estimate_looks_at_inputs_from_the_first_to_the_last(
    options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """At every second of 31; file n has n + 1 rows."""
    names = [tmp_path / f"{number:02}.jsonl" for number in range(31)]
    for number, name in enumerate(names):
        write_rows(name, ({"text": text} for text in TEXTS[: number + 1]))
    _, looked_at = estimate(options, list_inputs([str(name) for name in names]), tokenizer)
    each = [ids.size + options.append_eod for ids in tokenizer.encode_batch(TEXTS[:31])]
    tokens = sum(sum(each[: number + 1]) for number in range(0, 31, 2))
    assert looked_at == f"{tokens:,} tokens of 16 inputs"


@pytest.mark.slow
def test_estimate_of_larger_files(options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Only the start of each is looked at, and stored bytes are put in proportion."""
    texts = make_texts(30_000, seed=6)
    path = write_rows(tmp_path / "large.jsonl.zst", ({"text": text} for text in texts))
    damaged = write_rows(tmp_path / "cut.jsonl.zst", ({"text": text} for text in TEXTS))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    options = replace(options, inputs=[str(path), str(damaged)], sample_tokens=10**6, workers=2)
    lines: list[str] = []
    preprocess(options, log=lines.append)
    (line,) = (line for line in lines if line.startswith("sample: "))
    estimate = int(line.split()[3].replace(",", ""))
    tokens = sum(ids.size for ids in tokenizer.encode_batch(texts))
    assert estimate == pytest.approx(tokens, rel=0.05)
    assert int(line.split("by ")[1].split()[0].replace(",", "")) < tokens / 2


def test_a_sample_of_more_than_all(options: PreprocessOptions) -> None:
    lines: list[str] = []
    report = preprocess(replace(options, sample_tokens=10**9), log=lines.append)
    assert "warning: the corpus is smaller than the sample wanted: all of it is kept" in lines
    assert report.all_units.total.documents == 400


# Held-out splits


@pytest.mark.slow
def test_held_out_splits(options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer) -> None:
    options = replace(options, holdout_validation=0.2, holdout_test=0.1)
    run(options)
    filters = Filters(validation=0.2, test=0.1)
    sizes = {}
    for split in ("train", "validation", "test"):
        texts = [text for text in TEXTS if filters.split(text_digest(text)) == split]
        assert documents(tmp_path / "out" / f"{split}_text_document") == encoded(tokenizer, texts)
        sizes[split] = len(texts)
    assert sum(sizes.values()) == 400
    assert 50 < sizes["validation"] < 115
    assert 20 < sizes["test"] < 65


def test_splits_are_independent_of_the_sample() -> None:
    digests = [text_digest(str(number)) for number in range(20_000)]
    held_out = Filters(rate=0.1, seed=1, validation=0.1)
    sampled = [digest for digest in digests if held_out.sampled(digest)]
    assert len(sampled) == pytest.approx(2000, rel=0.1)
    in_validation = sum(held_out.split(digest) == "validation" for digest in sampled)
    assert in_validation == pytest.approx(200, rel=0.25)
    for digest in digests[:100]:
        assert held_out.split(digest) == replace(held_out, seed=2, rate=None).split(digest)


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    digests = [text_digest(str(number)) for number in range(2000)]
    small, large = ({d for d in digests if Filters(rate=rate).sampled(d)} for rate in (0.1, 0.3))
    assert small < large


# Duplicates


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates(options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    rows = [
        TEXTS[:50] + TEXTS[10:20],
        TEXTS[:5] + TEXTS[60:70] + [""] * 3,
        ["", TEXTS[60] + " ", *TEXTS[60:62]],
    ]
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", ({"text": text} for text in texts))
        for name, texts in zip("ban", rows, strict=True)
    ]
    options = replace(options, inputs=list(map(str, paths)), deduplicate=True, workers=workers)
    report = run(options)
    expected = [*TEXTS[:50], *TEXTS[60:70], TEXTS[60] + " "]
    assert documents(tmp_path / "out" / "text_document") == encoded(tokenizer, expected)
    assert report.all_units.counts.duplicates == 10 + 5 + 2
    assert report.all_units.counts.empty == 4
    run(replace(options, output_dir=None, output_prefix=f"{tmp_path}/one"))
    assert documents(tmp_path / "one_text_document") == encoded(tokenizer, expected)


def test_defective_rows_do_not_shift_duplicates(
    options: PreprocessOptions, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "defects.jsonl"
    path.write_text('\n{"text": "ba"}\nno json\n{"text": "ce"}\n\n\n{"text": "ba"}\n{"text": "di"}\n\n')
    options = replace(options, inputs=[str(path)], deduplicate=True, bad_rows="skip", chunk_bytes=1)
    report = run(options)
    assert documents(tmp_path / "out" / "text_document") == encoded(tokenizer, ["ba", "ce", "di"])
    assert report.all_units.counts.duplicates == 1
    assert report.all_units.counts.rejected == {"blank line": 3, "invalid JSON": 1}


LINES = st.lists(st.lists(st.integers(0, 12), max_size=40), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=60)
@given(LINES, st.integers(1, 9), st.integers(1, 5))
def test_find_duplicates(
    tmp_path_factory: pytest.TempPathFactory, lines: list[list[int]], part: int, block: int
) -> None:
    """Against a set, with many partitions and blocks; 0 is a line without a document."""
    records = tmp_path_factory.mktemp("records")
    digests = DigestFiles(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_PARTITION_ENTRIES", part)
        patch.setattr(dedup, "_MAX_PARTITIONS", 8)
        patch.setattr(dedup, "_BLOCK_ENTRIES", block)
        units = [Unit(number, [InputFile(str(number), 1, "")]) for number in range(len(lines))]
        for unit, unit_lines in zip(units, lines, strict=True):
            # Halves and leading bits that agree by themselves tell nothing.
            content = b"".join(struct.pack("<QQ", (n % 3) << 62, n) for n in unit_lines)
            digests.write(unit.inputs, [(0, 1, content)])
        find_duplicates(records, units)
    marks = Duplicates(records)
    seen: set[int] = set()
    for number, unit_lines in enumerate(lines):
        expected = []
        for digest in unit_lines:
            expected.append(digest != 0 and digest in seen)
            seen.add(digest)
        assert list(map(bool, marks.marks(number, 1, len(unit_lines)))) == expected
        if unit_lines:
            assert list(map(bool, marks.marks(number, len(unit_lines), 1))) == expected[-1:]
    with pytest.raises(ValueError, match="changed between the two passes"):
        marks.marks(0, 1, len(lines[0]) + 1)


def test_duplicates_are_looked_for_once(tmp_path: Path) -> None:
    """The marks of a search that ended stay, whatever the digests are by then."""
    digests, inputs = DigestFiles(tmp_path), [InputFile("a", 1, "")]
    digests.write(inputs, [(0, 1, b"1" * 16 + b"2" * 16 + b"1" * 16 + bytes(32))])
    find_duplicates(tmp_path, [Unit(0, inputs)])
    assert listing(tmp_path) == ["digests", "duplicates.bin", "duplicates.lock"]
    assert list(Duplicates(tmp_path).marks(0, 1, 5)) == [0, 0, 1, 0, 0]
    assert [list(Duplicates(tmp_path).marks(0, line, 1)) for line in range(1, 6)] == [[0], [0], [1], [0], [0]]
    digests.write(inputs, [(0, 1, b"1" * 32)])
    find_duplicates(tmp_path, [Unit(0, inputs)])
    assert list(Duplicates(tmp_path).marks(0, 1, 5)) == [0, 0, 1, 0, 0]
    dedup.duplicates_path(tmp_path).unlink()
    find_duplicates(tmp_path, [Unit(0, inputs)])
    assert list(Duplicates(tmp_path).marks(0, 1, 2)) == [0, 1]
    with pytest.raises(ValueError, match="changed between the two passes of --deduplicate"):
        Duplicates(tmp_path).marks(0, 2, 2)


def test_large_files_stay_with_the_output(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node's temporary folder may be a small disk, or memory; digests of a corpus are gigabytes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    write_rows(tmp_path / "in" / "again.jsonl", ({"text": text} for text in TEXTS[:5]))
    assert run(replace(options, deduplicate=True)).all_units.counts.duplicates == 5


@pytest.mark.parametrize("same", ["high", "low", "both"])
def test_digests_are_equal_in_both_halves(same: str, tmp_path: Path) -> None:
    """And documents of several inputs and units are numbered through."""
    first, second = (
        struct.pack("<QQ", 1 << 63, 5),
        {
            "high": struct.pack("<QQ", 1 << 63, 6),
            "low": struct.pack("<QQ", 1, 5),
            "both": struct.pack("<QQ", 1 << 63, 5),
        }[same],
    )
    digests = DigestFiles(tmp_path)
    one, other = ([InputFile(name, 1, "") for name in names] for names in ("ab", "cd"))
    digests.write(one, [(0, 1, bytes(16) + first), (1, 2, b"x" * 16)])
    digests.write(other, [(0, 1, b"y" * 32), (1, 1, second)])
    find_duplicates(tmp_path, [Unit(0, one), Unit(1, other)])
    found = [list(Duplicates(tmp_path).marks(number, 1, lines)) for number, lines in enumerate((2, 2, 2, 1))]
    assert found == [[0, 0], [0, 0], [0, 1], [int(same == "both")]]


def test_shares_that_leave_no_choice() -> None:
    digests = [text_digest(str(number)) for number in range(50)]
    assert not Filters(rate=1.0).need_digest
    assert Filters(rate=0.99).need_digest
    assert Filters(validation=0.1).need_digest
    assert Filters(test=0.1).splits
    assert not Filters(rate=0.1).splits
    for digest in digests:
        assert Filters().sampled(digest)
        assert Filters(rate=1.0).sampled(digest)
        assert Filters(rate=1.5).sampled(digest)
        assert not Filters(rate=0.0).sampled(digest)
        assert Filters(validation=1.0).split(digest) == "validation"
        assert Filters(test=1.0).split(digest) == "test"
        assert Filters().split(digest) == "train"


def test_digest_files_know_their_inputs(tmp_path: Path) -> None:
    digests = DigestFiles(tmp_path)
    inputs = [InputFile("a", 1, "x"), InputFile("b", 2, "y")]
    assert not digests.has(inputs)
    digests.write(inputs, [(0, 1, b"1" * 32), (1, 1, b"2" * 16), (1, 4, b"3" * 16)])
    assert digests.has(inputs)
    assert digests.left_out(inputs) == {}
    others = [inputs[0], InputFile("b", 2, "z")]
    assert not digests.has(others)
    digests.write(others, [(0, 1, b"1" * 32)], left_out={"b": "cut"})
    assert (digests.has(others), digests.has(others, whole=False)) == (False, True)
    assert digests.lines(others).tolist() == [2, 0]
    assert digests.left_out(others) == {"b": "cut"}
    (digests.folder / "mine.bin").write_text("")
    digests.remove_all(but=[inputs])
    assert set(digests.folder.iterdir()) == {digests.path(inputs), digests.folder / "mine.bin"}
    assert digests.lines(inputs).tolist() == [2, 4]
    content = b"".join(block.tobytes() for block in digests.blocks(inputs))
    assert content == b"1" * 32 + b"2" * 16 + bytes(32) + b"3" * 16
