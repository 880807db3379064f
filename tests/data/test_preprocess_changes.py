"""Inputs that change between runs, and inputs that cannot be read: only what they concern is made again."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_iiet.data.corpora.mmididx import shards_path
from megatron_iiet.data.corpora.shard_list import ShardList
from megatron_iiet.data.corpora.verification import verify
from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, preprocess, tasks
from megatron_iiet.data.preprocess import run as running
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.data.reading.text import Chunk
from tests.data.crash import run_until_killed
from tests.data.inputs import listing
from tests.data.preprocess_runs import documents, leftovers, published, write_rows

WORDS = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se"]


class Corpus:
    """Files of texts, and what a run over them told."""

    def __init__(self, place: Path, model: Path) -> None:
        self.place, self.folder = place, place / "in"
        self.folder.mkdir()
        self.told: list[str] = []
        self.options = PreprocessOptions(
            inputs=[str(self.folder)], output_dir=f"{place}/out", tokenizer_model=str(model), progress=False
        )

    def write(self, name: str, *texts: str) -> Path:
        return write_rows(self.folder / f"{name}.jsonl", ({"text": text} for text in texts))

    def spoil(self, name: str) -> Path:
        path = self.write(name, "not read")
        path.write_bytes(path.read_bytes() + b'{"text": "cut')
        return path

    def run(self, **changes: object) -> PreprocessReport:
        told: list[str] = []
        try:
            return preprocess(replace(self.options, **changes), log=told.append)  # type: ignore[arg-type]
        finally:
            self.told = told[1:]  # the first one counts the inputs

    def documents(self, name: str = "out/text_document") -> list[list[int]]:
        return documents(self.place / name)

    def fresh(self, **changes: object) -> list[list[int]]:
        """Documents that a run into another place gives."""
        shutil.rmtree(self.place / "fresh", ignore_errors=True)
        assert (
            self.run(**{"output_dir": f"{self.place}/fresh", "output_prefix": None} | changes).exit_code == 0
        )
        return self.documents("fresh/text_document")

    def shards(self) -> list[str]:
        """As listed, by number."""
        listed = ShardList(shards_path(self.place / "out" / "text_document"))
        found = [listed[number].name.split("/")[1] for number in range(len(listed))]
        there = {path.stem for path in (self.place / "out" / "text_document").iterdir()}
        assert there == set(found), "what is there is what is listed"
        return found


@pytest.fixture
def corpus(tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Files a, b, c, d of two texts each."""
    # The tokenizer is checked here, not in a process of its own, which takes most of so small a run.
    monkeypatch.setattr(running, "in_a_process_of_its_own", lambda function, *given, **_: function(*given))
    made = Corpus(tmp_path, sentencepiece_model)
    for number, name in enumerate("abcd"):
        made.write(name, WORDS[2 * number], WORDS[2 * number + 1])
    return made


def test_an_empty_input_is_of_no_documents_and_may_go(corpus: Corpus) -> None:
    (corpus.folder / "b.jsonl").write_bytes(b"")
    assert corpus.run().exit_code == 0
    assert corpus.shards() == ["000000", "000002", "000003"]
    (corpus.folder / "b.jsonl").unlink()
    assert corpus.run().this_run.units == 0
    assert corpus.told == [
        "inputs: 1 removed; 0 units to make, 3 kept",
        "nothing to do: all 3 shards are finished",
    ]
    assert corpus.documents() == corpus.fresh()


def test_only_what_changed_is_made_again(corpus: Corpus) -> None:
    corpus.run()
    kept = (corpus.place / "out" / "text_document" / "000002.bin").stat().st_mtime_ns
    corpus.write("aa", "ra")
    corpus.write("b", "se", "se", "se")
    (corpus.folder / "d.jsonl").unlink()
    report = corpus.run()
    assert corpus.told[0] == "inputs: 1 added, 1 removed, 1 changed; 2 units to make, 2 kept"
    assert (report.exit_code, report.this_run.units) == (0, 2)
    assert corpus.shards() == ["000000", "000005", "000004", "000002"]
    assert (corpus.place / "out" / "text_document" / "000002.bin").stat().st_mtime_ns == kept
    assert corpus.documents() == corpus.fresh()
    assert corpus.run().this_run.units == 0
    assert corpus.told == ["nothing to do: all 4 shards are finished"]


