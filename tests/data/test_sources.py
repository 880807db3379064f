"""Listing inputs: paths, folders, globs, urls of real stores, dataset folders, and a hub on this machine."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megatron_iiet.data.reading.sources import (
    InputFile,
    find_inputs,
    list_dataset,
    list_inputs,
    open_input,
)
from megatron_iiet.data.reading.text import iter_documents, read_chunks
from tests.data.hub_server import REVISION, serve_hub
from tests.data.inputs import GOOD, GOOD_TEXTS, INPUT_CASES, InputCase, jsonl, zstd


def names(files: list[InputFile], root: Path | str) -> list[str]:
    """Paths relative to a folder or url."""
    return [file.path.removeprefix(f"{root}/") for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "chunk2/b.jsonl.zst",
        "chunk10/c.jsonl",
        "chunk2/a.json.gz",
        "d.ndjson",
        "notes.txt",
        "chunk2/.hidden.jsonl",
        ".cache/e.jsonl",
        "f.jsonl.partial",
        "g.jsonl.tmp",
        "h.parquet",
    ):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(GOOD)
    return tmp_path / "tree"


IN_TREE = ["chunk10/c.jsonl", "chunk2/a.json.gz", "chunk2/b.jsonl.zst", "d.ndjson", "h.parquet", "notes.txt"]
LEFT_OUT = [
    ("README.md", "licences, readmes and the like"),
    ("License-MIT.txt", "licences, readmes and the like"),
    ("of.licenses.json", "licences, readmes and the like"),
    ("licences.txt", "licences, readmes and the like"),
    ("bundle.js.LICENSE.txt", "licences, readmes and the like"),
    ("requirements.txt", "files of packages, sites, models and tokenizers"),
    ("requirements-cpu.txt", "files of packages, sites, models and tokenizers"),
    ("robots.txt", "files of packages, sites, models and tokenizers"),
    ("SHA256SUMS.txt", "files of packages, sites, models and tokenizers"),
    ("package.json", "files of packages, sites, models and tokenizers"),
    ("tokenizer_config.json", "files of packages, sites, models and tokenizers"),
    ("model.safetensors.index.json", "files of packages, sites, models and tokenizers"),
    ("merges.txt", "files of packages, sites, models and tokenizers"),
    ("dataset_info.json", "files about datasets or caches of them"),
    ("dataset_infos.json", "files about datasets or caches of them"),
    ("saved/state.json", "files about datasets or caches of them"),
    ("saved/cache-1f.arrow", "files about datasets or caches of them"),
    ("a.pdf", "of unknown kinds"),
    ("part-00000", "of unknown kinds"),
    ("b.parquet.gz", "of unknown kinds"),
    ("f.jsonl.partial", "unfinished"),
    ("g.jsonl.tmp", "unfinished"),
    ("out/preprocess/job-00000-of-00001.jsonl", "records of preprocessing"),
    ("p.preprocess/digests/deep/x.jsonl", "records of preprocessing"),
]


READ = ["licensed.txt", "licenses.jsonl", "my-requirements.txt", "robots2.txt", "security-2.txt"]
READ += ["configuration.json", "the copying.txt"]
"""Data, whatever part of their names says."""


def test_folders(tree: Path) -> None:
    assert names(list_inputs([str(tree)]), tree) == IN_TREE
    assert names(list_inputs([f"{tree}/chunk2", f"{tree}/chunk10/"]), tree) == [
        "chunk2/a.json.gz",
        "chunk2/b.jsonl.zst",
        "chunk10/c.jsonl",
    ]


def test_linked_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.jsonl").write_bytes(GOOD)
    (tree / "link").symlink_to(tmp_path / "other")
    (tree / "chunk2" / "loop").symlink_to(tree)
    assert names(list_inputs([str(tree)]), tree) == sorted([*IN_TREE, "link/z.jsonl"])


def test_globs_and_paths(tree: Path) -> None:
    (tree / "x[1].jsonl").write_bytes(GOOD)
    found = list_inputs([f"{tree}/x[1].jsonl", f"{tree}/chunk*/*.json*", f"{tree}/**/d.*"])
    assert names(found, tree) == ["x[1].jsonl", *IN_TREE[:4]]


def test_size_and_stamp(tree: Path) -> None:
    path = tree / "d.ndjson"
    (before,) = list_inputs([str(path)])
    assert before == InputFile(str(path), len(GOOD), str(path.stat().st_mtime_ns))
    os.utime(path, ns=(1, 1))
    assert list_inputs([str(path)]) == [InputFile(str(path), len(GOOD), "1")]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_a_folder_leaves_out_is_named(tree: Path, scheme: str) -> None:
    for name, _ in LEFT_OUT:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(GOOD)
    for name in ("out/preprocess/plan.json", "p.preprocess/plan.json"):
        (tree / name).write_text("{}")
    for name in READ:
        (tree / name).write_bytes(GOOD)
    (tree / "preprocess").mkdir()
    (tree / "preprocess" / "mine.jsonl").write_bytes(GOOD)
    found = find_inputs([f"{scheme}{tree}"])
    assert names(found.files, f"{scheme}{tree}") == sorted([*IN_TREE, *READ, "preprocess/mine.jsonl"])
    left_out = {path: reason for reason, paths in found.left_out.items() for path in paths}
    assert {str(tree / name): reason for name, reason in LEFT_OUT}.items() <= left_out.items()
    assert sorted(left_out.values()).count("hidden") == 2
    assert str(found).startswith(f"inputs: {1 + len(READ) - 2} .txt, 3 .jsonl, 1 .json.gz, 1")
    assert "3 of unknown kinds (a.pdf, b.parquet.gz, part-00000)" in str(found)
    part = f"{scheme}{tree}/part-00000"
    assert part in [file.path for file in find_inputs([f"{scheme}{tree}"], "jsonl").files]
    assert list(iter_documents(list_inputs([part, f"{tree}/License-MIT.txt"])))[:10] == GOOD_TEXTS
    with pytest.raises(ValueError, match=r"preprocess holds .* left out: 2 records of preprocessing \("):
        list_inputs([f"{scheme}{tree}/out/preprocess"])
    with pytest.raises(ValueError, match=r"left out: 1 records of preprocessing \(job-00000"):
        list_inputs([f"{scheme}{tree}/out/**/*.jsonl"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*.gz"], r"input .*\*\.gz holds or matches no \.jsonl, \.json, .* files; check"),
        (["empty"], r"input .*empty holds or matches no"),
        (["no.jsonl"], r"no\.jsonl is missing"),
        (["broken.jsonl"], r"broken\.jsonl is missing"),
        (["chunk2/*.fifo.jsonl"], r"a\.fifo\.jsonl can be read only once; name it by itself"),
        (["socket.jsonl"], r"socket\.jsonl is no regular file"),
        (["a.docx"], r"a\.docx is of an unknown kind; give \.jsonl.* files, or --input-format"),
        (["f.jsonl.partial"], r"f\.jsonl\.partial is of an unknown kind"),
        (["chunk*"], r"chunk10 is a folder"),
        (["d.ndjson", "*.ndjson"], r"d\.ndjson is named twice; name every file once"),
        (["d.ndjson", "chunk2/../d.ndjson"], r"\.\./d\.ndjson is named twice \(also as .*/d\.ndjson\)"),
        (["", "d.ndjson"], r"d\.ndjson is named twice \(also as .*//?d\.ndjson\)|d\.ndjson is named twice;"),
        (["d.ndjson", "linked.jsonl"], r"linked\.jsonl is named twice \(also as .*/d\.ndjson\)"),
    ],
)
def test_bad_inputs(tree: Path, patterns: list[str], message: str) -> None:
    (tree / "empty").mkdir()
    (tree / "broken.jsonl").symlink_to("nowhere")
    (tree / "linked.jsonl").symlink_to("d.ndjson")
    (tree / "a.docx").write_bytes(GOOD)
    os.mkfifo(tree / "chunk2" / "a.fifo.jsonl")
    os.mknod(tree / "socket.jsonl", stat.S_IFSOCK | 0o600)
    if patterns[0] == "":
        for name in ("broken.jsonl", "linked.jsonl", "socket.jsonl", "chunk2/a.fifo.jsonl"):
            (tree / name).unlink()
    with pytest.raises(ValueError, match=message):
        list_inputs([f"{tree}/{pattern}" for pattern in patterns])


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tree: Path) -> Iterator[str]:
    """Url of a copy of the tree."""
    if request.param == "file":
        yield f"file://{tree}"
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(tree), "/tree", recursive=True)
    yield "memory:///tree"
    memory.rm("/tree", recursive=True)


def test_urls(store: str) -> None:
    files = list_inputs([store])
    root = files[-1].path.removesuffix("/notes.txt")
    assert names(files, root) == IN_TREE
    assert {file.size for file in files} == {len(GOOD)}
    assert all(file.stamp != "unknown" for file in files)
    assert names(list_inputs([f"{store}/d.ndjson", f"{store}/chunk*/*.jsonl*"]), root) == [
        "d.ndjson",
        "chunk10/c.jsonl",
        "chunk2/b.jsonl.zst",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no.jsonl", r"no\.jsonl is missing"),
        ("no/no.jsonl", r"no\.jsonl is missing"),
        ("*.txt.gz", r"\*\.txt\.gz holds or matches no"),
        ("notes.docx", r"notes\.docx is of an unknown kind"),
    ],
)
def test_bad_urls(store: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_inputs([f"{store}/{pattern}"])
    with pytest.raises(ValueError, match=r"named twice"):
        list_inputs([f"{store}/d.ndjson", f"{store}/*.ndjson"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://a/b.jsonl", "cannot be listed: Protocol not known"),
        ("s3://a/b.jsonl", "cannot be listed"),
        ("https://a/b.jsonl", "is on a web server, .*; download it"),
        ("HTTP://a/b.gz", "is on a web server"),
    ],
)
def test_stores_out_of_reach(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^The input {url} {message}"):
        list_inputs([url])


@pytest.mark.parametrize("case", INPUT_CASES, ids=lambda case: case.name)
def test_urls_are_read_as_files_are(tmp_path: Path, case: InputCase) -> None:
    path = case.write(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{case.name}", case.content)
    url = f"memory:///{case.name}"
    if case.error:
        with pytest.raises(ValueError, match=case.error):
            list(read_chunks(url))
    else:
        assert [chunk.data for chunk in read_chunks(url)] == [chunk.data for chunk in read_chunks(path)]
    memory.rm_file(f"/{case.name}")


def test_a_store_that_fails_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    message = r"^file://.*a\.jsonl cannot be read \(line gone\); check its name and your access, or"
    with pytest.raises(OSError, match=message), open_input(f"file://{path}"):
        raise ConnectionResetError("line\ngone")
    with pytest.raises(OSError, match=r"gone\.jsonl is missing"):
        list(read_chunks("memory:///gone.jsonl"))


README = """---
configs:
- config_name: large
  data_files: [{split: train, path: "train/**"}]
