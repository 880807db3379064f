"""Text to shards: contents, independence of the workers, refusals, and what is left after them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_iiet.data import preprocess as preprocess_module
from megatron_iiet.data.indexed import IndexedDataset
from megatron_iiet.data.preprocess import PreprocessOptions, preprocess
from megatron_iiet.data.tokenizer import load_tokenizer
from tests.data.inputs import jsonl, make_texts

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TEXTS = make_texts(120, seed=3)


@pytest.fixture
def options(tmp_path: Path, sentencepiece_model: Path) -> PreprocessOptions:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(TEXTS[:50]))
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(TEXTS[50:])))
    return PreprocessOptions(
        inputs=[f"{tmp_path}/in/*"],
        output_prefix=f"{tmp_path}/out/corpus",
        tokenizer_model=str(sentencepiece_model),
        append_eod=True,
        chunk_bytes=1000,
        progress=False,
    )


def outputs(options: PreprocessOptions) -> dict[str, bytes]:
    folder = Path(options.output_prefix).parent
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["sentencepiece_model", "tokenizer_json"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_contents(
    options: PreprocessOptions, request: pytest.FixtureRequest, kind: str, append_eod: bool
) -> None:
    path = request.getfixturevalue(kind)
    report = preprocess(replace(options, tokenizer_model=str(path), append_eod=append_eod))
    tokenizer = load_tokenizer(path)
    shard = IndexedDataset(f"{options.output_prefix}_text_document")
    tail = [tokenizer.eod_id] if append_eod else []
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [
        tokenizer.encode(text).tolist() + tail for text in TEXTS
    ]
    assert (report.documents, report.tokens, report.empty_documents) == (120, shard.num_tokens, 0)
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert str(report).startswith(f"120 documents, {shard.num_tokens:,} tokens from ")
    assert [path.name for path in report.files] == list(outputs(options))


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("chunk_bytes", [100, 5000])
def test_workers_do_not_change_the_shard(options: PreprocessOptions, workers: int, chunk_bytes: int) -> None:
    preprocess(options)
    expected = outputs(options)
    preprocess(replace(options, workers=workers, chunk_bytes=chunk_bytes))
    assert outputs(options) == expected


def test_several_keys_and_empty_texts(options: PreprocessOptions, tmp_path: Path) -> None:
    path = tmp_path / "in" / "keys.jsonl"
    path.write_text(
        '{"text": "ba", "title": "ce"}\n{"text": "", "title": "di"}\n{"text": "fo", "title": "gu"}\n'
    )
    report = preprocess(replace(options, inputs=[str(path)], json_keys=["text", "title"]))
    assert (report.documents, report.empty_documents) == (5, 1)
    assert "1 empty documents skipped" in str(report)
    assert IndexedDataset(f"{options.output_prefix}_text_document").num_documents == 2
    assert IndexedDataset(f"{options.output_prefix}_title_document").num_documents == 3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl(TEXTS[:30]) + b"not json\n" + jsonl(TEXTS), r"z\.jsonl, line 31: not valid JSON"),
        (b"", r"z\.jsonl is empty"),
        (b'{"text": null}\n', r"z\.jsonl, line 1: 'text' is null"),
    ],
)
def test_bad_input_leaves_what_was_there(
    options: PreprocessOptions, tmp_path: Path, workers: int, content: bytes, message: str
) -> None:
    preprocess(replace(options, inputs=[f"{tmp_path}/in/a.jsonl"]))
    before = outputs(options)
    (tmp_path / "in" / "z.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess(replace(options, workers=workers))
    assert outputs(options) == before


def test_only_empty_documents(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b'{"text": ""}\n' * 5)
    with pytest.raises(ValueError, match="hold no documents: every text under 'text' is empty"):
        preprocess(replace(options, inputs=[f"{tmp_path}/empty.jsonl"]))
    assert outputs(options) == {}


def test_bad_options(options: PreprocessOptions) -> None:
    for change, message in [
        ({"workers": 0}, "--workers is 0; give at least 1"),
        ({"json_keys": ["text", "text"]}, "give one or more, each once"),
        ({"tokenizer_model": "no.model"}, r"The tokenizer no\.model is missing"),
        ({"inputs": ["no.jsonl"]}, r"The input no\.jsonl is missing"),
        ({"output_prefix": "/nowhere/a"}, "The folder /nowhere of the output prefix is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess(replace(options, **change))
    assert outputs(options) == {}


def _die(chunk: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_module, "_encode_in_worker", _die)
    with pytest.raises(RuntimeError, match="A tokenizing process died"):
        preprocess(replace(options, workers=2))
    assert outputs(options) == {}


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def tool_command(options: PreprocessOptions) -> list[str]:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", *options.inputs]
    return [*command, "--output-prefix", options.output_prefix, "--tokenizer-model", options.tokenizer_model]


def run_tool(options: PreprocessOptions, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [*tool_command(options), *extra]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def test_tool(options: PreprocessOptions, tmp_path: Path) -> None:
    done = run_tool(options, "--append-eod", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("120 documents, ")
    assert len(done.stdout.splitlines()) == 1
    assert "tok/s" in done.stderr
    from_tool = outputs(options)
    preprocess(options)
    assert outputs(options) == from_tool

    (tmp_path / "in" / "z.jsonl").write_bytes(b'{"txt": "a"}\n')
    failed = run_tool(options, "--workers", "2")
    assert failed.returncode == 1
    assert "error: " in failed.stderr.splitlines()[-1]
    assert "z.jsonl, line 1: no key 'text'" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert outputs(options) == from_tool


@pytest.mark.parametrize(
    ("number", "code", "leftovers"),
    [
        (signal.SIGTERM, 143, []),
        (signal.SIGINT, 130, []),
        (signal.SIGKILL, -9, ["corpus_text_document.bin.partial"]),
    ],
)
def test_stopped_by_a_signal(
    options: PreprocessOptions, tmp_path: Path, number: signal.Signals, code: int, leftovers: list[str]
) -> None:
    """Neither a half-written pair nor a worker process stays behind."""
    command = [*tool_command(options), "--workers", "2"]
    (tmp_path / "in" / "c.jsonl").write_bytes(jsonl(make_texts(200)) * 500)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    partial = Path(f"{options.output_prefix}_text_document.bin.partial")
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
    process.send_signal(number)
    # The pipes close only when the workers, which inherited them, are gone as well.
    process.communicate(timeout=20)
    assert process.returncode == code
    assert list(outputs(options)) == leftovers


def test_preprocessing_imports_no_torch() -> None:
    code = "import sys, megatron_iiet.data.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_token_bytes_are_little_endian(options: PreprocessOptions) -> None:
    preprocess(options)
    name = "corpus_text_document.bin"
    ids = np.frombuffer(outputs(options)[name], dtype="<u2")
    assert ids.tolist() == IndexedDataset(f"{options.output_prefix}_text_document").read(0, len(ids)).tolist()
