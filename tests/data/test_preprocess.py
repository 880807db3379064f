"""Text to shards: contents, layouts, and that neither workers nor jobs change a byte."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from megatron_iiet.data.corpora.streams import IndexedDataset, ShardedDataset, open_corpus
from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, finished, preprocess
from megatron_iiet.data.tokenizers.loading import load_tokenizer, tokenizer_digest
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import ROOT, documents, leftovers, published, run_tool, write_rows
from tests.marks import long_but

TEXTS = make_texts(140, seed=3)


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    """One shard from two files."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "in" / "a.jsonl", ({"text": text} for text in TEXTS[:50]))
    write_rows(tmp_path / "in" / "b.jsonl.zst", ({"text": text} for text in TEXTS[50:]))
    return PreprocessOptions(
        inputs=[f"{tmp_path}/in"],
        output_prefix=f"{tmp_path}/out/corpus",
        tokenizer_model=str(sentencepiece_model),
        append_eod=True,
        chunk_bytes=1000,
        progress=False,
    )


@pytest.fixture
def many(options: PreprocessOptions, tmp_path: Path) -> PreprocessOptions:
    """A folder of shards from seven files, of three sources, some texts twice."""
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    for number in range(7):
        rows = [
            {"text": text, "meta": {"set": f"Source{index % 3}"}}
            for index, text in enumerate(TEXTS[number * 20 : number * 20 + 20] + TEXTS[:4])
        ]
        write_rows(tmp_path / "in" / f"{number}.jsonl.zst", rows)
    return replace(options, output_prefix=None, output_dir=f"{tmp_path}/out")


def run(options: PreprocessOptions) -> PreprocessReport:
    """Preprocess; all must go well."""
    report = preprocess(options, log=lambda _: None)
    assert [str(failure) for failure in report.failures] == []
    assert report.exit_code == 0
    return report


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece_model", "tokenizer_json"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_contents(
    options: PreprocessOptions,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    append_eod: bool,
) -> None:
    path = request.getfixturevalue(kind)
    report = run(replace(options, tokenizer_model=str(path), append_eod=append_eod))
    tokenizer = load_tokenizer(path)
    tail = [tokenizer.eod_id] if append_eod else []
    prefix = f"{options.output_prefix}_text_document"
    assert documents(prefix) == [tokenizer.encode(text).tolist() + tail for text in TEXTS]
    total = report.all_units.outputs["text_document"]
    assert (total.documents, total.tokens) == (140, IndexedDataset(prefix).num_tokens)
    assert report.all_units.counts.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert f"text_document: 140 documents, {total.tokens:,} tokens" in str(report)
    assert list(published(tmp_path / "out")) == [
        f"corpus_text_document{ending}" for ending in (".bin", ".idx", ".shards")
    ]
    assert leftovers(tmp_path / "out") == []


def test_list_says_how_it_was_made(options: PreprocessOptions) -> None:
    run(options)
    corpus = open_corpus(f"{options.output_prefix}_text_document")
    assert isinstance(corpus, ShardedDataset)
    assert corpus.info["tokenizer"] == {
        "file": Path(options.tokenizer_model).name,
        "digest": tokenizer_digest(options.tokenizer_model),
        "vocab_size": 500,
        "eod_id": load_tokenizer(options.tokenizer_model).eod_id,
    }
    assert corpus.info["append_eod"] is True
    assert corpus.info["made_by"] == "tools/preprocess_data.py"


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "chunk_bytes"), [(2, 100), (3, 5000)])
def test_workers_do_not_change_one_shard(
    options: PreprocessOptions, tmp_path: Path, workers: int, chunk_bytes: int
) -> None:
    run(options)
    expected = published(tmp_path / "out")
    run(replace(options, workers=workers, chunk_bytes=chunk_bytes, overwrite=True))
    assert published(tmp_path / "out") == expected