- config_name: small
  data_files: [{split: train, path: "validation/**"}, {split: extra, path: "train/chunk1/*"}]
---
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder of SlimPajama's shape."""
    folder = tmp_path / "hub" / "me" / "slim"
    for split in ("train", "validation", "test"):
        for chunk in (1, 2):
            (folder / split / f"chunk{chunk}").mkdir(parents=True)
            for part in (0, 2, 10):
                name = f"example_{split}_{part}.jsonl.zst"
                (folder / split / f"chunk{chunk}" / name).write_bytes(
                    zstd(jsonl([f"{split} {chunk} {part}"]))
                )
    return folder


def parts(split: str, *chunks: int) -> list[str]:
    """In the order of their paths."""
    return [
        f"{split}/chunk{chunk}/example_{split}_{part}.jsonl.zst" for chunk in chunks for part in (0, 10, 2)
    ]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_folder(dataset: Path, split: str, streaming: bool) -> None:
    (dataset / split / "chunk1" / "late.jsonl.zst.partial").write_bytes(b"x")
    files = list_dataset(str(dataset), split, streaming)
    assert names(files, dataset) == parts(split, 1, 2)
    assert files == list_inputs([str(dataset / split)])
    assert list(iter_documents(files)) == [
        f"{split} {chunk} {part}" for chunk in (1, 2) for part in (0, 10, 2)
    ]


