"""Corpora behind urls train as those on a disk do: in fsspec's memory, on an S3 server of this machine (moto,
where it is installed: make test-remote), from a stand-in of the Hugging Face hub."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_iiet.config import config_to_yaml
from megatron_iiet.data import stores
from megatron_iiet.data.corpora.identity import corpus_identity
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.inspection import summarize
from megatron_iiet.data.corpora.merge import merge
from megatron_iiet.data.corpora.mmididx import bin_path, idx_path, shards_path
from megatron_iiet.data.corpora.streams import ShardedDataset, open_corpus
from megatron_iiet.data.corpora.verification import verify
from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.data.loader.samples import KINDS, build_splits
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.data.reading.sources import find_inputs
from megatron_iiet.data.reading.text import iter_documents
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import read_log
from tests.data.hub_server import REVISION, serve_hub
from tests.data.inputs import GOOD, GOOD_TEXTS
from tests.processes import die_with_parent
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
T = 15
NAMES = ("000", "001", "002")


def test_a_store_that_does_not_tell_sizes() -> None:
    with pytest.raises(ValueError, match="the size of http://a/b is not told by its server; copy it"):
        stores.stamp_of("http://a/b", {"name": "b", "size": None, "ETag": "1"})
    assert stores.stamp_of("x", {"size": 0, "etag": "e"}) == (0, "e")


def write_corpora(folder: Path) -> Path:
    """The list ``all`` of three pairs, and the bare pair ``bare``; documents of 1 to 40 tokens."""
    (folder / "all").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name in (*(f"all/{name}" for name in NAMES), "bare"):
        with IndexedDatasetWriter(folder / name, 96) as writer:
            for length in rng.integers(1, 40, 60).tolist():
                writer.add_document(rng.integers(0, 96, length))
    merge([str(folder / "all" / name) for name in NAMES], str(folder / "all"), by_reference=True)
    return folder


@dataclass
class Store:
    """A folder behind a url, of which there is a copy on the disk."""

    url: str
    folder: Path

    def put(self, name: str, content: bytes) -> None:
        files, place = fsspec.url_to_fs(f"{self.url}/{name}")
        files.pipe_file(place, content)

    def remove(self, name: str) -> None:
        files, place = fsspec.url_to_fs(f"{self.url}/{name}")
        files.rm_file(place)


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    reason = "s3fs and moto are not installed: make test-remote does, in an environment of its own"
    pytest.importorskip("s3fs", reason=reason)
    server_of = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer
    server = server_of(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # not a fixture's: child processes need it, too
    fsspec.filesystem("s3").mkdir("corpora")
    yield "s3://corpora"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = request.getfixturevalue("s3_bucket") if request.param == "s3" else "memory://"
    found = Store(f"{root}/{tmp_path.name}", write_corpora(tmp_path / "local"))
    for path in found.folder.rglob("*.*"):
        found.put(str(path.relative_to(found.folder)), path.read_bytes())
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that windows lie across blocks, and a whole index is more than one."""
    monkeypatch.setattr(stores, "BLOCK_BYTES", 100)
    stores._block.cache_clear()
    yield
    stores._block.cache_clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is fetched from now on: url, first byte, end."""
    calls, fetch = [], stores._fetch

    def noted(url: str, stamp: stores.Stamp, start: int, stop: int) -> bytes:
        calls.append((url, start, stop))
        return fetch(url, stamp, start, stop)

    monkeypatch.setattr(stores, "_fetch", noted)
    return calls


def batches_of(*prefixes: str | Path, documents: str = "ignore", **options: Any) -> TrainBatches:
    sources = [build_splits(str(prefix), T, [0.9, 0.1, 0.0], documents, vocab_size=96) for prefix in prefixes]
    defaults = {"global_batch_size": 8, "micro_batch_size": 8, "seed": 1}
    alone = {"data_parallel_rank": 0, "data_parallel_size": 1}
    weights = [1.0 + number for number in range(len(prefixes))]
    return TrainBatches([source.train for source in sources], weights, **{**defaults, **alone, **options})


def rows(batches: Iterator[Any], count: int) -> list[Any]:
    return [
        (batch.tokens.tolist(), None if batch.positions is None else batch.positions.tolist(), batch[2])
        for batch in islice(batches, count)
    ]


@pytest.mark.parametrize("documents", KINDS)
def test_samples_are_those_of_the_disk(store: Store, documents: str) -> None:
    """Over an epoch and more, with threads, of a list blended with a pair; a resume in the middle goes on."""
    here = batches_of(store.folder / "all", store.folder / "bare", documents=documents)
    there = batches_of(
        f"{store.url}/all", f"{store.url}/bare.bin", documents=documents, num_workers=3, timeout=60
    )
    expected = rows(here, 45)
    assert rows(there, 20) == expected[:20]
    again = batches_of(f"{store.url}/all", f"{store.url}/bare", documents=documents)
    again.load_state_dict(there.state_dict())
    assert rows(again, 25) == expected[20:]
    there.close()


def test_what_else_a_corpus_is_asked_for(store: Store, tmp_path: Path) -> None:
    for name in ("all", "bare"):
        here, there = open_corpus(store.folder / name), open_corpus(f"{store.url}/{name}")
        assert corpus_identity(here) == corpus_identity(there)
        assert here.info == there.info
        assert [here.document(i).tolist() for i in range(60)] == [
            there.document(i).tolist() for i in range(60)
        ]
        assert (
            summarize(f"{store.url}/{name}").lengths.buckets()
            == summarize(str(store.folder / name)).lengths.buckets()
        )
        assert verify(f"{store.url}/{name}").num_defects == 0
    validation = [
        rows(
            ValidationBatches(
                [build_splits(prefix, T, [0.0, 1.0, 0.0], vocab_size=96).validation],
                samples=40,
                micro_batch_size=8,
                dp_rank=0,
                dp_size=1,
            ).__iter__(),
            5,
        )
        for prefix in (store.folder / "bare", f"{store.url}/bare")
    ]
    assert str(validation[0]) == str(validation[1])


def test_lists_and_copies_of_what_is_elsewhere(store: Store, tmp_path: Path) -> None:
    """A list on the disk of pairs behind urls, and of their copies."""
    inputs = [f"{store.url}/all", f"{store.url}/bare.idx"]
    merge(inputs, str(tmp_path / "listed"), by_reference=True)
    merge(inputs, str(tmp_path / "copied"))
    local = [str(store.folder / "all"), str(store.folder / "bare")]
    merge(local, str(tmp_path / "expected"))
    listed = ShardedDataset(tmp_path / "listed")
    assert [shard.name for shard in listed.shards] == [
        *(f"{store.url}/all/{name}" for name in NAMES),
        f"{store.url}/bare",
    ]
    expected = open_corpus(tmp_path / "expected")
    assert listed.read(0, listed.num_tokens).tolist() == expected.read(0, expected.num_tokens).tolist()
    assert bin_path(tmp_path / "copied").read_bytes() == bin_path(tmp_path / "expected").read_bytes()
    with pytest.raises(ValueError, match=r"bare is given twice"):
        merge([f"{store.url}/bare", f"{store.url}/bare.bin"], str(tmp_path / "twice"))


def test_what_is_fetched(
    store: Store, fetched: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists and indexes once; of tokens the blocks that are read, a few of which are kept."""
    corpus = open_corpus(f"{store.url}/all")
    for _ in range(2):
        for document in range(0, corpus.num_documents, 7):
            corpus.document_start(document)
    for name in NAMES:
        size = idx_path(store.folder / "all" / name).stat().st_size
        parts = [call for call in fetched if call[0] == f"{store.url}/all/{name}.idx"]
        assert sum(stop - start for _, start, stop in parts) == size
    assert not [url for url, _, _ in fetched if url.endswith(".bin")]
    fetched.clear()
    corpus.read(60, 110)  # bytes 120 to 220
    corpus.read(90, 120)
    assert fetched == [(f"{store.url}/all/000.bin", 100, 200), (f"{store.url}/all/000.bin", 200, 300)]
    fetched.clear()
    monkeypatch.setattr(stores, "_DIRECT_BYTES", 800)
    corpus.read(0, 500)  # so much is read at once, and not kept
    monkeypatch.undo()
    assert fetched == [(f"{store.url}/all/000.bin", 0, 1000)]
    assert stores._block.cache_info().currsize == 2
    assert stores._block.cache_info().maxsize * stores.BLOCK_BYTES == 64 << 20


