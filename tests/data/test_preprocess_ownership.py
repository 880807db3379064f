"""Nothing of somebody else's is removed, replaced or written through, whatever it is called."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, preprocess, work
from megatron_iiet.data.preprocess import run as running
from megatron_iiet.data.preprocess.layout import Layout, Output
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.records import JobRecords
from tests.data.inputs import listing
from tests.data.preprocess_runs import write_rows

Run = Callable[..., PreprocessReport]


@pytest.fixture
def run(tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Preprocess two rows of two sources into tmp_path/out, unless told otherwise."""
    monkeypatch.setattr(running, "in_a_process_of_its_own", lambda function, *given, **_: function(*given))
    texts = (("ba", "ce", "a"), ("di", "fo", "web"))
    rows: list[dict[str, object]] = [{"text": a, "content": b, "from": c} for a, b, c in texts]
    path = write_rows(tmp_path / "in.jsonl", rows)

    def run(**changes: Any) -> PreprocessReport:
        given: dict[str, Any] = {"inputs": [str(path)], "output_dir": f"{tmp_path}/out", "progress": False}
        given |= {"output_dir": None} if "output_prefix" in changes else {}
        options = PreprocessOptions(tokenizer_model=str(sentencepiece_model), **given | changes)
        return preprocess(options, log=lambda _: None)

    return run


def refusal(run: Run, **options: Any) -> str:
    """What a run says that does not end well."""
    try:
        return str(run(**options).failures[0])
    except ValueError as error:
        return str(error)


def plant(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")


def test_a_run_that_failed_opens_no_door(run: Run, tmp_path: Path) -> None:
    """Its plan makes room for one of another key, whose output is somebody's."""
    foreign = [tmp_path / f"p_content_document{ending}" for ending in (".bin", ".idx")]
    plant(*foreign)
    assert run(output_prefix=f"{tmp_path}/p", json_keys=["nokey"]).exit_code == 1
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"p_content_document\.idx is there already, and no plan in"):
            run(output_prefix=f"{tmp_path}/p", json_keys=["content"], overwrite=overwrite)
    assert all(path.read_text() == "precious" for path in foreign)
    assert run(output_prefix=f"{tmp_path}/p").exit_code == 0