def test_dataset_folder_with_configurations(dataset: Path) -> None:
    (dataset / "README.md").write_text(README)
    with pytest.raises(ValueError, match=r"slim cannot be opened: .*\['large', 'small'\]") as error:
        list_dataset(str(dataset))
    assert "\n" not in str(error.value)
    (dataset / "README.md").write_text(README.replace("_name: small", "_name: small\n  default: true"))
    assert names(list_dataset(str(dataset)), dataset) == parts("validation", 1, 2)
    assert names(list_dataset(str(dataset), "extra"), dataset) == parts("train", 1)


def test_a_dataset_by_its_relative_path(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    assert names(list_dataset("slim"), dataset) == parts("train", 1, 2)


def test_bad_datasets(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slim has no split 'valid', only test, train, validation\."):
        list_dataset(str(dataset), "valid")
    with pytest.raises(ValueError, match=r"The dataset folder /no/slim is missing"):
        list_dataset("/no/slim")
    with pytest.raises(ValueError, match=r"The dataset not a name is neither a local folder nor"):
        list_dataset("not a name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be opened: "):
        list_dataset(str(tmp_path / "empty"))
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"keeps its text in .*train\.xml; \.jsonl.* files can be read"):
        list_dataset(str(tmp_path / "csv"))


ASK_HUB = """
import json, sys
from megatron_iiet.data.reading.sources import list_dataset
from megatron_iiet.data.reading.text import iter_documents
for name, split, streaming in json.loads(sys.argv[1]):
    try:
        files = list_dataset(name, split, streaming)
        print(json.dumps([[file.path, file.size, file.stamp] for file in files]))
        print(json.dumps(list(iter_documents(files))))
    except (OSError, ValueError) as error:
        print(json.dumps(str(error)))
"""


def ask_hub(address: str, home: Path, *questions: tuple[str, str, bool], **environment: str) -> list[object]:
    """What a fresh process prints: the hub's address is read when its client is imported."""
    result = subprocess.run(
        [sys.executable, "-c", ASK_HUB, json.dumps(questions)],
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_a_dataset_of_the_hub(dataset: Path, tmp_path: Path) -> None:
    (dataset.parent / "closed").mkdir()
    with serve_hub(tmp_path / "hub", gated="me/closed") as address:
        streamed, texts, downloaded, same_texts, no_split, closed, unknown = ask_hub(
            address,
            tmp_path / "home",
            ("me/slim", "train", True),
            ("me/slim", "train", False),
            ("me/slim", "valid", True),
            ("me/closed", "train", True),
            ("me/nothing", "train", True),
        )
    assert streamed == downloaded
    assert isinstance(streamed, list)
    root = f"hf://datasets/me/slim@{REVISION}"
    assert [path.removeprefix(f"{root}/") for path, *_ in streamed] == parts("train", 1, 2)
    assert [size for _, size, _ in streamed] == [
        (dataset / part).stat().st_size for part in parts("train", 1, 2)
    ]
    assert len({stamp for *_, stamp in streamed}) == 6
    assert texts == same_texts == [f"train {chunk} {part}" for chunk in (1, 2) for part in (0, 10, 2)]
    assert no_split == "The dataset me/slim has no split 'valid', only test, train, validation."
    assert str(closed).startswith("The dataset me/closed is gated; accept its terms")
    assert str(unknown).startswith(
        "The dataset me/nothing is neither a local folder nor a dataset on the hub"
    )
    cached = (tmp_path / "home" / "hub").rglob("example_train_*.jsonl.zst")
    assert len(list(cached)) == 6


@pytest.mark.slow
def test_no_hub_in_reach(tmp_path: Path) -> None:
    """One sentence, at once: nothing listens at this address."""
    question = ("me/slim", "train", True)
    (no_network,) = ask_hub("http://127.0.0.1:9", tmp_path, question)
    (offline,) = ask_hub("http://127.0.0.1:9", tmp_path, question, HF_HUB_OFFLINE="1")
    start = "The dataset me/slim is no local folder, and the hub cannot be asked for it ("
    assert str(no_network).startswith(start)
    assert str(offline).startswith(
        start + "HF_HUB_OFFLINE is set); fetch it where there is a network, with `hf"
    )


def test_reading_needs_no_heavy_import() -> None:
    """Workers start with this module; the libraries of stores and datasets are for those who use them."""
    code = "import sys, megatron_iiet.data.reading.text; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "megatron_iiet.data.reading.sources" in modules
    assert not {"torch", "datasets", "fsspec", "huggingface_hub", "pyarrow", "pandas"} & set(modules)