def flip(store: Store, name: str, place: int) -> None:
    """Another byte in a file, of the store alone."""
    content = bytearray((store.folder / name).read_bytes())
    content[place] ^= 1
    store.put(name, bytes(content))


CHANGES: dict[str, Callable[[Store], None]] = {
    r"all/001\.bin has [\d,]+ bytes and the tag .*, but had [\d,]+ bytes and the tag .* when it was opened: "
    r"it was changed since; restore": lambda store: flip(store, "all/001.bin", 90),
    r"all/001\.bin has 10 bytes and the tag .* was changed": lambda store: store.put(
        "all/001.bin", bytes(10)
    ),
    r"all/001\.bin is gone, but had [\d,]+ bytes": lambda store: store.remove("all/001.bin"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_changed_while_it_is_read(store: Store, message: str) -> None:
    """Also where the shard was let go meanwhile and is opened anew."""
    corpus = ShardedDataset(f"{store.url}/all")
    rarely_open = ShardedDataset(f"{store.url}/all", max_open_shards=1)
    start = corpus.shards.token_ends[1]
    for stream in (corpus, rarely_open):
        stream.read(start, start + 20)
    rarely_open.read(0, 5)
    CHANGES[message](store)
    stores._block.cache_clear()
    for stream in (corpus, rarely_open):
        with pytest.raises(
            (ValueError, OSError), match=message if stream is corpus else r"001\.bin (has|is)"
        ):
            stream.read(start, start + 20)


FAILURES: dict[str, tuple[str, Callable[[Store], None]]] = {
    r"/nothing\.idx is missing; data\.prefix is the path": ("nothing", lambda store: None),
    r"/all\.idx is missing; .*/all is a folder without a list all\.shards": (
        "all",
        lambda store: store.remove("all.shards"),
    ),
    r"/bare\.idx is missing; its partner bare\.bin is there": (
        "bare",
        lambda store: store.remove("bare.idx"),
    ),
    r"/bare\.bin is empty \(0 bytes\)": ("bare", lambda store: store.put("bare.bin", b"")),
    r"/bare\.idx is not a Megatron index": ("bare", lambda store: flip(store, "bare.idx", 0)),
    r"/bare\.idx does not belong to bare\.bin: the index": (
        "bare",
        lambda store: store.put("bare.bin", bytes(8)),
    ),
    r"/all\.shards is cut short or damaged": ("all", lambda store: flip(store, "all.shards", -1)),
    r"/all/000\.bin is missing, and .*/all\.shards names it": (
        "all",
        lambda store: store.remove("all/000.bin"),
    ),
    r"/all/000\.bin does not belong to .*: bytes by the list": (
        "all",
        lambda store: store.put("all/000.bin", bytes(8)),
    ),
    r"/all/000\.idx does not belong to .*: digest by the list": (
        "all",
        lambda store: flip(store, "all/000.idx", 100),
    ),
}


@pytest.mark.parametrize("message", FAILURES)
def test_what_cannot_be_trained_on(store: Store, message: str) -> None:
    name, damage = FAILURES[message]
    damage(store)
    with pytest.raises((ValueError, OSError), match=f"^{store.url}{message}") as error:
        build_splits(f"{store.url}/{name}", T, [0.9, 0.1, 0.0], vocab_size=96)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nothing://a/b",
            r"nothing://a/b\.shards cannot be read \(Protocol not known: nothing\); check its name",
        ),
        ("gs://a/b", r"gs://a/b\.shards cannot be read \(.*gcsfs.*: pip install 'megatron-iiet\[remote\]'"),
    ],
)
def test_stores_out_of_reach(url: str, message: str) -> None:
    if url.startswith("gs") and find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(OSError, match=message):
        open_corpus(url)


