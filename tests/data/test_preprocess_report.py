"""What a run of preprocessing tells at its end, its exit status, and how jobs share the work."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm

from megatron_iiet.data.preprocess import work
from megatron_iiet.data.preprocess.lists import PreprocessReport, Summary
from megatron_iiet.data.preprocess.plan import Plan, differences, share
from megatron_iiet.data.preprocess.records import Counts, Total
from megatron_iiet.data.preprocess.work import Failure, Progress
from megatron_iiet.data.reading.sources import InputFile


def summary(units: int, documents: int, tokens: int, counts: Counts | None = None) -> Summary:
    total = Total(documents, tokens, 2 * tokens)
    return Summary(units, {"text_document": total}, counts or Counts())


def test_a_finished_run_tells_of_all_runs_and_of_itself() -> None:
    """What was left out is of all units; speed is of this run."""
    counts = Counts(empty=1, sampled_out=1234, rejected={"no text": 2}, offenders={"no text": ["a, line 1"]})
    report = PreprocessReport(
        all_units=summary(3, 90, 2_500_000, counts),
        this_run=summary(1, 30, 1000, Counts(empty=1)),
        missing=0,
        wanted_tokens=9_999,
        rate=0.25,
        seconds=4.0,
        cpu_seconds=10.0,
    )
    assert str(report).splitlines() == [
        "text_document: 90 documents, 2,500,000 tokens, 5.0 MB",
        "kept 2.5 M tokens of 9.999 K wanted (rate 0.25)",
        "left out: 1 empty documents",
        "left out: 1,234 documents outside the sample",
        "left out: 2 rows, no text, such as",
        "    a, line 1",
        "this run: 1 shards of 30 documents, 1,000 tokens in 4.0 s (250 tokens/s, 100 tokens/CPU-s)",
    ]


def test_an_unfinished_run_tells_of_itself_and_of_the_others() -> None:
    counts = Counts(duplicates=7)
    report = PreprocessReport(summary(2, 60, 2000, Counts(empty=9)), summary(1, 30, 1000, counts), missing=4)
    first, *_, last = str(report).splitlines()
    assert first == "left out: 7 duplicates"
    assert last == "4 shards of other jobs are missing; the job that finishes last writes the lists."


FAILURES = [Failure([], "broken")]


@pytest.mark.parametrize(
    ("mine_missing", "failures", "waiting", "status"),
    [
        (0, [], "", 0),
        (1, [], "", 1),
        (1, [], "for others", 75),
        (1, FAILURES, "", 1),
        (0, FAILURES, "", 1),
        (1, FAILURES, "for others", 1),
        (0, [], "for others", 75),
    ],
)
def test_exit_status(mine_missing: int, failures: list[Failure], waiting: str, status: int) -> None:
    nothing = Summary()
    report = PreprocessReport(nothing, nothing, 3, mine_missing, failures, waiting)
    assert report.exit_code == status


@pytest.mark.parametrize(
    ("paths", "message", "said"),
    [
        (["a.jsonl"], "out of memory", "a.jsonl: out of memory"),
        (["a.jsonl", "b.jsonl", "c.jsonl"], "out of memory", "a.jsonl and 2 more: out of memory"),
        (["a.jsonl", "b.jsonl"], "b.jsonl is empty", "b.jsonl is empty"),
    ],
)
def test_a_failure_says_of_what_inputs(paths: list[str], message: str, said: str) -> None:
    assert str(Failure([InputFile(path, 1, "") for path in paths], message)) == said


def units_of(*sizes: int) -> list[list[InputFile]]:
    return [[InputFile(f"{number}", size, "")] for number, size in enumerate(sizes)]


def test_jobs_share_by_size_the_largest_first() -> None:
    """8 to job 0, 5 and 4 to job 1, 3 to job 0, and of the last two one to each."""
    units = units_of(2, 5, 8, 3, 4, 2)
    assert [share(units, 2, job) for job in (0, 1)] == [[2, 3, 5], [1, 4, 0]]
    assert share(units, 1, 0) == [2, 1, 4, 3, 0, 5]


def test_other_options_are_told_with_both_values() -> None:
    plan = Plan({"seed": 1, "split_by": None}, {}, None, [], 0)
    assert differences(plan, {"seed": 1, "split_by": None}) == []
    assert differences(plan, {"seed": 2, "split_by": "x"}) == ["seed: 1 -> 2", 'split_by: null -> "x"']


def test_inputs_that_were_left_out_are_told() -> None:
    skipped = {"b": "b is cut", **{f"c{number:02}": "no such file" for number in range(25)}}
    whole = Summary(1, {"text_document": Total(1, 2, 4)}, Counts(), skipped)
    told = str(PreprocessReport(whole, Summary(), missing=0)).splitlines()
    assert told[1:4] == [
        "left out: 26 inputs that cannot be read, such as",
        "    b is cut",
        "    c00: no such file",
    ]
    assert len(told) == 22


@pytest.mark.parametrize("enabled", [True, False])
def test_a_log_file_gets_a_line_of_progress_now_and_then(
    enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a minute after the last one at the earliest; what is counted is of all."""
    now = [100.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("tokenizing", "tokens", 7, enabled) as shown:
        for seconds, count in ((0.0, 1000), (29.9, 1000), (0.1, 1000), (29.0, 100), (31.0, 500)):
            now[0] += seconds
            shown.add(count)
            if count == 1000:
                shown.unit_done()
    said = [
        "tokenizing: 2 of 7 shards, 3,000 tokens, 100 tokens/s",
        "tokenizing: 3 of 7 shards, 3,600 tokens, 40 tokens/s",
    ]
    assert capsys.readouterr().err.splitlines() == (said if enabled else [])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_terminal_gets_a_bar(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    bar = SimpleNamespace(
        update=said.append, set_postfix_str=said.append, close=lambda: said.append("closed")
    )
    monkeypatch.setattr(tqdm, "tqdm", lambda **keys: said.append(keys) or bar)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    with Progress("reading", "rows", 2, enabled) as shown:
        shown.add(30)
        shown.unit_done()
        shown.add(12)
        shown.unit_done()
    title = {"desc": "reading", "unit": " rows", "unit_scale": True}
    assert said == ([title, 30, "1/2 shards", 12, "2/2 shards", "closed"] if enabled else [])
