"""The docstring corpus, from a made-up installation and from a few real packages."""

from __future__ import annotations

import json
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from examples.demo import docstring_corpus
from examples.demo.docstring_corpus import SET_NAME, build_corpus, extract, installed_packages, prose_share
from megatron_iiet.data.reading.kinds import Reading
from megatron_iiet.data.reading.text import iter_documents, parse_rows, read_chunks
from tests.data.inputs import make_texts

PROSE = "This function returns the number of things that were found in the folder when it was called."
SOURCE = f'''"""Module text. {PROSE}"""
raise RuntimeError("sources are parsed, never imported")

class Thing:
    """Class text. {PROSE}

        An indented paragraph stays indented. {PROSE}

    The end.
    """

    async def method(self):
        r"""Method text with a \\d. {PROSE}"""

        def inner():
            """Inner text. {PROSE}"""

if True:
    def conditional():
        """Conditional text. {PROSE}"""

def same():
    """Module text. {PROSE}"""

def short():
    """Short."""
'''


def install(site: Path, name: str, files: dict[str, str], metadata: str = "License: MIT\n") -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, "made_up/not_installed.py"]))
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with two packages, in place of the real one."""
    site = tmp_path / "site"
    copies = {f"one/{folder}/x.py": SOURCE.replace("text.", folder) for folder in ("tests", "_vendor")}
    install(site, "one", {"one/__init__.py": SOURCE, "one/broken.py": "def (:\n" + SOURCE, **copies})
    wordy = "\n".join(
        f'def f{i}():\n    """{PROSE} {text}"""' for i, text in enumerate(make_texts(9, seed=5))
    )
    install(site, "Two_b", {"two/a.py": wordy, "two/test_a.py": SOURCE}, "License-Expression: Apache-2.0\n")
    found = [PathDistribution(info) for info in site.glob("*.dist-info")]
    monkeypatch.setattr(docstring_corpus.metadata, "distributions", lambda: found)
    return site


def rows_of(path: Path) -> list[dict]:
    lines = [line for chunk in read_chunks(path) for line in chunk.data.decode().split("\n")]
    return [json.loads(line) for line in lines]


def test_corpus(site: Path, tmp_path: Path) -> None:
    report = build_corpus(tmp_path / "c.jsonl.zst", min_characters=50)
    rows = {row["meta"]["object"]: row for row in rows_of(tmp_path / "c.jsonl.zst")}
    ours = {name: row for name, row in rows.items() if row["meta"]["package"] == "one"}
    assert set(ours) == {
        "one",
        "one.Thing",
        "one.Thing.method",
        "one.Thing.method.inner",
        "one.conditional",
    }
    assert ours["one.Thing"]["text"].startswith(f"Class text. {PROSE}\n\n    An indented")
    assert ours["one"]["meta"] == {
        "redpajama_set_name": "PythonDocstrings",
        "package": "one",
        "version": "1.0",
        "license": "MIT",
        "object": "one",
    }
    assert len(rows) == 5 + 9
    assert report.dropped == {"duplicates": 1}
    summary = json.loads((tmp_path / "c.jsonl.zst.licenses.json").read_text())
    assert [(row["package"], row["license"], row["documents"]) for row in summary] == [
        ("one", "MIT", 5),
        ("Two_b", "Apache-2.0", 9),
    ]
    assert sum(row["characters"] for row in summary) == sum(len(row["text"]) for row in rows.values())
    assert "14 documents" in str(report)
    packages = [row["meta"]["package"] for row in rows.values()]
    assert packages != sorted(packages, key=str.lower)  # shuffled
    assert len(list(tmp_path.glob("*.partial"))) == 0


def test_workers_and_repetition_do_not_change_it(site: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        build_corpus(tmp_path / f"{name}.jsonl.zst", min_characters=50, workers=workers)
    contents = {(tmp_path / f"{name}.jsonl.zst").read_bytes() for name in "abc"}
    assert len(contents) == 1


def test_refusals(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output, packages, minimum, message in [
        ("c.jsonl", None, 50, r"c\.jsonl does not end in \.jsonl\.zst"),
        ("file/c.jsonl.zst", None, 50, "c.jsonl.zst cannot be written: .*file is a file"),
        ("c.jsonl.zst", ["absent"], 50, "The package absent is not installed"),
        ("c.jsonl.zst", None, 10**6, "No docstring of 1000000 characters"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_corpus(tmp_path / output, packages, minimum)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "site"]


def test_names_are_normalised(site: Path) -> None:
    assert [package.name for package in installed_packages(["two-B", "ONE"])] == ["one", "Two_b"]


@pytest.mark.parametrize("text", [PROSE, f"{PROSE}\n\n>>> f(1)\n2"])
def test_prose_is_prose(text: str) -> None:
    assert prose_share(text) > 0.8


@pytest.mark.parametrize(
    "text",
    [
        ">>> the words of this line look like prose\nand so does its output here",
        "```python\nfor each of the words in this line\n```",
        "x = f(a, b)\ny = g(x)\nreturn x + y",
        "| one | two |\n+-----+-----+\n| 1.0 | 2.0 |",
        "",
    ],
)
def test_code_and_tables_are_not(text: str) -> None:
    assert prose_share(text) == 0


def test_near_duplicates_are_left_out() -> None:
    selection = docstring_corpus._Selection()
    lines = [f"Line {word} of a text that is long enough to count." for word in "abcdefghij"]
    assert selection.keep("\n".join(lines))
    assert not selection.keep("\n".join([*lines[:9], "But one line is a new one, of similar length."]))
    assert selection.keep("\n".join([*lines[:3], *(line.upper() for line in lines[3:])]))
    assert dict(selection.dropped) == {"near duplicates": 1}


def test_unreadable_sources_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "nul.py").write_bytes(f'"""{PROSE}"""\0'.encode())
    assert extract(str(tmp_path / "nul.py"), "nul", 20) == []
    assert extract(str(tmp_path / "absent.py"), "absent", 20) == []
    (tmp_path / "half.py").write_text(f'"""\\ud800 {PROSE}"""')
    assert extract(str(tmp_path / "half.py"), "half", 20) == []


@pytest.mark.slow
def test_a_real_package(tmp_path: Path) -> None:
    report = build_corpus(tmp_path / "c.jsonl.zst", packages=["pytest", "tqdm"])
    texts = list(iter_documents([tmp_path / "c.jsonl.zst"]))
    assert len(texts) == sum(share.documents for share in report.packages) > 50
    assert all(len(text) >= 200 for text in texts)
    assert {share.package for share in report.packages} == {"pytest", "tqdm"}
    (first, *_) = read_chunks(tmp_path / "c.jsonl.zst")
    rows, rejects = parse_rows(first, Reading(source_key="meta.redpajama_set_name"))
    assert (rows[0].texts, rows[0].source, rejects) == ((texts[0],), SET_NAME, [])