def test_inputs_of_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    """What preprocessing reads, by the same door."""
    place = Store(f"{s3_bucket}/{tmp_path.name}", tmp_path)
    place.put("texts/a.jsonl", GOOD)
    place.put("texts/b.jsonl", GOOD)
    found = find_inputs([f"{place.url}/texts"])
    assert [file.path for file in found.files] == [f"{place.url}/texts/{name}.jsonl" for name in "ab"]
    assert list(iter_documents(found.files)) == [*GOOD_TEXTS, *GOOD_TEXTS]
    with pytest.raises(ValueError, match=r"The input s3://corpora/no\.jsonl is missing"):
        find_inputs(["s3://corpora/no.jsonl"])


@pytest.mark.slow
def test_a_run_of_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    """Losses of one on the disk, to the last bit; going on from a checkpoint of that, too."""
    paths = make_data(tmp_path)
    place = Store(f"{s3_bucket}/{tmp_path.name}", tmp_path)
    for path in (bin_path(paths["prefix"]), idx_path(paths["prefix"])):
        place.put(path.name, path.read_bytes())
    program = [sys.executable, "-W", "ignore", str(ROOT / "pretrain_iiet.py"), "--config"]
    losses = {}
    for name, prefix in (("disk", paths["prefix"]), ("bucket", f"{place.url}/shard")):
        more = {"evaluation": {"interval": 4}, "checkpoint": {"interval": 4}, "logging": {"interval": 1}}
        config = tiny_config({**paths, "prefix": prefix}, tmp_path / name, **more)
        (tmp_path / f"{name}.yaml").write_text(config_to_yaml(config))
        subprocess.run([*program, str(tmp_path / f"{name}.yaml")], check=True, timeout=300)
        losses[name] = logged(tmp_path / name)
    assert losses["bucket"] == losses["disk"]
    shutil.rmtree(tmp_path / "disk" / "checkpoints" / checkpoint.tag_of(8))
    on = [*program, str(tmp_path / "disk.yaml"), "--data.prefix", f"{place.url}/shard"]
    said = subprocess.run(on, check=True, timeout=300, capture_output=True, text=True).stdout
    assert "step_00000004" in said
    assert logged(tmp_path / "disk") == losses["disk"]
    place.put("shard.bin", bytes(bin_path(paths["prefix"]).stat().st_size))
    shutil.rmtree(tmp_path / "disk" / "checkpoints" / checkpoint.tag_of(8))
    refused = subprocess.run(on, timeout=300, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"{place.url}/shard with tokens of digest" in refused.stderr


def logged(run: Path) -> dict[int, tuple[float | None, float | None]]:
    """Losses of every step."""
    return {step: (row.get("loss"), row.get("validation_loss")) for step, row in read_log(run).items()}


def read_in_child(corpus: ShardedDataset, parent: int, answers: Any) -> None:
    die_with_parent(parent)
    stores._block.cache_clear()
    answers.put(corpus.read(0, 200).tolist())


@pytest.mark.slow
def test_after_a_fork(tmp_path: Path) -> None:
    """An asynchronous file system, whose thread a child does not have, is made anew there."""
    write_corpora(tmp_path / "me" / "corpora")
    with serve_hub(tmp_path) as address:
        corpus = open_corpus(f"{address}/datasets/me/corpora/resolve/main/all")
        expected = corpus.read(0, 200).tolist()
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=read_in_child, args=(corpus, os.getpid(), answers))
        child.start()
        assert answers.get(timeout=60) == expected
        child.join(60)
    assert expected == open_corpus(tmp_path / "me" / "corpora" / "all").read(0, 200).tolist()


READ_ALL = """
import json, sys
from megatron_iiet.data.corpora.streams import open_corpus
corpus = open_corpus(sys.argv[1])
print(json.dumps(corpus.read(0, corpus.num_tokens).tolist()))
"""


@pytest.mark.slow
def test_a_corpus_of_the_hub(tmp_path: Path) -> None:
    """By a stand-in that answers as the hub does to its own client."""
    write_corpora(tmp_path / "me" / "corpora")
    with serve_hub(tmp_path) as address:
        found = subprocess.run(
            [sys.executable, "-c", READ_ALL, f"hf://datasets/me/corpora@{REVISION}/all"],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert found.returncode == 0, found.stderr
    corpus = open_corpus(tmp_path / "me" / "corpora" / "all")
    assert json.loads(found.stdout) == corpus.read(0, corpus.num_tokens).tolist()
    assert shards_path(tmp_path / "me" / "corpora" / "all").exists()