ALL_FILTERS = {
    "split_by": "meta.set",
    "sample_tokens": 3000,
    "holdout_validation": 0.2,
    "holdout_test": 0.1,
    "deduplicate": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("filters", long_but([{}, ALL_FILTERS], ALL_FILTERS), ids=["plain", "all filters"])
def test_jobs_and_workers_do_not_change_many_shards(
    many: PreprocessOptions, tmp_path: Path, filters: dict[str, object]
) -> None:
    many = replace(many, **filters)  # type: ignore[arg-type]
    run(many)
    expected = published(tmp_path / "out")
    assert len(expected) > 7 * 2
    for number, (num_jobs, workers) in enumerate([(1, 2), (3, 1), (7, 1), (2, 3), (1, 8)]):
        place = tmp_path / f"out{number}"
        jobs = [
            replace(many, output_dir=str(place), num_jobs=num_jobs, job=job, workers=workers)
            for job in reversed(range(num_jobs))
        ]
        reports = [preprocess(job, log=lambda _: None) for job in jobs]
        if many.deduplicate and num_jobs > 1:
            assert [report.exit_code for report in reports] == [75] * (num_jobs - 1) + [0]
            assert "other jobs are missing: start the same jobs again" in reports[0].waiting
            reports = [preprocess(job, log=lambda _: None) for job in jobs]
        assert [report.exit_code for report in reports] == [0] * num_jobs
        assert [report.missing == 0 for report in reports][-1]
        assert published(place) == expected


@pytest.mark.slow
def test_inputs_per_shard(many: PreprocessOptions, tmp_path: Path) -> None:
    run(many)
    every_document = documents(tmp_path / "out" / "text_document")
    run(replace(many, output_dir=f"{tmp_path}/threes", inputs_per_shard=3))
    names = [name for name in published(tmp_path / "threes") if name.endswith(".bin")]
    assert names == [f"text_document/{number:06d}.bin" for number in range(3)]
    assert documents(tmp_path / "threes" / "text_document") == every_document
    run(replace(many, output_dir=None, output_prefix=f"{tmp_path}/out/one"))
    assert documents(tmp_path / "out" / "one_text_document") == every_document


@pytest.mark.slow
def test_split_by_source(many: PreprocessOptions, tmp_path: Path) -> None:
    run(many)
    mixed = documents(tmp_path / "out" / "text_document")
    report = run(replace(many, output_dir=f"{tmp_path}/split", split_by="meta.set"))
    by_source = [documents(tmp_path / "split" / f"Source{number}_text_document") for number in range(3)]
    assert sorted(report.all_units.outputs) == [f"Source{number}_text_document" for number in range(3)]
    assert [len(source) for source in by_source] == [56, 56, 56]
    for number in range(3):  # rows of a file go round the sources
        assert by_source[number][:8] == mixed[:24][number::3]


def test_a_source_cannot_leave_its_folder(options: PreprocessOptions, tmp_path: Path) -> None:
    (path := tmp_path / "in" / "b.jsonl.zst").unlink()
    rows = [{"text": "ba", "from": "Good"}, {"text": "ce", "from": "../../bad"}, {"text": "di", "from": ""}]
    path = write_rows(tmp_path / "in" / "c.jsonl", rows)
    options = replace(options, inputs=[str(path)], split_by="from")
    report = preprocess(options, log=lambda _: None)
    assert "c.jsonl, line 2: 'from' is '../../bad', which cannot be part of a file name" in str(
        report.failures[0]
    )
    report = run(replace(options, bad_rows="skip"))
    assert report.all_units.counts.rejected == {"bad source name": 2}
    assert list(report.all_units.outputs) == ["Good_text_document"]


def test_several_keys_and_empty_texts(options: PreprocessOptions, tmp_path: Path) -> None:
    rows = [{"text": "ba", "title": "ce"}, {"text": "", "title": "di"}, {"text": "fo", "title": "gu"}]
    path = write_rows(tmp_path / "in" / "keys.jsonl", rows)
    report = run(replace(options, inputs=[str(path)], json_keys=["text", "title"]))
    assert {name: total.documents for name, total in report.all_units.outputs.items()} == {
        "text_document": 2,
        "title_document": 3,
    }
    assert report.all_units.counts.empty == 1
    assert "left out: 1 empty documents" in str(report)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_giant_document_gets_the_same_tokens(
    options: PreprocessOptions, tmp_path: Path, workers: int
) -> None:
    giant = "\n".join(TEXTS) * 600
    texts = ["before", giant, "behind", giant + "!"]
    assert len(giant.encode()) > 9e6
    path = write_rows(tmp_path / "in" / "giant.jsonl.zst", ({"text": text} for text in texts))
    run(replace(options, inputs=[str(path)], workers=workers, holdout_validation=0.001))
    tokenizer = load_tokenizer(options.tokenizer_model)
    found = documents(f"{options.output_prefix}_train_text_document")
    assert found == [[*tokenizer.encode(text).tolist(), tokenizer.eod_id] for text in texts]


@pytest.mark.slow
def test_only_empty_documents(options: PreprocessOptions, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "empty.jsonl", [{"text": ""}] * 5)
    with pytest.raises(ValueError, match="hold no documents: every text under 'text' is empty"):
        preprocess(replace(options, inputs=[str(path)]), log=lambda _: None)
    assert published(tmp_path / "out") == {}
    path = write_rows(tmp_path / "null.jsonl", [{"text": None}])
    bad = replace(options, inputs=[str(path)], bad_rows="skip", output_prefix=f"{tmp_path}/null")
    with pytest.raises(
        ValueError, match=r"hold no documents: .* such as .*null\.jsonl, line 1: 'text' is null"
    ):
        preprocess(bad, log=lambda _: None)
    rows = [{"text": "ba", "title": ""}]
    path = write_rows(tmp_path / "title.jsonl", rows)
    options = replace(options, output_prefix=f"{tmp_path}/out/two")
    options = replace(options, inputs=[str(path)], json_keys=["text", "title"])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no document for .*two_title_document: every text under 'title'"
        ):
            preprocess(options, log=lambda _: None)
        assert list(published(tmp_path / "out")) == [
            f"two_text_document.{x}" for x in ("bin", "idx", "shards")
        ]


