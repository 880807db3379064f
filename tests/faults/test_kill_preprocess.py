"""Preprocessing that is killed, starved or interrupted, with real signals to real processes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_iiet.data.corpora.streams import open_corpus
from megatron_iiet.data.tokenizers.training import train_tokenizer
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import (
    ENVIRONMENT,
    command,
    leftovers,
    published,
    run_tool,
    wait_until,
    write_rows,
)
from tests.marks import long_but

TEXTS = make_texts(3000, seed=11)
FILES = 5
REPEATS = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_rows(folder / "text.jsonl", ({"text": text} for text in TEXTS[:300]))
    return train_tokenizer([str(path)], folder / "small", vocab_size=500).path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with texts that occur twice, of two sources."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(FILES):
        texts = TEXTS[number * 500 : number * 500 + 600]
        rows = [{"text": text, "meta": {"set": f"S{index % 2}"}} for index, text in enumerate(texts)]
        write_rows(folder / f"{number}.jsonl.zst", rows)
    return folder


def start(arguments: list[object], **options: object) -> subprocess.Popen[str]:
    """The tool, leader of a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Worker processes; not the one that multiprocessing keeps for itself."""
    try:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def arguments(corpus: Path, tokenizer: Path, *output: object) -> list[object]:
    return ["--input", corpus, "--tokenizer-model", tokenizer, "--append-eod", *output]


def all_filters(corpus: Path, tokenizer: Path, place: Path, layout: str) -> list[object]:
    """A run with everything in it."""
    output = (
        ["--output-dir", place, "--inputs-per-shard", 2]
        if layout == "many"
        else ["--output-prefix", place / "p"]
    )
    filters = [
        "--deduplicate",
        "--sample-tokens",
        "60K",
        "--holdout-validation",
        0.1,
        "--split-by",
        "meta.set",
    ]
    if layout == "many":
        filters += ["--shuffle", 5]
    return arguments(corpus, tokenizer, *output, *filters, "--workers", 2)


class KilledRuns:
    """Runs one command again and again, killed at random times, and compares what is published."""

    def __init__(self, make: Callable[[Path], list[object]], folder: Path, seed: int) -> None:
        self._make, self._folder = make, folder
        self._chance = random.Random(seed)
        (folder / "undisturbed").mkdir()
        begin = time.monotonic()
        done = run_tool(*make(folder / "undisturbed"))
        self._seconds = time.monotonic() - begin
        assert done.returncode == 0, done.stderr
        self._expected = published(folder / "undisturbed")
        assert sum(name.endswith(".shards") for name in self._expected) == 4  # two sources, two splits
        self._places = 0

    def until(self, kills: int) -> None:
        """Kill that many times."""
        while kills > 0:
            place = self._folder / f"{self._places}"
            place.mkdir()
            self._places += 1
            kills -= self._one_output(place, kills)

    def _one_output(self, place: Path, most: int) -> int:
        """Kill runs until one of them gets through; returns how many were killed."""
        killed = 0
        while killed < most:
            process = start(self._make(place))
            try:
                process.communicate(timeout=self._chance.uniform(0.1, 1.0) * self._seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                killed += 1
                self._check_lists(place)
            else:
                assert process.returncode == 0
                break
        done = run_tool(*self._make(place))
        assert done.returncode == 0, done.stderr
        assert published(place) == self._expected
        assert leftovers(place) == []
        return killed

    def _check_lists(self, place: Path) -> None:
        """A list that is there is the whole one, and so are the shards it names."""
        found = published(place)
        for name in found:
            if name.endswith(".shards"):
                assert found[name] == self._expected[name]
                corpus = open_corpus(place / name.removesuffix(".shards"))
                corpus.read(0, corpus.num_tokens)
            elif name.endswith(".idx"):  # written last: the pair is whole
                assert found[name] == self._expected[name]
                pair = name.removesuffix(".idx") + ".bin"
                assert found[pair] == self._expected[pair]


@pytest.mark.slow
@pytest.mark.parametrize("layout", long_but(["one", "many"], "many"))
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.kills)])
def test_killed_at_random_times(
    corpus: Path, tokenizer: Path, tmp_path: Path, layout: str, kills: int
) -> None:
    """kill -9 of the whole process group, then resumed: equal to an undisturbed run, byte for byte."""
    runs = KilledRuns(lambda place: all_filters(corpus, tokenizer, place, layout), tmp_path, kills)
    runs.until(kills)


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files that take a second or so."""
    folder = tmp_path_factory.mktemp("long")
    for number in range(2):
        write_rows(folder / f"{number}.jsonl", ({"text": text} for text in TEXTS * REPEATS))
    return folder


