"""--shuffle: the same documents, each once, in an order that seed and places alone decide."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.shuffle import ShuffleShard
from megatron_iiet.data.reading.sources import InputFile
from tests.data.crash import run_until_killed
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import documents, leftovers, published, write_rows

TEXTS = make_texts(220, seed=5)
SIZES = (90, 10, 60, 40)


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    """Four files, a shard each, some texts twice."""
    (tmp_path / "in").mkdir()
    for number, size in enumerate(SIZES):
        write_input(tmp_path, number, size)
    return PreprocessOptions(
        inputs=[f"{tmp_path}/in"],
        output_dir=f"{tmp_path}/out",
        tokenizer_model=str(sentencepiece_model),
        shuffle=7,
        progress=False,
    )


def write_input(folder: Path, number: int, size: int) -> None:
    start = sum(SIZES[:number])
    rows = [{"text": text, "from": f"S{at % 2}"} for at, text in enumerate(TEXTS[start : start + size])]
    write_rows(folder / "in" / f"{number}.jsonl", rows + rows[:3])


def run(options: PreprocessOptions, log: Callable[[str], None] = lambda _: None) -> PreprocessReport:
    report = preprocess(options, log=log)
    assert [str(failure) for failure in report.failures] == []
    return report


def plain(options: PreprocessOptions, place: Path) -> list[list[int]]:
    """All documents in the order of the inputs."""
    run(replace(options, shuffle=None, output_dir=str(place)))
    return documents(place / "text_document")


@pytest.mark.slow
def test_the_same_documents_in_another_order(options: PreprocessOptions, tmp_path: Path) -> None:
    in_order = plain(options, tmp_path / "plain")
    run(options)
    shuffled = documents(tmp_path / "out" / "text_document")
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)
    # Over all files: a fourth of the documents has some of each.
    files = np.repeat(range(4), np.array(SIZES) + 3)
    places = {tuple(document): files[at] for at, document in reversed(list(enumerate(in_order)))}
    assert {int(places[tuple(document)]) for document in shuffled[: len(shuffled) // 4]} == {0, 1, 2, 3}
    assert sum(a == b for a, b in zip(shuffled, in_order, strict=True)) < 10
    run(replace(options, shuffle=8, output_dir=f"{tmp_path}/eight"))
    assert documents(tmp_path / "eight" / "text_document") != shuffled
    run(replace(options, output_dir=None, output_prefix=f"{tmp_path}/one"))
    assert documents(tmp_path / "one_text_document") == shuffled
    assert {path.name for path in tmp_path.glob("one*")} == {
        "one.preprocess",
        *(f"one_text_document{ending}" for ending in (".bin", ".idx", ".shards")),
    }


def test_nothing_to_do_and_other_seeds(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    before = published(tmp_path / "out")
    lines: list[str] = []
    assert run(options, lines.append).this_run.units == 0
    assert lines[-1] == "nothing to do: all 4 shards are finished"
    assert published(tmp_path / "out") == before
    with pytest.raises(ValueError, match="shuffle: 7 -> 8"):
        run(replace(options, shuffle=8))
    with pytest.raises(ValueError, match="shuffle: 7 -> null"):
        run(replace(options, shuffle=None))
    with pytest.raises(ValueError, match=r"--shuffle is 18446744073709551616; give a seed of 64 bits"):
        replace(options, shuffle=2**64)


FILTERS = {
    "split_by": "from",
    "holdout_validation": 0.2,
    "deduplicate": True,
    "sample_tokens": 9000,
    "corpus_tokens": 10000,
}


@pytest.mark.slow
def test_workers_and_jobs_change_no_byte(options: PreprocessOptions, tmp_path: Path) -> None:
    options = replace(options, **FILTERS)  # type: ignore[arg-type]
    report = run(options)
    expected = published(tmp_path / "out")
    assert len(report.all_units.outputs) == 4
    run(replace(options, shuffle=None, output_dir=f"{tmp_path}/plain"))
    for output in report.all_units.outputs:
        found, in_order = (documents(tmp_path / place / output) for place in ("out", "plain"))
        assert sorted(found) == sorted(in_order)
        assert found != in_order or len(found) < 4
    run(replace(options, workers=2, output_dir=f"{tmp_path}/workers"))
    assert published(tmp_path / "workers") == expected
    for _ in range(2):
        for job in range(2):
            run(replace(options, num_jobs=2, job=job, output_dir=f"{tmp_path}/jobs"))
    assert published(tmp_path / "jobs") == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "many"])
def test_killed_and_resumed(options: PreprocessOptions, tmp_path: Path, layout: str) -> None:
    """In the middle of the shuffle, whose operations are the last ones."""

    def at(place: Path) -> PreprocessOptions:
        place.mkdir(exist_ok=True)
        one = {"output_dir": None, "output_prefix": str(place / "p")}
        return replace(options, **(one if layout == "one" else {"output_dir": str(place)}))  # type: ignore[arg-type]

    run(at(tmp_path / "whole"))
    expected = published(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", units := tmp_path / "units")
    for path in [*units.rglob("*.shards"), *(path for path in units.rglob("shuffled/*") if path.is_file())]:
        path.unlink()
    for name in published(units):
        (units / name).unlink()
    kills = 0
    for step in range(0, 400, 7):
        shutil.copytree(units, place := tmp_path / f"{step}")
        is_finished = run_until_killed(lambda place=place: run(at(place)), step)  # type: ignore[misc]
        if is_finished:
            break
        kills += 1
        report = run(at(place))
        assert report.this_run.units == 0  # units are not made again
        assert published(place) == expected
        assert leftovers(place) == []
    assert kills > 5


@pytest.mark.slow
def test_inputs_that_are_added_take_only_their_own_tokens(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    write_rows(tmp_path / "in" / "9.jsonl", [{"text": text} for text in TEXTS[200:]])
    told: list[str] = []
    assert run(options, told.append).this_run.units == 1
    assert told[1] == "inputs: 1 added; 1 units to make, 4 kept"
    run(replace(options, output_dir=f"{tmp_path}/fresh"))
    assert documents(tmp_path / "out" / "text_document") == documents(tmp_path / "fresh" / "text_document")
    assert len(list((tmp_path / "out" / "text_document").glob("*.bin"))) == 5  # those of before are gone
    (tmp_path / "in" / "9.jsonl").unlink()
    assert run(options).this_run.units == 0
    assert sorted(documents(tmp_path / "out" / "text_document")) == sorted(plain(options, tmp_path / "plain"))


@pytest.mark.slow
def test_overwriting_a_shuffled_output_leaves_nothing_of_it(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    run(options)
    in_order = plain(options, tmp_path / "plain")
    run(replace(options, shuffle=None, overwrite=True))
    assert documents(tmp_path / "out" / "text_document") == in_order
    assert published(tmp_path / "out") == published(tmp_path / "plain")
    assert list((tmp_path / "out" / "preprocess").rglob("*.bin")) == []


@pytest.mark.slow
def test_memory_is_that_of_some_documents(tmp_path: Path) -> None:
    """Neither a long document nor all of them are held: 24 MB of tokens, 96 as they are read."""
    lengths = [6_000_000, *[2_000] * 3_000]
    with IndexedDatasetWriter(tmp_path / "a", 60_000) as writer:
        for length in lengths:
            writer.add_document(np.full(length, length % 60_000, dtype=np.uint16))
        shard = writer.close()
    write_shards(tmp_path / "a", [shard], writer.dtype, {})
    inputs = [InputFile(str(tmp_path / "a"), 0, "")]
    layout = Layout(str(tmp_path / "b"), None)
    (layout.records / "outputs").mkdir(parents=True)
    task = ShuffleShard(0, inputs, "a", layout, (0, len(lengths)), 1, 60_000, "")
    task(None, lambda _: None)  # what is loaded once
    tracemalloc.start()
    record = task(None, lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    assert (record.outputs["a"].documents, record.outputs["a"].tokens) == (3001, sum(lengths))
    assert sorted(map(len, documents(tmp_path / "b_a"))) == sorted(lengths)