@pytest.mark.parametrize("link", ["text_document", "preprocess", "web_text_document"])
def test_an_output_on_another_file_system_than_its_records(run: Run, tmp_path: Path, link: str) -> None:
    """They cannot be renamed into place: said before anything is made, but of sources when they are met."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as a file system of its own")
    with TemporaryDirectory(dir=shared) as elsewhere:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / link).symlink_to(elsewhere)
        said = refusal(run, split_by="from" if link.startswith("web") else None)
        assert re.search(
            rf"{link} is on another file system than|than \S*{link}, where \S+bin is written first", said
        )
        assert not list(tmp_path.glob("out/**/*.bin"))
        assert not os.listdir(elsewhere)


@pytest.mark.parametrize("name", ["web_document/000000.bin", "web_document.shards", "web_document/notes"])
def test_overwrite_removes_what_it_made(run: Run, tmp_path: Path, name: str) -> None:
    """Neither folders of fitting names nor files beside its own shards."""
    run()
    foreign = [tmp_path / "out" / name, tmp_path / "out" / "text_document" / "000077.bin"]
    foreign += [tmp_path / "out" / "preprocess" / name for name in ("a.tmp", "digests/mine.bin")]
    plant(*foreign)
    run(overwrite=True)
    run(overwrite=True, append_eod=True)
    assert all(path.read_text() == "precious" for path in foreign)
    assert "000000.bin" in listing(tmp_path / "out" / "text_document")


def test_a_source_whose_output_is_there(run: Run, tmp_path: Path) -> None:
    """Found when a worker is to write it; other units are made."""
    foreign = tmp_path / "out" / "web_text_document" / "000000.bin"
    plant(foreign)
    report = run(split_by="from")
    assert report.exit_code == 1
    assert "web_text_document/000000.bin is there already, and no plan in" in str(report.failures[0])
    assert run(split_by="from", overwrite=True).exit_code == 1
    assert foreign.read_text() == "precious"
    foreign.unlink()
    assert run(split_by="from").exit_code == 0


def test_two_outputs_of_one_name(run: Run, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": "ba", "b_text": "ce", "from": source} for source in ("a", "a_b")
    ]
    path = write_rows(tmp_path / "colliding.jsonl", rows)
    report = run(inputs=[str(path)], split_by="from", json_keys=["text", "b_text"])
    assert "The output a_b_text_document would hold both source 'a" in str(report.failures[0])
    assert not list((tmp_path / "out").glob("*/*.bin"))


def test_two_prefixes_of_one_output(run: Run, tmp_path: Path) -> None:
    """Whether the other has written anything yet or not; a folder of many shards as well."""
    path = write_rows(tmp_path / "b.jsonl", [{"b_text": "ba", "text": "ce", "x": "a_b"}])
    other = Claims(Layout(f"{tmp_path}/a", None))
    other.folder.mkdir(parents=True)
    other.take(Output(None, None, "b_text"))
    said = (
        r"a_b_text_document is an output of another run, which claimed it by .*a\.preprocess/outputs/b_text"
    )
    with pytest.raises(ValueError, match=said):
        run(inputs=[str(path)], output_prefix=f"{tmp_path}/a_b")
    report = run(inputs=[str(path)], output_dir=str(tmp_path), split_by="x")
    assert "a_b_text_document is an output of another run" in str(report.failures[0])
    assert run(inputs=[str(path)], output_prefix=f"{tmp_path}/a", json_keys=["b_text"]).exit_code == 0


def test_records_that_are_somebody_elses(run: Run, tmp_path: Path) -> None:
    records = tmp_path / "out" / "preprocess"
    plant(records / "main.py")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"preprocess/main\.py is not of this tool"):
            run(overwrite=overwrite)
        assert listing(records) == ["main.py"]
    (records / "main.py").unlink()
    plan = records / "plan.json"
    for content in ('{"steps": 3}', "no JSON", "[]"):
        plan.write_text(content)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"plan\.json was not written by this tool; choose another"):
                run(overwrite=overwrite)
        assert plan.read_text() == content


@pytest.mark.parametrize("ending", ["bin.partial", "idx.partial"])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo"])
def test_nothing_is_written_through_what_is_planted(run: Run, tmp_path: Path, ending: str, kind: str) -> None:
    target = tmp_path / "target"
    plant(target)
    run()
    planted = tmp_path / "out" / "preprocess" / "making" / f"text_document-000000.{ending}"
    planted.parent.mkdir()
    (tmp_path / "out" / "text_document" / "000000.bin").unlink()
    if kind == "symlink":
        planted.symlink_to(target)
    elif kind == "hard link":
        os.link(target, planted)
    else:
        os.mkfifo(planted)
    report = run()
    assert f"{planted} is " in str(report.failures[0])
    assert "which is not written through; remove it." in str(report.failures[0])
    assert target.read_text() == "precious"
    planted.unlink()
    assert run().exit_code == 0


def test_claims_of_several_at_once(tmp_path: Path) -> None:
    """One that finds nothing, then the files of another of the same run, is no stranger; nor is a claim given
    back while something is left."""
    layout = Layout(None, str(tmp_path))
    layout.records.mkdir()
    claims, output = Claims(layout), Output("a", None, "text")
    claims.take(output)
    claims.open_shard(layout, output.name, 7, 100).discard()
    plant(tmp_path / "a_text_document" / "000000.bin")
    claims.take(output)
    with pytest.raises(
        ValueError, match=r"would hold both source 'a' with key 'text' and key 'a_text'; rename"
    ):
        claims.take(Output(None, None, "a_text"))
    claims.release(output.name)
    assert claims.names() == {"a_text_document"}
    (tmp_path / "a_text_document" / "000000.bin").unlink()
    claims.release(output.name)
    assert claims.names() == set()
    assert listing(tmp_path) == ["preprocess"]


ENDINGS = (".bin", ".idx", ".shards", ".bin.partial")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["p_text_document", "out/text_document/000000", "out/text_document"])
def test_what_takes_a_claimed_name_after_a_failure(
    run: Run, tmp_path: Path, place: str, overwrite: bool
) -> None:
    """A claim alone owns no file, nor does what failed behind its first shard's beginning."""
    prefix = {"output_prefix": f"{tmp_path}/p"} if place.startswith("p_") else {}
    for failing in ({"bad_rows": "error", "max_document_bytes": 5}, {"text_template": "{nokey}"}):
        assert run(**prefix, **failing).exit_code == 1
    foreign = [tmp_path / (place + ending) for ending in ENDINGS]
    plant(*foreign)
    said = r"(text_document|000000)\.\w+ is there already"
    assert re.search(said, refusal(run, **prefix, overwrite=overwrite))
    assert all(path.read_text() == "precious" for path in foreign)
    for path in foreign:
        path.unlink()
    assert run(**prefix, overwrite=overwrite).exit_code == 0


