"""examples/cleaning/clean.py: what it refuses and, where datatrove is, what it removes of a small corpus."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics  # Python's language reference: real prose that is everywhere

import pytest

from megatron_iiet.data.reading.text import read_chunks
from megatron_iiet.data.tokenizers.training import train_tokenizer
from tests.data.preprocess_runs import documents, run_tool, wait_until, write_rows
from tests.tool_runs import run_here

ROOT = Path(__file__).parents[2]
HERE = find_spec("datatrove") is not None
needs_datatrove = pytest.mark.skipif(
    not HERE, reason="datatrove is not installed: make test-cleaning runs it"
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / "cleaning" / "clean.py"), *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=500)


def test_what_is_left_in_its_folder_stays(tmp_path: Path) -> None:
    clear_up = runpy.run_path(str(ROOT / "examples" / "cleaning" / "clean.py"))["clear_up"]
    theirs = ("filtered/00000.jsonl.zst", "signatures/bucket_003/00001.minhash.sig", "groups/000000.remove")
    for name in (*theirs, "signatures/mine", "mine/of.dups"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_up(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "mine/of.dups",
        "signatures/mine",
    ]
    assert not (tmp_path / "filtered").exists()


def refusal(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 1, done.stdout
    [line] = done.stderr.splitlines()
    return line.removeprefix("error: ")


def test_refusals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, *more: str) -> str:
        arguments = ("--input", f"{tmp_path}/{name}", "--output", f"{tmp_path}/out", *more)
        assert run_here("examples/cleaning/clean.py", *arguments).code == 1
        [line] = capfd.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    (tmp_path / "empty.jsonl").touch()
    assert "absent.jsonl" in refused("absent.jsonl")
    assert "empty.jsonl holds no byte, or is a pipe" in refused("empty.jsonl")
    assert "have to be at least 1" in refused("empty.jsonl", "--tasks", "0")
    if not HERE:
        write_rows(tmp_path / "a.jsonl", [{"text": "A text."}])
        assert refused("a.jsonl") == "datatrove is not installed; run pip install 'megatron-iiet[cleaning]'."
    assert not (tmp_path / "out").exists()


def real_texts() -> list[str]:
    """Four paragraphs of prose each, every one once."""
    found: dict[str, None] = {}
    for text in topics.values():
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", re.sub('["*“”]', "", text))]
        prose = [
            p for p in paragraphs if len(p.split()) >= 25 and p.endswith(".") and not re.search("[{=>]", p)
        ]
        found |= dict.fromkeys("\n".join(prose[at : at + 4]) for at in range(0, len(prose) - 3, 4))
    return list(found)


REAL = real_texts()
JUNK = {  # by the first filter that takes it for that
    "gopher-repetition": [f"Sign up for offer {n} now.\n" * 40 for n in range(5)],
    "gopher-quality": [re.sub("[aeiou]", "3", text) for text in REAL[3:9]],
    "fineweb": [re.sub("[.,;] ", "\n", text).replace(".", "") for text in REAL[:4]],
}


@cache
def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[at:] for at in range(5)), strict=False))


def similarity(one: str, other: str) -> float:
    """Jaccard's, of the runs of five words."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def rows_of(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.zst")):
        for chunk in read_chunks(path):
            yield from map(json.loads, chunk.data.split(b"\n"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Real texts, the longer ones again with a word changed, 10 of halves of two, junk, and defects."""
    near, mixed = [], []
    for text in [text for text in REAL if len(text.split()) > 150]:
        words = text.split(" ")
        near.append(" ".join([*words[:60], "zebra", *words[61:]]))
    for one, other in zip(REAL[:10], REAL[20:30], strict=True):
        mixed.append(one[: len(one) // 2].rsplit(" ", 1)[0] + " " + other[len(other) // 2 :].split(" ", 1)[1])
    texts = {"real": REAL, "near": near, "mixed": mixed, **JUNK}
    rows: list[dict[str, object]] = [
        {"text": text, "meta": {"set": kind, "rank": "../x"}} for kind in texts for text in texts[kind]
    ]
    path = write_rows(
        tmp_path_factory.mktemp("corpus") / "a.jsonl.zst", [*rows, {"text": 1}, {"text": ""}, {}]
    )
    return path, texts


@pytest.fixture(scope="module")
def cleaned(
    corpus: tuple[Path, dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Folder and output of a run that was killed in its first stage, and started again with more workers."""
    output = tmp_path_factory.mktemp("cleaned") / "out"
    arguments = [
        "--input",
        corpus[0],
        "--output",
        output,
        "--keep",
        "meta",
        "--bad-rows",
        "skip",
        "--keep-removed",
    ]
    arguments += ["--tasks", 3, "--filters", "fineweb", "gopher-quality", "gopher-repetition"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        command(*arguments, "--workers", 1),
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    wait_until(lambda: any((output / "logs" / "filter" / "completions").glob("*")), 300)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (output / "documents").exists()
    done = run(*arguments, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "datatrove" not in done.stderr
    return output, done.stdout


@needs_datatrove
def test_what_is_removed_is_counted(
    corpus: tuple[Path, dict[str, list[str]]], cleaned: tuple[Path, str]
) -> None:
    texts, (output, said) = corpus[1], cleaned
    rows = sum(map(len, texts.values()))
    assert f"read: {rows + 3:,} rows\nremoved by defects: 3 (" in said
    assert "empty 1" in said
    lost = 0
    for step in ("gopher-repetition", "gopher-quality", "fineweb", "minhash"):
        removed = list(rows_of(output / "removed" / step))
        lost += len(removed)
        assert f"removed by {step}: {len(removed)}" in said
        assert {row["text"] for row in removed} >= set(JUNK.get(step, ()))
    kept = list(rows_of(output / "documents"))
    assert len(kept) == rows - lost
    assert f"left: {len(kept)} documents in {output}/documents" in said
    every = Counter((text, kind) for kind in texts for text in texts[kind])
    assert Counter((row["text"], row["meta"]["set"]) for row in kept) <= every  # as they were
    assert {row["meta"]["rank"] for row in kept} == {"../x"}
    assert Counter(row["meta"]["set"] for row in kept)["real"] > 40
    assert not {row["meta"]["set"] for row in kept} & set(JUNK)


@needs_datatrove
def test_near_duplicates_go_and_others_stay(
    corpus: tuple[Path, dict[str, list[str]]], cleaned: tuple[Path, str]
) -> None:
    """By similarities that are computed plainly, of all pairs that matter."""
    kept = [row["text"] for row in rows_of(cleaned[0] / "documents")]
    removed = [row["text"] for row in rows_of(cleaned[0] / "removed" / "minhash")]
    there = {*kept, *removed}
    texts = corpus[1]
    of = {
        zebra: next(text for text in texts["real"] if text.split(" ")[:60] == zebra.split(" ")[:60])
        for zebra in texts["near"]
    }
    pairs = [(text, of[text]) for text in texts["near"] if text in there and of[text] in there]
    assert len(pairs) > 25
    alike = [pair for pair in pairs if similarity(*pair) > 0.9]
    assert len(alike) > 25
    for pair in alike:
        assert sum(text in kept for text in pair) <= 1, pair
    for text in removed:
        assert max(similarity(text, other) for other in there if other != text) > 0.6, text
    between = [(one, other) for at, one in enumerate(kept) for other in kept[:at]]
    assert max(similarity(*pair) for pair in between[:4000]) < 0.9
    mixed = [text for text in texts["mixed"] if text in there]
    assert len(mixed) > 3
    assert all(text in kept for text in mixed if max(similarity(text, o) for o in there if o != text) < 0.5)


@needs_datatrove
def test_other_workers_give_the_same(
    corpus: tuple[Path, dict[str, list[str]]], cleaned: tuple[Path, str], tmp_path: Path
) -> None:
    """And one settings file says what was asked."""
    settings = json.loads((cleaned[0] / "settings.json").read_text())
    assert (settings["tasks"], settings["minhash"], "workers" in settings) == (3, True, False)
    arguments = ["--input", corpus[0], "--keep", "meta", "--bad-rows", "skip", "--tasks", 3, "--workers", 3]
    again = run(*arguments, "--output", tmp_path / "out", "--filters", *settings["filters"])
    assert again.returncode == 0, again.stderr
    assert list(rows_of(tmp_path / "out" / "documents")) == list(rows_of(cleaned[0] / "documents"))
    assert not (tmp_path / "out" / "work").exists()


@needs_datatrove
def test_outputs_that_are_there(
    corpus: tuple[Path, dict[str, list[str]]], cleaned: tuple[Path, str], tmp_path: Path
) -> None:
    assert "documents is finished already" in refusal("--input", corpus[0], "--output", cleaned[0])
    (tmp_path / "mine").touch()
    assert "holds other things" in refusal("--input", corpus[0], "--output", tmp_path)
    bad = refusal("--input", corpus[0], "--output", tmp_path / "bad", "--tasks", 1, "--workers", 1)
    assert re.search(r"a\.jsonl\.zst, line \d+: 'text' is '1' \(Number\), not a string", bad)
    other = refusal("--input", corpus[0], "--output", tmp_path / "bad", "--tasks", 2)
    assert "settings.json tells of other inputs, options or datatrove" in other


@needs_datatrove
def test_nothing_left(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ({"text": text} for text in JUNK["gopher-repetition"]))
    said = refusal(
        "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tasks", 1, "--workers", 1
    )
    assert said == "nothing is left of 5 rows; give other --filters, or other inputs."
    assert not (tmp_path / "out" / "documents").exists()


@needs_datatrove
def test_the_preprocessor_reads_it(cleaned: tuple[Path, str], tmp_path: Path) -> None:
    folder = cleaned[0] / "documents"
    tokenizer = train_tokenizer([str(folder)], tmp_path / "small", vocab_size=500).path
    done = run_tool(
        "--input", folder, "--output-dir", tmp_path / "out", "--tokenizer-model", tokenizer,
        "--split-by", "meta.set", "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kinds = Counter(row["meta"]["set"] for row in rows_of(folder))
    made = {kind: len(documents(tmp_path / "out" / f"{kind}_text_document")) for kind in kinds}
    assert made == kinds
