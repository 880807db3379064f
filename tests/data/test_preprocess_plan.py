"""What decides the bytes of outputs, and which of what earlier runs left is good; nothing is tokenized."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.data.corpora.mmididx import bin_path, idx_path, shards_path
from megatron_iiet.data.corpora.shard_list import ShardList
from megatron_iiet.data.preprocess.finished import shards_exist
from megatron_iiet.data.preprocess.layout import Layout, Output
from megatron_iiet.data.preprocess.lists import Summary, clear_up, summarize, write_lists
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.plan import Plan, Wanted, deciding_options, grouped
from megatron_iiet.data.preprocess.records import (
    Counts,
    JobRecords,
    OutputRecord,
    UnitRecord,
    read_records,
)
from megatron_iiet.data.preprocess.settle import settle
from megatron_iiet.data.reading.sources import InputFile


def options_of(**changes: Any) -> PreprocessOptions:
    given: dict[str, Any] = {"tokenizer_model": "t", "inputs": ["in"], "output_dir": "out"}
    return PreprocessOptions(**given | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"json_keys": ["title"]},
        {"append_eod": True},
        {"split_by": "source"},
        {"sample_tokens": 100},
        {"sample_tokens": 100, "seed": 2},
        {"sample_tokens": 100, "corpus_tokens": 1000},
        {"holdout_validation": 0.1},
        {"holdout_test": 0.1},
        {"language": ["en"]},
        {"language": ["en"], "language_score": 0.5},
        {"deduplicate": True},
        {"bad_rows": "skip"},
        {"shuffle": 0},
        {"shuffle": 1},
        {"inputs_per_shard": 2},
    ],
    ids=str,
)
def test_an_option_that_decides_bytes(changes: dict[str, Any]) -> None:
    last = list(changes)[-1]
    before = {key: value for key, value in changes.items() if key != last}
    assert deciding_options(options_of(**changes), "d") != deciding_options(options_of(**before), "d")


@pytest.mark.parametrize("changes", [{"seed": 2}, {"workers": 3}, {"num_jobs": 2, "job": 1}], ids=str)
def test_an_option_that_decides_none(changes: dict[str, Any]) -> None:
    """The seed is that of a sample; without one it has nothing to say."""
    assert deciding_options(options_of(**changes), "d") == deciding_options(options_of(), "d")
    assert deciding_options(options_of(), "d") != deciding_options(options_of(), "e")


def record_of(unit: int, inputs: list[InputFile]) -> UnitRecord:
    shard = OutputRecord(1, 5, 10, idx_bytes=42, bin_digest="ab" * 16, idx_digest="cd" * 16)
    return UnitRecord(unit, inputs, {"text_document": shard}, Counts())


def shard_of(layout: Layout, unit: int, bin_bytes: int = 10, idx_bytes: int = 42) -> tuple[Path, Path]:
    prefix = layout.shard_prefix("text_document", unit)
    Path(prefix).parent.mkdir(exist_ok=True)
    paths = Path(bin_path(prefix)), Path(idx_path(prefix))
    for path, size in zip(paths, (bin_bytes, idx_bytes), strict=True):
        path.write_bytes(bytes(size))
    return paths


@pytest.mark.parametrize("sizes", [(9, 42), (11, 42), (10, 41), (10, 43)])
def test_a_shard_counts_in_its_full_size_only(sizes: tuple[int, int], tmp_path: Path) -> None:
    layout, record = Layout(None, str(tmp_path)), record_of(0, [])
    for path in shard_of(layout, 0):
        assert shards_exist(layout, record)
        path.rename(path.with_suffix(".away"))
        assert not shards_exist(layout, record)
        path.with_suffix(".away").rename(path)
    shard_of(layout, 0, *sizes)
    assert not shards_exist(layout, record)


class Place:
    """An output whose plan is of two inputs, the first of which is finished."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(None, str(folder))
        self.inputs = [InputFile(name, 7, "then") for name in "ab"]
        self.layout.records.mkdir()
        options = deciding_options(options_of(), "d")
        plan = Plan(options, {"vocab_size": 96}, None, grouped(self.inputs, options), 2)
        Claims(self.layout).take(Output(None, None, "text"))
        self.layout.plan.write_bytes(plan.to_json())

    def finish(self, unit: int) -> None:
        shard_of(self.layout, unit)
        records = JobRecords(self.layout.records, 0, 1)
        records.append(record_of(unit, [self.inputs[unit]]))
        records.close()

    def wanted(self, inputs: list[InputFile], **changes: Any) -> Wanted:
        encoder = SimpleNamespace(vocab_size=96, eod_id=2)
        return Wanted(options_of(**changes), self.layout, inputs, "d", lambda: cast(Any, encoder))

    def settle(self, inputs: list[InputFile], others: bool = False, **changes: Any) -> set[int]:
        """The finished units."""
        records = SimpleNamespace(others_running=lambda: others, remove_all=lambda: None)
        return settle(self.wanted(inputs, **changes), cast(Any, records)).finished


