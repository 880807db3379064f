"""What decides the bytes of outputs, and which of what earlier runs left is good; nothing is tokenized."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.data.corpora.mmididx import bin_path, idx_path
from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.plan import Plan, Wanted, deciding_options, settle, shards_exist
from megatron_iiet.data.preprocess.records import Counts, JobRecords, OutputRecord, UnitRecord, read_records
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
        {"deduplicate": True},
        {"bad_rows": "skip"},
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
    shard = OutputRecord(1, 5, 10, idx_bytes=42, bin_digest="", idx_digest="")
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
        plan = Plan(deciding_options(options_of(), "d"), {}, None, self.inputs)
        self.layout.plan.write_bytes(plan.to_json())

    def finish(self, unit: int) -> None:
        shard_of(self.layout, unit)
        records = JobRecords(self.layout.records, 0, 1)
        records.append(record_of(unit, [self.inputs[unit]]))
        records.close()

    def settle(self, inputs: list[InputFile], others: bool = False, **changes: Any) -> set[int]:
        """The finished units."""
        encoder = SimpleNamespace(vocab_size=96, eod_id=2)
        wanted = Wanted(options_of(**changes), self.layout, inputs, "d", lambda: cast(Any, encoder))
        records = SimpleNamespace(others_running=lambda: others, remove_all=lambda: None)
        return settle(wanted, cast(Any, records))[1]


def test_what_is_finished_stays_so_while_its_inputs_are_as_they_were(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, second = place.inputs
    assert place.settle(place.inputs) == set()
    place.finish(0)
    assert place.settle(place.inputs) == {0}
    assert place.settle([first, InputFile("b", 9, "later")]) == {0}, "not begun: it may change"
    for changed, said in (
        (InputFile("a", 9, "then"), "a: 7 -> 9 bytes"),
        (InputFile("a", 7, "later"), "a: written to since"),
    ):
        with pytest.raises(ValueError, match=rf"inputs: 1 changed \({said}\); use another output"):
            place.settle([changed, second])


def test_a_plan_may_change_while_nothing_is_finished_and_nobody_is_at_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    refused = "made with other settings: append_eod: false -> true; use another output"
    with pytest.raises(ValueError, match=refused):
        place.settle(place.inputs, others=True, append_eod=True)
    assert place.settle(place.inputs, append_eod=True) == set()
    assert Plan.read(place.layout.plan).options["append_eod"] is True
    place.finish(0)
    with pytest.raises(ValueError, match="append_eod: true -> false"):
        place.settle(place.inputs)


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
