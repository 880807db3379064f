"""Whatever the locale: text is UTF-8 in files, and what a terminal cannot show is printed as escapes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("megatron_iiet", "tools", "benchmarks", "examples")
MODES = ("r", "w", "a", "x", "r+", "w+", "a+")
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
LATIN_1 = {"PYTHONIOENCODING": "latin-1"}


def without_encoding(source: str) -> Iterator[int]:
    """Lines in which a file or a pipe is read or written as text of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        called, first = node.func, node.args[0] if node.args else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
        words = {word.arg: word.value for word in node.keywords}
        if name == "open" and not owner:
            mode = node.args[1] if len(node.args) > 1 else words.get("mode", ast.Constant("r"))
            found = isinstance(mode, ast.Constant) and mode.value in MODES
        elif name == "open":
            found = isinstance(first, ast.Constant) and first.value in MODES
        else:
            found = bool(owner) and owner != "durable" and name in ("read_text", "write_text")
            found = found or ("text" in words and name in ("run", "Popen", "check_output"))
        if found:
            yield node.lineno


@pytest.mark.slow
def test_no_text_depends_on_the_locale() -> None:
    files = [ROOT / "pretrain_iiet.py", ROOT / "distill_iiet.py"]
    files += [file for place in PLACES for file in (ROOT / place).rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}, line {line}: say encoding='utf-8'"
        for file in files
        for line in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(x, encoding='utf-8')", False),
        ("durable.write_text(path, x)", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='w')", True),
        ("path.open('a')", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("subprocess.run(x, text=True)", True),
    ],
)
def test_finds_text_of_the_locale(source: str, found: bool) -> None:
    assert list(without_encoding(source)) == [1] * found


@pytest.mark.parametrize("locale", [ASCII, LATIN_1], ids=["C", "Latin-1"])
def test_what_a_terminal_cannot_show_is_escaped(locale: dict[str, str]) -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import megatron_iiet; print('lr: 1 \\u2192 2, \\u03c9')"],
        cwd=ROOT,
        env={**os.environ, **locale},
        capture_output=True,
        check=True,
    )
    assert said.stdout == b"lr: 1 \\u2192 2, \\u03c9\n"