@pytest.mark.slow
def test_records_are_read_once_an_output(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in" / "b.jsonl.zst", [])
    write_rows(tmp_path / "in" / "a.jsonl", [{"text": "ba", "a": "ra", "b": "ba ra"}])
    times = []
    for keys in (["text"], ["text", "a", "b"]):
        count = Mock(side_effect=finished.read_records)
        monkeypatch.setattr("megatron_iiet.data.preprocess.finished.read_records", count)
        run(replace(options, json_keys=keys, output_prefix=f"{tmp_path}/out/{len(keys)}"))
        monkeypatch.undo()
        times.append(count.call_count)
    assert times[1] - times[0] == 2


def test_a_source_without_documents_is_absent(many: PreprocessOptions, tmp_path: Path) -> None:
    rows = [{"text": "", "meta": {"set": "Hollow"}}, {"text": "ba", "meta": {"set": "Full"}}]
    write_rows(tmp_path / "in" / "0.jsonl.zst", rows)
    report = run(replace(many, split_by="meta.set"))
    assert "Full_text_document" in report.all_units.outputs
    assert not list((tmp_path / "out").glob("Hollow*"))


def test_bad_places_leave_nothing(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for change, message in [
        ({"tokenizer_model": "no.model"}, r"The tokenizer no\.model is missing"),
        ({"inputs": ["no.jsonl"]}, r"The input no\.jsonl is missing"),
        ({"output_prefix": f"{tmp_path}/file/a"}, "file/a cannot be written: .*file is a file"),
        ({"output_prefix": f"{tmp_path}/out/"}, "ends in a slash"),
        ({"output_prefix": None, "output_dir": f"{tmp_path}/file"}, "is a file; choose another name"),
        ({"append_eod": True, "eod_token": "<s>"}, "--eod-token is '<s>', but .* ends documents with '</s>'"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess(replace(options, **change), log=lambda _: None)  # type: ignore[arg-type]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_tool(options: PreprocessOptions, tmp_path: Path) -> None:
    arguments = ["--input", *options.inputs, "--tokenizer-model", options.tokenizer_model, "--append-eod"]
    done = run_tool(*arguments, "--output-prefix", options.output_prefix, "--workers", 2)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("inputs: ")
    assert "500 ids, by " in second
    assert "text_document: 140 documents, " in done.stdout
    assert "tokens/CPU-s" in done.stdout.splitlines()[-1]
    from_tool = published(tmp_path / "out")
    run(replace(options, overwrite=True))
    assert published(tmp_path / "out") == from_tool
    again = run_tool(*arguments, "--output-prefix", options.output_prefix)
    assert (again.returncode, again.stdout.splitlines()[1]) == (0, "nothing to do: all 1 shards are finished")


@pytest.mark.slow
def test_tool_with_a_dataset(options: PreprocessOptions, tmp_path: Path) -> None:
    """A local folder of the hub's shape, through ``datasets``."""
    folder = tmp_path / "dataset" / "train" / "chunk1"
    folder.mkdir(parents=True)
    for number in range(2):
        rows = ({"text": text, "meta": {}} for text in TEXTS[number * 70 : number * 70 + 70])
        write_rows(folder / f"example_train_{number}.jsonl.zst", rows)
    arguments = ["--dataset", tmp_path / "dataset", "--split", "train", "--streaming"]
    arguments += ["--tokenizer-model", options.tokenizer_model, "--append-eod"]
    done = run_tool(*arguments, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    run(options)
    assert documents(tmp_path / "out" / "text_document") == documents(
        f"{options.output_prefix}_text_document"
    )


def test_preprocessing_imports_nothing_heavy() -> None:
    code = (
        "import sys, megatron_iiet.data.preprocess;"
        "sys.exit(bool({'torch', 'datasets', 'fsspec', 'tqdm'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_token_bytes_are_little_endian(options: PreprocessOptions, tmp_path: Path) -> None:
    run(options)
    ids = np.frombuffer((tmp_path / "out" / "corpus_text_document.bin").read_bytes(), dtype="<u2")
    found = documents(f"{options.output_prefix}_text_document")
    assert ids.tolist() == [token for document in found for token in document]