def test_inputs_in_another_order(corpus: Corpus) -> None:
    """A list is all that there is to write."""
    files = sorted(map(str, corpus.folder.iterdir()))
    corpus.run(inputs=files)
    assert corpus.run(inputs=files[::-1]).this_run.units == 0
    assert corpus.told[0] == "inputs: in another order; 0 units to make, 4 kept"
    assert corpus.documents() == corpus.fresh(inputs=files[::-1])


def test_units_of_several_inputs(corpus: Corpus) -> None:
    """One that lost a member or has a changed one is made again; new inputs are grouped among themselves."""
    corpus.write("e", "ra")
    corpus.run(inputs_per_shard=2)
    before = corpus.shards()
    (corpus.folder / "a.jsonl").unlink()
    for name in "xyz":
        corpus.write(name, name)
    assert corpus.run(inputs_per_shard=2).this_run.units == 3
    assert corpus.told[0] == "inputs: 3 added, 1 removed; 3 units to make, 2 kept"
    assert corpus.shards() == ["000003", *before[1:], "000004", "000005"]
    assert corpus.documents() == corpus.fresh(inputs_per_shard=2)


def test_one_shard_of_all_is_made_again_of_all(corpus: Corpus) -> None:
    prefix = {"output_dir": None, "output_prefix": f"{corpus.place}/p"}
    corpus.run(**prefix)
    corpus.write("e", "ra")
    assert corpus.run(**prefix).this_run.units == 1
    assert corpus.told[0] == "inputs: 1 added; 1 units to make, 0 kept"
    assert corpus.documents("p_text_document") == corpus.fresh()
    assert corpus.run(**prefix).this_run.units == 0


def test_sources_that_are_gone_are_no_longer_listed(corpus: Corpus) -> None:
    for number, name in enumerate("abcd"):
        source = "Odd" if number % 2 else "Even"
        write_rows(corpus.folder / f"{name}.jsonl", [{"text": WORDS[number], "from": source}])
    corpus.run(split_by="from")
    for name in "bd":
        (corpus.folder / f"{name}.jsonl").unlink()
    corpus.run(split_by="from")
    assert sorted(path.name for path in (corpus.place / "out").iterdir()) == [
        "Even_text_document",
        "Even_text_document.shards",
        "preprocess",
    ]
    claims = ["Even_text_document", "Even_text_document.begun"]
    assert listing(corpus.place / "out" / "preprocess" / "outputs") == claims


def test_the_sample_of_a_plan_stays(corpus: Corpus) -> None:
    rate = corpus.run(sample_tokens=20).rate
    corpus.write("e", *WORDS * 20)
    assert corpus.run(sample_tokens=20).rate == rate
    assert corpus.told[0] == f"inputs: 1 added; 1 units to make, 4 kept; the sample's rate stays {rate:.4g}"


def test_changes_under_other_jobs_are_refused(corpus: Corpus) -> None:
    corpus.run(num_jobs=2, job=1)
    corpus.write("e", "ra")
    corpus.write("c", "changed")
    plan = corpus.place / "out" / "preprocess" / "plan.json"
    before = plan.read_bytes()
    with (plan.parent / "job-00001-of-00002.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"^inputs: 1 added.*; other jobs of .*: wait for them or stop"):
            corpus.run(num_jobs=2, job=0)
    assert plan.read_bytes() == before


def test_an_input_may_change_until_its_unit_is_finished(corpus: Corpus) -> None:
    """Then its shard has the name it would have had."""
    corpus.spoil("c")
    assert corpus.run().exit_code == 1
    corpus.write("c", "mended")
    assert corpus.run().exit_code == 0
    assert corpus.shards() == ["000000", "000001", "000002", "000003"]


def copies(corpus: Corpus) -> None:
    corpus.write("b", "ba", "own b")
    corpus.write("c", "own b", "ba", "own c")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["first gone", "copy gone", "new first", "first changed"])
