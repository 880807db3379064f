"""Files of all kinds of content: each has an outcome, whether defective rows are errors or are skipped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_iiet.data.preprocess import PreprocessOptions, preprocess
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from tests.data.inputs import GOOD_TEXTS, INPUT_CASES, InputCase, jsonl
from tests.data.preprocess_runs import documents, leftovers, published, run_tool
from tests.data.test_cutting import byte_level
from tests.marks import long_but

pytestmark = pytest.mark.slow  # a process for each of many files; test_text.py has the outcomes without


SOME_CASES = long_but(INPUT_CASES, *INPUT_CASES[::5])


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    return PreprocessOptions(
        inputs=["replaced"],
        output_prefix=f"{tmp_path}/out",
        tokenizer_model=str(sentencepiece_model),
        chunk_bytes=100,
        progress=False,
    )


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_bad_rows_are_errors(options: PreprocessOptions, tmp_path: Path, case: InputCase) -> None:
    path = case.write(tmp_path)
    options = replace(options, inputs=[str(path)])
    if not case.error and not case.rejects and not any(case.texts):
        with pytest.raises(ValueError, match="The inputs hold no documents"):
            preprocess(options, log=lambda _: None)
        assert published(tmp_path) == {}
        return
    report = preprocess(options, log=lambda _: None)
    if case.error or case.rejects:
        (failure,) = report.failures
        expected = case.error or case.rejects[0][2]
        assert re.search(expected, str(failure))
        assert str(path) in str(failure)
        assert "\n" not in str(failure)
        assert report.exit_code == 1
        assert published(tmp_path) == {}
        assert leftovers(tmp_path) == []
    else:
        assert report.exit_code == 0
        tokenizer = load_tokenizer(options.tokenizer_model)
        expected_documents = [tokenizer.encode(text).tolist() for text in case.texts if text]
        assert documents(f"{options.output_prefix}_text_document") == expected_documents


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_bad_rows_are_skipped(options: PreprocessOptions, tmp_path: Path, case: InputCase) -> None:
    path = case.write(tmp_path)
    good = tmp_path / "good.jsonl"
    good.write_bytes(jsonl(GOOD_TEXTS))
    options = replace(options, inputs=[str(path), str(good)], bad_rows="skip")
    report = preprocess(options, log=lambda _: None)
    if case.error:
        assert re.search(case.error, str(report.failures[0]))
        assert report.exit_code == 1
        assert published(tmp_path) == {}
        return
    assert report.exit_code == 0
    tokenizer = load_tokenizer(options.tokenizer_model)
    expected = [tokenizer.encode(text).tolist() for text in [*case.texts, *GOOD_TEXTS] if text]
    assert documents(f"{options.output_prefix}_text_document") == expected
    counts = report.all_units.counts
    reasons = [reason for _, reason, _ in case.rejects]
    assert counts.rejected == {reason: reasons.count(reason) for reason in reasons}
    assert counts.empty == sum(not text for text in case.texts)
    for line, reason, _ in case.rejects:
        assert any(f"{path}, line {line}: " in offender for offender in counts.offenders[reason])
        assert f"left out: {reasons.count(reason)} rows, {reason}, such as" in str(report)


def test_first_offenders_of_many(options: PreprocessOptions, tmp_path: Path) -> None:
    content = b"".join(jsonl(GOOD_TEXTS) + b"no json\n" for _ in range(30))
    (tmp_path / "a.jsonl").write_bytes(content)
    expected = None
    for workers in (1, 2):
        done = run_tool(
            *(
                "--input",
                tmp_path / "a.jsonl",
                "--output-prefix",
                options.output_prefix,
                "--bad-rows",
                "skip",
            ),
            *("--tokenizer-model", options.tokenizer_model, "--workers", workers, "--overwrite"),
        )
        assert done.returncode == 0, done.stderr
        report = [line for line in done.stdout.splitlines() if line.startswith(("left out", "    "))]
        assert report[0] == "left out: 30 rows, invalid JSON, such as"
        assert [int(line.split("line ")[1].split(":")[0]) for line in report[1:]] == [11, 22, 33, 44, 55]
        assert expected in (None, report)
        expected = report


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_cannot_be_cut_is_a_bad_row(
    options: PreprocessOptions, tmp_path: Path, workers: int
) -> None:
    """Where the tokenizer takes texts in no parts; a giant line as well as one that is read whole."""
    words = tmp_path / "words"
    words.mkdir()
    definition = json.loads(byte_level(words, r"\p{L}+|\P{L}").read_text())
    (words / "tokenizer.json").write_text(json.dumps(definition))
    texts = ["ba ce", "x y " * 300_000, "de", "x y " * 2_500_000, "fi"]
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    options = replace(
        options,
        inputs=[str(tmp_path / "in.jsonl")],
        tokenizer_model=str(words / "tokenizer.json"),
        max_uncut_bytes=1_100_000,
        workers=workers,
    )
    (failure,) = preprocess(options, log=lambda _: None).failures
    assert re.search(
        r"in\.jsonl, line 2: the text has no place for 1,100,000 bytes where .*json may cut", str(failure)
    )
    report = preprocess(replace(options, bad_rows="skip"), log=lambda _: None)
    assert report.all_units.counts.rejected == {"too long to encode": 2}
    assert len(documents(f"{options.output_prefix}_text_document")) == 3