def test_what_is_finished_stays_so_while_its_inputs_are_as_they_were(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, second = place.inputs
    assert place.settle(place.inputs) == set()
    place.finish(0)
    assert place.settle(place.inputs) == {0}
    assert place.settle([first, InputFile("b", 9, "later")]) == {0}, "not begun: it may change"
    for changed in (InputFile("a", 9, "then"), InputFile("a", 7, "later")):
        with pytest.raises(ValueError, match="inputs: 1 changed; 1 units to make, 1 kept; other jobs"):
            place.settle([changed, second], others=True)
    assert place.settle([InputFile("a", 7, "later"), second]) == set()
    assert Plan.read(place.layout.plan).shape() == [(2, ["a"]), (1, ["b"])]


def test_what_was_made_of_a_stream_is_not_taken_for_made_of_another(tmp_path: Path) -> None:
    """Nor is it removed when other inputs are given; one that was not finished is read anew."""
    place = Place(tmp_path)
    place.inputs[0] = InputFile("a", 0, "stream 1")
    again = InputFile("a", 0, "stream 2")
    assert place.settle([again, place.inputs[1]]) == set()
    place.finish(0)
    for inputs in ([again, place.inputs[1]], [place.inputs[1]]):
        with pytest.raises(ValueError, match=r"made of a, which can be read only.* remove 1 finished"):
            place.settle(inputs)


def test_a_plan_may_change_while_nothing_is_finished_and_nobody_is_at_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    refused = "made with other settings: append_eod: false -> true; give the former ones, or use another"
    with pytest.raises(ValueError, match=refused):
        place.settle(place.inputs, others=True, append_eod=True)
    assert place.settle(place.inputs, append_eod=True) == set()
    assert Plan.read(place.layout.plan).options["append_eod"] is True
    place.finish(0)
    with pytest.raises(ValueError, match="append_eod: true -> false"):
        place.settle(place.inputs)


def test_files_of_a_place(tmp_path: Path) -> None:
    """An index before its tokens, and the unit of each; no other file of fitting names."""
    one, many = Layout(str(tmp_path / "p"), None), Layout(None, str(tmp_path / "d"))
    for name in ("p_a_document", "p_b_document", "d/a_document/000001", "d/a_document/1000000"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for ending in (".bin", ".idx", ".bin.partial", ".shards", ".txt"):
            (tmp_path / (name + ending)).write_text("")
    for name in ("00000.bin", "0000001.bin", "000001.bin.old"):
        (tmp_path / "d/a_document" / name).write_text("")

    def found(layout: Layout, output: str) -> list[tuple[int | None, str]]:
        return [(unit, str(path.relative_to(tmp_path))) for unit, path in layout.files(output)]

    endings = (".idx", ".bin")
    assert found(one, "a_document") == [(None, f"p_a_document{ending}") for ending in endings]
    assert found(one, "x_document") == found(many, "x_document") == []
    units = ((1000000, "1000000"), (1, "000001"))
    assert found(many, "a_document") == [
        (unit, f"d/a_document/{name}{ending}") for unit, name in units for ending in endings
    ]
    assert one.records == tmp_path / "p.preprocess"
    assert many.records == tmp_path / "d" / "preprocess"
    assert one.shard_prefix("a_document", 5) == str(tmp_path / "p_a_document")
    assert many.shard_prefix("a_document", 5) == str(tmp_path / "d/a_document/000005")
    assert (one.shard_name("a", 5), many.shard_name("a", 5)) == ("p_a", "a/000005")


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        (None, None, "text_document"),
        ("C4", None, "C4_text_document"),
        (None, "test", "test_text_document"),
        ("C4", "train", "C4_train_text_document"),
    ],
)
def test_names_of_outputs(source: str | None, split: str | None, name: str) -> None:
    assert Output(source, split, "text").name == name