def test_duplicates_of_changed_inputs(corpus: Corpus, change: str) -> None:
    """A document whose first copy is gone comes back where the next one is."""
    copies(corpus)
    corpus.run(deduplicate=True)
    if change == "first gone":
        (corpus.folder / "a.jsonl").unlink()
    elif change == "copy gone":
        (corpus.folder / "c.jsonl").unlink()
    elif change == "new first":
        corpus.write("a0", "own c")
        (corpus.folder / "a0.jsonl").rename(corpus.folder / "0.jsonl")
    else:
        corpus.write("a", "other", "texts")
    report = corpus.run(deduplicate=True)
    assert report.exit_code == 0
    again = {"first gone": 1, "copy gone": 0, "new first": 2, "first changed": 2}
    assert report.this_run.units == again[change]
    assert any(line.startswith("duplicates: 1 finished") for line in corpus.told) == (change != "copy gone")
    assert corpus.documents() == corpus.fresh(deduplicate=True)
    assert corpus.run(deduplicate=True).this_run.units == 0
    assert corpus.told[0].startswith("nothing to do: ")


# Inputs that cannot be read


def damage(corpus: Corpus, kind: str) -> str:
    """Make b unreadable; what is said of it."""
    path = corpus.folder / "b.jsonl"
    if kind == "bad row":
        corpus.spoil("b")
        return "line 2: not valid JSON"
    path.unlink()
    packed = write_rows(corpus.folder / "b.jsonl.zst", [{"text": "not read"}])
    packed.write_bytes(packed.read_bytes()[:-3])
    return "b.jsonl.zst is cut short"


@pytest.mark.slow
@pytest.mark.parametrize(("deduplicate", "per_shard"), [(False, 3), (True, 1)])
def test_an_input_that_cannot_be_read_is_left_out_as_a_whole(
    corpus: Corpus, deduplicate: bool, per_shard: int
) -> None:
    """Nothing is a copy of what it holds, and it is told, recorded and listed."""
    copies(corpus)
    bad = corpus.spoil("b")
    bad.write_bytes(b'{"text": "di"}\n' + bad.read_bytes())
    options = {"deduplicate": deduplicate, "inputs_per_shard": per_shard}
    assert corpus.run(**options).exit_code == 1
    report = corpus.run(**options, bad_inputs="skip")
    assert report.exit_code == 0
    assert list(report.all_units.skipped) == [str(bad)]
    assert "left out: 1 inputs that cannot be read, such as\n    " in str(report)
    assert f"    {bad}, line 3: not valid JSON" in str(report)
    info = ShardList(shards_path(corpus.place / "out" / "text_document")).info
    assert info["bad_inputs"] == report.all_units.skipped
    assert corpus.run(**options, bad_inputs="skip").this_run.units == 0
    assert corpus.run(**options).exit_code == 1, "without skip it is a failure again"
    assert corpus.run(**options, bad_inputs="skip").exit_code == 0
    found = corpus.documents()
    bad.rename(corpus.place / "away")
    assert found == corpus.fresh(**options)
    corpus.write("b", "mended", "di")
    report = corpus.run(**options, bad_inputs="skip")
    assert (report.exit_code, report.all_units.skipped) == (0, {})
    assert corpus.documents() == corpus.fresh(**options)


@pytest.mark.slow
@pytest.mark.parametrize("per_shard", [1, 4])
def test_workers_leave_out_the_same(corpus: Corpus, per_shard: int) -> None:
    """Whether they are given units or chunks."""
    copies(corpus)
    corpus.spoil("b")
    options = {"deduplicate": True, "inputs_per_shard": per_shard, "bad_inputs": "skip"}
    report = corpus.run(**options, workers=2)
    assert report.all_units.skipped.keys() == {f"{corpus.folder}/b.jsonl"}
    assert corpus.documents() == corpus.fresh(**options)


@pytest.mark.parametrize("kind", ["cut", "bad row"])
def test_kinds_of_bad_inputs(corpus: Corpus, kind: str) -> None:
    said = damage(corpus, kind)
    report = corpus.run(bad_inputs="skip")
    assert report.exit_code == 0
    assert said in next(iter(report.all_units.skipped.values()))
    assert len(corpus.documents()) == 6