@pytest.mark.parametrize("ending", [".bin", ".idx", ".shards"])
@pytest.mark.parametrize("place", ["p_text_document", "out/text_document"])
def test_what_takes_the_place_of_what_was_made(run: Run, tmp_path: Path, place: str, ending: str) -> None:
    """With as many bytes, and the time of the former file; the same file with another time is still ours."""
    prefix = {"output_prefix": f"{tmp_path}/p"} if place.startswith("p_") else {}
    run(**prefix)
    is_shard = ending != ".shards" and not prefix
    path = tmp_path / (f"{place}/000000{ending}" if is_shard else place + ending)
    content = path.read_bytes()
    os.utime(path, (1, 1))
    run(**prefix, overwrite=True)
    assert path.read_bytes() == content
    path.write_bytes(content[::-1])
    for changes in ({"overwrite": True}, {"overwrite": True, "append_eod": True}):
        said = f"{path} is there already, and by its content was not made for this"
        assert said in refusal(run, **prefix, **changes)
        assert path.read_bytes() == content[::-1]


def test_a_pair_without_a_record_is_the_killed_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its publication and its record; unless another one took its place since."""
    with monkeypatch.context() as killed:
        killed.setattr(JobRecords, "append", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    shard = tmp_path / "out" / "text_document" / "000000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    assert "000000.bin is there already, and by its content" in str(run().failures[0])
    assert shard.read_bytes() == content[::-1]
    shard.write_bytes(content)
    assert run(append_eod=True).exit_code == 0
    assert "making" not in listing(tmp_path / "out" / "preprocess")


@pytest.mark.parametrize("ending", [".bin", ".idx", ".shards"])
def test_what_comes_while_a_shard_is_made(tmp_path: Path, ending: str) -> None:
    layout = Layout(f"{tmp_path}/p", None)
    claims, output = Claims(layout), Output(None, None, "text")
    layout.records.mkdir()
    claims.take(output)
    foreign = tmp_path / f"p_text_document{ending}"
    writer = claims.open_shard(layout, output.name, 0, 100)
    writer.add_document(np.arange(3))
    plant(foreign)
    with pytest.raises(ValueError, match=f"p_text_document{ending} is there already, and by its content"):
        writer.close()
    writer.discard()
    assert listing(tmp_path) == ["p.preprocess", foreign.name]
    assert foreign.read_text() == "precious"


def test_records_that_are_somebodys_of_fitting_names(run: Run, tmp_path: Path) -> None:
    records = tmp_path / "out" / "preprocess"
    for name in ("job-00000-of-00001.jsonl", "job-00003-of-00004.jsonl", "duplicates.bin"):
        plant(records / name)
        for overwrite in (False, True):
            if name == "duplicates.bin" and not overwrite:
                continue  # it is looked for with --deduplicate only
            with pytest.raises(ValueError, match=rf"{name} (holds b'precious', which is no record|was not)"):
                run(overwrite=overwrite)
            assert (records / name).read_text() == "precious"
        (records / name).unlink()


def die(*_: object) -> None:
    os._exit(1)


@pytest.mark.slow
def test_a_death_at_the_first_look(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what was looked at."""
    monkeypatch.setattr(running, "in_a_process_of_its_own", work.in_a_process_of_its_own)
    monkeypatch.setattr(running, "_checked_encoder", die)
    said = refusal(run)
    assert re.fullmatch(r"\S*\.model: its worker .*", said)
    assert not (tmp_path / "out" / "ce_document").exists()
