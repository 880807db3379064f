"""Runs that go on where others stopped: only what is missing is done, and only by the same plan."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import documents, published, run_tool, write_rows

TEXTS = make_texts(60, seed=7)
FILES = 6

pytestmark = pytest.mark.slow  # several runs each


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    """Six files, a shard each."""
    (tmp_path / "in").mkdir()
    for number in range(FILES):
        write_input(tmp_path, number)
    return PreprocessOptions(
        inputs=[f"{tmp_path}/in"],
        output_dir=f"{tmp_path}/out",
        tokenizer_model=str(sentencepiece_model),
        progress=False,
    )


def write_input(folder: Path, number: int) -> Path:
    rows = ({"text": text} for text in TEXTS[number * 10 : number * 10 + 10])
    return write_rows(folder / "in" / f"{number}.jsonl.zst", rows)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def run(options: PreprocessOptions) -> PreprocessReport:
    return preprocess(options, log=lambda _: None)


def times(place: Path) -> dict[str, int]:
    """When each shard was written."""
    return {name: (place / name).stat().st_mtime_ns for name in published(place)}


@pytest.fixture
def undisturbed(options: PreprocessOptions, tmp_path: Path) -> dict[str, bytes]:
    """What a run writes that nothing happens to."""
    run(replace(options, output_dir=f"{tmp_path}/undisturbed"))
    return published(tmp_path / "undisturbed")


def test_nothing_to_do(options: PreprocessOptions, tmp_path: Path) -> None:
    first = run(options)
    before = times(tmp_path / "out")
    lines: list[str] = []
    again = preprocess(options, log=lines.append)
    assert lines == ["inputs: 6 .jsonl.zst", "nothing to do: all 6 shards are finished"]
    assert again.this_run.units == 0
    assert again.all_units == first.all_units
    assert times(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_one_bad_file_among_good_ones(
    options: PreprocessOptions, tmp_path: Path, undisturbed: dict[str, bytes], workers: int
) -> None:
    options = replace(options, workers=workers)
    cut(tmp_path / "in" / "2.jsonl.zst")
    (tmp_path / "in" / "4.jsonl.zst").write_bytes(b"no zstd")
    report = run(options)
    assert report.exit_code == 1
    assert sorted(str(failure) for failure in report.failures) == [
        f"{tmp_path}/in/2.jsonl.zst is cut short: its last zstd frame has no end; fetch the file again.",
        f"{tmp_path}/in/4.jsonl.zst is damaged zstd (zstd decompressor error: Unknown frame descriptor); "
        "fetch the file again.",
    ]
    assert report.missing == 2
    names = published(tmp_path / "out")
    assert sorted(names) == sorted(
        f"text_document/{number:06d}.{ending}" for number in (0, 1, 3, 5) for ending in ("bin", "idx")
    )
    before = times(tmp_path / "out")
    write_input(tmp_path, 2)
    write_input(tmp_path, 4)
    report = run(options)
    assert (report.exit_code, report.this_run.units, report.missing) == (0, 2, 0)
    assert published(tmp_path / "out") == undisturbed
    assert {name: times(tmp_path / "out")[name] for name in names} == before


def test_failures_are_listed_at_the_end(options: PreprocessOptions, tmp_path: Path) -> None:
    cut(tmp_path / "in" / "2.jsonl.zst")
    (tmp_path / "in" / "4.jsonl.zst").unlink()
    (tmp_path / "in" / "4.jsonl").write_text('{"text": "ba"}\n{"txt": "a"}\n')
    arguments = ["--input", *options.inputs, "--tokenizer-model", options.tokenizer_model]
    failed = run_tool(*arguments, "--output-dir", tmp_path / "out", "--workers", 2)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[0] == (
        "2 shards failed; run the same command again to do only what is missing."
    )
    assert [line.split(f"{tmp_path}/in/")[1][:20] for line in sorted(failed.stderr.splitlines()[1:])] == [
        "2.jsonl.zst is cut s",
        "4.jsonl, line 2: no ",
    ]


@pytest.mark.parametrize("change", ["other number of jobs", "missing shard", "short shard", "torn record"])
def test_what_is_missing_is_done(
    options: PreprocessOptions, tmp_path: Path, undisturbed: dict[str, bytes], change: str
) -> None:
    if change == "other number of jobs":
        run(replace(options, num_jobs=3, job=1))
        done, options = 2, replace(options, num_jobs=2)
        run(replace(options, job=1))
    else:
        run(options)
        done = FILES - 1
    shard = tmp_path / "out" / "text_document" / "000003"
    record = tmp_path / "out" / "preprocess" / "job-00000-of-00001.jsonl"
    if change == "missing shard":
        shard.with_suffix(".idx").unlink()
    elif change == "short shard":  # it could be anybody's by now
        os.truncate(shard.with_suffix(".bin"), 10)
        assert "000003.bin is there already, and by its content was not" in str(run(options).failures[0])
        shard.with_suffix(".bin").unlink()
    elif change == "torn record":
        os.truncate(record, record.stat().st_size - 1)
    report = run(options)
    assert report.exit_code == 0
    assert report.this_run.units == (
        1 if done == FILES - 1 else FILES - done - len(finished_by_job_1(tmp_path))
    )
    assert published(tmp_path / "out") == undisturbed
    assert run(options).this_run.units == 0
    assert all(json.loads(line) for path in record.parent.glob("job-*") for line in path.open())


def test_a_shard_made_anew_from_another_input_is_listed_anew(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    run(options)
    (tmp_path / "out" / "text_document" / "000003.bin").unlink()
    write_rows(tmp_path / "in" / "3.jsonl.zst", [{"text": "ba"}])
    assert run(options).exit_code == 0
    assert len(documents(tmp_path / "out" / "text_document")) == 51


def finished_by_job_1(folder: Path) -> list[str]:
    path = folder / "out" / "preprocess" / "job-00001-of-00002.jsonl"
    return path.read_text().splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"append_eod": True}, "append_eod: false -> true"),
        ({"json_keys": ["text", "title"]}, r'json_keys: \["text"\] -> \["text", "title"\]'),
        ({"bad_rows": "skip"}, 'bad_rows: "error" -> "skip"'),
        ({"deduplicate": True}, "deduplicate: false -> true"),
        ({"sample_tokens": 100, "seed": 3}, "sample_tokens: null -> 100; seed: null -> 3"),
        ({"inputs_per_shard": 2}, "inputs_per_shard: 1 -> 2"),
        (
            {"split_by": "meta.set", "holdout_test": 0.1},
            'holdout_test: 0.0 -> 0.1; split_by: null -> "meta.set"',
        ),
    ],
)
def test_other_options_are_refused(
    options: PreprocessOptions, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    run(options)
    before = published(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as raised:
        run(replace(options, **change))  # type: ignore[arg-type]
    assert str(raised.value).startswith(f"{tmp_path}/out/preprocess/plan.json was made with other settings: ")
    assert re.search(
        r"; give the former ones, or use another output: --overwrite would remove 6 finished shards of 60 "
        r"documents, [\d,]+ tokens\.$",
        str(raised.value),
    )
    assert published(tmp_path / "out") == before


def test_another_tokenizer_is_refused_but_not_another_path(
    options: PreprocessOptions, tmp_path: Path, tokenizer_json: Path
) -> None:
    run(options)
    copy = shutil.copy(options.tokenizer_model, tmp_path / "copy.model")
    assert run(replace(options, tokenizer_model=str(copy))).this_run.units == 0
    with pytest.raises(ValueError, match=r'tokenizer: "[0-9a-f]{32}" -> "[0-9a-f]{32}"'):
        run(replace(options, tokenizer_model=str(tokenizer_json)))


def test_a_plan_may_change_while_nothing_is_done(options: PreprocessOptions, tmp_path: Path) -> None:
    cut(tmp_path / "in" / "0.jsonl.zst")
    options = replace(options, inputs=[f"{tmp_path}/in/0.jsonl.zst"])
    assert run(options).exit_code == 1
    write_input(tmp_path, 0)
    assert run(replace(options, append_eod=True, seed=5)).exit_code == 0
    assert len(documents(tmp_path / "out" / "text_document")) == 10


def test_a_plan_may_not_change_while_another_job_runs(options: PreprocessOptions, tmp_path: Path) -> None:
    options = replace(options, num_jobs=8)
    run(replace(options, job=7))  # of more jobs than files: has nothing to do
    with (tmp_path / "out" / "preprocess" / "job-00007-of-00008.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="append_eod: false -> true"):
            run(replace(options, job=0, append_eod=True))
    run(replace(options, job=0, append_eod=True))


def test_two_processes_at_one_job(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    with (tmp_path / "out" / "preprocess" / "job-00000-of-00001.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"job-00000-of-00001\.jsonl is in use: the same job is running"):
            run(options)
    run(options)


# --overwrite


def test_overwrite(options: PreprocessOptions, tmp_path: Path) -> None:
    run(replace(options, deduplicate=True, holdout_validation=0.3))
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    (tmp_path / "out" / "train_text_document" / "notes.bin").write_text("not ours")
    run(replace(options, overwrite=True))
    run(replace(options, output_dir=f"{tmp_path}/fresh"))
    left = published(tmp_path / "out")
    assert left.pop("train_text_document/notes.bin")
    assert left == published(tmp_path / "fresh")
    assert (tmp_path / "out" / "mine.txt").exists()
    assert not list((tmp_path / "out" / "preprocess").rglob("*.bin"))


def test_overwrite_of_one_shard_leaves_neighbours(options: PreprocessOptions, tmp_path: Path) -> None:
    options = replace(options, output_dir=None, output_prefix=f"{tmp_path}/a")
    run(options)
    run(replace(options, output_prefix=f"{tmp_path}/a_b"))
    neighbour = {name: value for name, value in published(tmp_path).items() if name.startswith("a_b_")}
    run(replace(options, overwrite=True, append_eod=True))
    assert neighbour.items() < published(tmp_path).items()
    assert len(neighbour) == 3
    assert len(documents(tmp_path / "a_text_document")) == 60


def test_overwrite_waits_for_no_other_job(options: PreprocessOptions, tmp_path: Path) -> None:
    run(replace(options, num_jobs=2, job=1))
    with (tmp_path / "out" / "preprocess" / "job-00001-of-00002.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"Other jobs of .*out/preprocess are running; stop them"):
            run(replace(options, overwrite=True))


@pytest.mark.parametrize("ending", [".bin", ".idx", ".shards"])
def test_what_others_wrote_is_not_replaced(options: PreprocessOptions, tmp_path: Path, ending: str) -> None:
    options = replace(options, output_dir=None, output_prefix=f"{tmp_path}/a")
    foreign = tmp_path / f"a_text_document{ending}"
    foreign.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"a_text_document{ending} is there already, and no plan in "):
            run(replace(options, overwrite=overwrite))
        assert foreign.read_text() == "precious"
        assert not (tmp_path / "a.preprocess").exists()
    foreign.unlink()
    assert run(options).exit_code == 0


def test_a_damaged_plan(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    plan = tmp_path / "out" / "preprocess" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "format": 99}))
    with pytest.raises(ValueError, match=r"plan\.json is no plan \(its format is 99"):
        run(options)
    assert run(replace(options, overwrite=True)).this_run.units == FILES


def test_a_damaged_record(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    record = tmp_path / "out" / "preprocess" / "job-00000-of-00001.jsonl"
    record.write_bytes(b"{}\n" + record.read_bytes())
    with pytest.raises(ValueError, match=r"job-00000-of-00001\.jsonl, line 1 is damaged"):
        run(options)


# Deduplication


def test_inputs_may_change_between_the_passes(options: PreprocessOptions, tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "5.jsonl.zst", [{"text": TEXTS[0]}, {"text": "ba"}])
    options = replace(options, deduplicate=True, num_jobs=2)
    assert run(replace(options, job=0)).exit_code == 75
    assert run(replace(options, job=0)).exit_code == 75
    write_rows(tmp_path / "in" / "5.jsonl.zst", [{"text": TEXTS[0]}, {"text": TEXTS[1]}, {"text": "ce"}])
    reports = [run(replace(options, job=job)) for job in (0, 1, 0, 1)]
    assert [report.exit_code for report in reports][-2:] == [0, 0]
    assert reports[-1].all_units.counts.duplicates == 2


def test_a_bad_file_stops_deduplication_of_all(options: PreprocessOptions, tmp_path: Path) -> None:
    cut(tmp_path / "in" / "2.jsonl.zst")
    options = replace(options, deduplicate=True)
    report = run(options)
    assert report.exit_code == 1
    assert len(report.failures) == 1
    assert published(tmp_path / "out") == {}
    write_input(tmp_path, 2)
    assert run(options).this_run.units == FILES