def test_an_input_that_vanishes(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the reading."""
    listed: Callable[..., object] = running.settle

    def settle(*given: object) -> object:
        (corpus.folder / "b.jsonl").unlink(missing_ok=True)
        return listed(*given)

    monkeypatch.setattr(running, "settle", settle)
    report = corpus.run(bad_inputs="skip")
    assert report.exit_code == 0
    assert "No such file" in report.all_units.skipped[f"{corpus.folder}/b.jsonl"]


def test_nothing_but_bad_inputs(corpus: Corpus) -> None:
    for name in "abcd":
        corpus.spoil(name)
    with pytest.raises(
        ValueError, match=r"hold no documents: 4 of them cannot be read, such as .*a\.jsonl, line 2"
    ):
        corpus.run(bad_inputs="skip")
    assert published(corpus.place / "out") == {}


# Kills


@pytest.mark.slow
def test_killed_while_inputs_changed(corpus: Corpus) -> None:
    """At any step: a list that is there is whole, old or new, and the same command ends as if undisturbed."""
    copies(corpus)
    corpus.run(deduplicate=True)
    before = corpus.documents()
    corpus.write("0", "ra", "own c")
    corpus.write("d", "changed")
    (corpus.folder / "a.jsonl").unlink()
    shutil.copytree(corpus.place / "out", corpus.place / "start")

    def again() -> None:
        assert corpus.run(deduplicate=True).exit_code == 0

    def restore() -> None:
        shutil.rmtree(corpus.place / "out")
        shutil.copytree(corpus.place / "start", corpus.place / "out")

    again()
    expected, after = published(corpus.place / "out"), corpus.documents()
    step, finished = 0, False
    while not finished:
        restore()
        finished = run_until_killed(again, step)
        assert corpus.documents() in (before, after), step
        again()
        assert published(corpus.place / "out") == expected, step
        assert leftovers(corpus.place / "out") == []
        step += 29


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "appended", "rewritten", "removed"])
def test_an_input_that_changes_while_it_is_read(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It has the size and time that it had when it was listed, or no shard is made of it."""
    path = corpus.write("a", *WORDS)
    corpus.write("b", "whole")
    content, read_chunks = path.read_bytes(), tasks.read_chunks

    def read_and_change(file: InputFile, *others: object) -> Iterator[Chunk]:
        for number, chunk in enumerate(read_chunks(file, *others)):  # type: ignore[arg-type]
            if number == 0 and file.path == str(path):
                if how == "removed":
                    path.unlink()
                else:
                    lines = content.splitlines(keepends=True)
                    new = {"cut": lines[:-2], "appended": [*lines, lines[0]], "rewritten": lines[::-1]}[how]
                    path.write_bytes(b"".join(new))
            yield chunk

    monkeypatch.setattr(tasks, "read_chunks", read_and_change)
    report = corpus.run(bad_inputs="skip")
    words = "is missing" if how == "removed" else "changed while it was read: .* run the same command again"
    assert report.exit_code == 1
    assert re.search(rf"a\.jsonl {words}", str(report.failures[0]))
    assert not shards_path(corpus.options.output_dir + "/text_document").exists()
    monkeypatch.undo()
    path.write_bytes(content)
    assert corpus.run().exit_code == 0
    assert corpus.documents() == corpus.fresh()


def test_a_shard_that_was_made_again_is_listed(corpus: Corpus) -> None:
    """Its input has another content, but the size and time that it had; the shard was lost."""
    path = corpus.write("a", "ba ce di", "fo")
    assert corpus.run().exit_code == 0
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    for texts in (("ba ce di", "gu"), ("zz !! qq", "fo")):
        corpus.write("a", *texts)
        os.utime(path, ns=times)
        (corpus.place / "out/text_document/000000.bin").unlink()
        for _ in range(2):
            assert corpus.run().exit_code == 0
            assert corpus.documents() == corpus.fresh()
            assert verify(corpus.place / "out/text_document").defects == []


def test_several_keys_share_a_fate_and_this_is_told(corpus: Corpus) -> None:
    write_rows(corpus.folder / "a.jsonl", [{"text": "ba", "b": "ce"}, {"text": "ba", "b": "di"}])
    told = "decided for a whole row, by its first text of text, b that is not empty"
    for changes, is_told in (({}, False), ({"deduplicate": True}, True)):
        corpus.run(json_keys=("text", "b"), output_dir=f"{corpus.place}/{is_told}", **changes)
        assert any(told in line for line in corpus.told) == is_told