def test_the_last_run_lists_the_shards_and_clears_up(tmp_path: Path) -> None:
    """In the order of the plan's units; a right list stays; what no list names goes, if it is ours."""
    place = Place(tmp_path)
    plan, wanted = Plan.read(place.layout.plan), place.wanted(place.inputs)

    def write() -> Summary:
        summary = summarize(wanted, plan.units)
        listed = write_lists(wanted, plan, plan.units, summary)
        clear_up(place.layout, plan, plan.units, [(place.layout, listed)])
        return summary

    records = place.layout.records
    left = [records / "making/text_document-000000.bin.partial", records / "a.0123abcd.tmp"]
    names = ("x_document/000000.idx", "text_document/000002.bin", "text_document/000000.bin.partial")
    foreign = [tmp_path / name for name in names]
    foreign += [place.layout.records / "mine.tmp"]
    place.finish(1)
    for path in left + foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert summarize(wanted, plan.units).units == 1
    place.finish(0)
    job = JobRecords(records, 1, 2)  # another job made the same unit again
    job.append(record_of(0, [place.inputs[0]]))
    job.close()
    summary = write()
    assert summary.units == 2
    assert (summary.total.documents, summary.total.tokens, summary.total.bin_bytes) == (2, 10, 20)
    shards = ShardList(shards_path(tmp_path / "text_document"))
    assert [shards[number].name for number in range(len(shards))] == [
        "text_document/000000",
        "text_document/000001",
    ]
    assert shards.info["options"] == plan.options
    assert "bad_inputs" not in shards.info
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in foreign)
    written = Path(shards.path).stat().st_mtime_ns
    write()
    assert Path(shards.path).stat().st_mtime_ns == written
    Path(shards.path).write_text("damaged, or somebody's")
    with pytest.raises(ValueError, match=r"text_document\.shards is there already, and by its content was"):
        write()
    Path(shards.path).unlink()
    write()
    assert ShardList(shards.path).num_tokens == 10


def test_units_are_inputs_in_their_order() -> None:
    inputs = [InputFile(str(number), 1, "") for number in range(5)]
    for per_shard, sizes in ((None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])):
        units = grouped(inputs, {"inputs_per_shard": per_shard}, 7)
        assert [len(unit.inputs) for unit in units] == sizes
        assert [file for unit in units for file in unit.inputs] == inputs
        assert [unit.id for unit in units] == list(range(7, 7 + len(sizes)))


def test_records_are_free_once_they_are_closed(tmp_path: Path) -> None:
    """Not only when the object is gone: a traceback may keep it."""
    first = JobRecords(tmp_path, 0, 1)
    with pytest.raises(ValueError, match=r"job-00000-of-00001\.jsonl is in use: the same job is running"):
        JobRecords(tmp_path, 0, 1)
    first.close()
    JobRecords(tmp_path, 0, 1).close()


def test_a_torn_record_is_cut_off_and_one_that_cannot_be_put_on_disk_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = record_of(0, []).to_json() + "\n"
    path = tmp_path / "job-00000-of-00001.jsonl"
    path.write_text(line + line[:-20])
    records = JobRecords(tmp_path, 0, 1)
    assert path.read_text() == line

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            records.append(record_of(1, []))
    assert path.read_text() == line
    records.append(record_of(2, []))
    records.close()
    assert [record.unit for record in read_records(tmp_path)] == [0, 2]


def test_counts_add_up() -> None:
    """Of defective rows the first five a reason are kept."""
    counts = Counts()
    for number in range(3):
        part = Counts(text_bytes=10, empty=1, sampled_out=2, duplicates=3)
        for row in range(2):
            part.reject("no text", f"file {number}, line {row}")
        part.reject("no JSON", f"file {number}")
        counts.add(part)
    assert (counts.text_bytes, counts.empty, counts.sampled_out, counts.duplicates) == (30, 3, 6, 9)
    assert counts.rejected == {"no text": 6, "no JSON": 3}
    assert counts.offenders["no text"] == [f"file {n}, line {row}" for n in range(3) for row in range(2)][:5]
    assert counts.offenders["no JSON"] == ["file 0", "file 1", "file 2"]