def partials(place: Path) -> list[Path]:
    return [path for path in place.rglob("*.bin.partial") if path.stat().st_size > 0]


OUTPUTS = {"one": ["--output-prefix", "out/p"], "many": ["--output-dir", "out"]}


def begin(long_corpus: Path, tokenizer: Path, tmp_path: Path, layout: str) -> subprocess.Popen[str]:
    """A run in the middle of its work."""
    place = tmp_path / "out"
    place.mkdir()
    process = start(arguments(long_corpus, tokenizer, *OUTPUTS[layout], "--workers", 2), cwd=tmp_path)
    wait_until(lambda: bool(partials(place)) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "number", "code", "whole_group"),
    [
        ("one", signal.SIGTERM, 143, False),
        ("one", signal.SIGINT, 130, True),
        ("many", signal.SIGTERM, 143, True),
        ("many", signal.SIGINT, 130, False),
    ],
)
def test_signals_clean_up(
    long_corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    layout: str,
    number: signal.Signals,
    code: int,
    whole_group: bool,
) -> None:
    process = begin(long_corpus, tokenizer, tmp_path, layout)
    workers = workers_of(process)
    assert len(workers) == 2
    (os.killpg if whole_group else os.kill)(process.pid, number)
    # The pipes close only when the workers, which inherited them, are gone as well.
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors == "error: interrupted; finished shards stay, run the same command again for the rest.\n"
    assert leftovers(tmp_path / "out") == []
    assert published(tmp_path / "out") == {}
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("layout", long_but(["one", "many"], "many"))
def test_workers_die_with_the_parent(long_corpus: Path, tokenizer: Path, tmp_path: Path, layout: str) -> None:
    process = begin(long_corpus, tokenizer, tmp_path, layout)
    workers = workers_of(process)
    process.kill()
    process.communicate(timeout=30)
    assert len(workers) == 2
    wait_until(lambda: not any(worker.is_running() for worker in workers), 10)


@pytest.mark.slow
@pytest.mark.parametrize("layout", long_but(["one", "many"], "many"))
def test_killed_worker(long_corpus: Path, tokenizer: Path, tmp_path: Path, layout: str) -> None:
    """Its shard has failed, and the other is made; the same command then makes the one that is missing."""
    process = begin(long_corpus, tokenizer, tmp_path, layout)
    max(workers_of(process), key=lambda worker: worker.cpu_times().user).kill()  # not one that still starts
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    lines = errors.splitlines()
    assert lines[0] == "1 shards failed; run the same command again to do only what is missing."
    assert "its worker process died, most likely for want of memory: lower --workers" in lines[1]
    assert f"{long_corpus}/" in lines[1]
    place = tmp_path / "out"
    assert len(published(place)) == (2 if layout == "many" else 0)
    flag, output = OUTPUTS[layout]
    again = run_tool(*arguments(long_corpus, tokenizer, flag, tmp_path / output, "--workers", 2))
    assert again.returncode == 0, again.stderr
    assert ("2 shards to make" in again.stdout, "1 of 2 are finished" in again.stdout) == (
        False,
        layout == "many",
    )
    lists = [name.removesuffix(".shards") for name in published(place) if name.endswith(".shards")]
    assert [open_corpus(place / name).num_documents for name in lists] == [2 * REPEATS * len(TEXTS)]
    assert leftovers(place) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "workers"),
    [*(pytest.param("one", workers, marks=pytest.mark.long) for workers in (1, 2)), ("many", 2)],
)
def test_no_room(long_corpus: Path, tokenizer: Path, tmp_path: Path, layout: str, workers: int) -> None:
    """A limit on file sizes stands for the full disk."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    place = tmp_path / "out"
    place.mkdir()
    output = [OUTPUTS[layout][0], tmp_path / OUTPUTS[layout][1]]
    options = arguments(long_corpus, tokenizer, *output, "--workers", workers)
    process = start(options, preexec_fn=limit_files)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "File too large" in errors
    assert published(place) == {}
    assert leftovers(place) == []
    done = run_tool(*options)
    assert done.returncode == 0, done.stderr
    assert len(published(place)) == (3 if layout == "one" else 5)
