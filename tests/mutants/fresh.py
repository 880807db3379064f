"""Draws single-line faults at random, each a line as somebody tired might have written it, into a list.

    python -m tests.mutants.fresh --number 100 --seed 7 --output fresh.toml         # package and tools
    python -m tests.mutants.run --list fresh.toml                                   # which are found?
    python -m tests.mutants.fresh --number 20 --output fresh.toml hf tools          # rooms or folders

The kept lists beside this file hold faults that tests were written for. How many of *fresh* ones the tests
find is the measure of them. The same seed draws the same faults of the same sources. Files that run only with
a package that is not installed here are left out. The tests an entry names are a proposal: those that kept
faults of its file name, those that import it, those of its room. A fault that they miss is tried with others
by hand. A person sets aside what changes nothing that a user sees; the rest want a test, and join a kept
list.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.mutants.faults import PACKAGE, read_faults

ROOT = Path(__file__).resolve().parents[2]
PLACES = (PACKAGE, "tools", "pretrain_iiet.py", "distill_iiet.py")
SWAPPED = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"),
}  # fmt: skip
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "sorted": "list"}
LEFT_ALONE = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)
MOST_TESTS = 6
ELSEWHERE = {"ops/triton_kernels.py": "triton", "hf/vllm_plugin/": "vllm"}
"""What runs only with a package of its own: make gpu-check and make test-vllm have it."""


class Change(NamedTuple):
    """Replace the characters [start, end) of a source text."""

    start: int
    end: int
    new: str
    what: str


class Source:
    """A text, its syntax tree, and where a node stands in it."""

    def __init__(self, text: str) -> None:
        self.text, self.tree = text, ast.parse(text)
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, byte: int) -> int:
        """Position of a byte of a line, in characters."""
        start = self.starts[line - 1]
        return start + len(self.text[start : self.starts[line]].encode()[:byte].decode())

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def changes(self) -> list[Change]:
        """Every change of one line that this module knows to make."""
        return [
            change
            for node in self._nodes(self.tree)
            for change in self._of(node)
            if "\n" not in self.text[change.start : change.end]
        ]

    def _nodes(self, node: ast.AST) -> Iterator[ast.AST]:
        """All nodes that run: no annotations, no messages, nothing that only a type checker reads."""
        if isinstance(node, LEFT_ALONE) or "TYPE_CHECKING" in ast.dump(getattr(node, "test", ast.Pass())):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_params", "bases"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._nodes(child)

    def _of(self, node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from self._operator(left, right, op)
            case ast.BoolOp(values=[left, right, *_], op=op) | ast.BinOp(left=left, right=right, op=op):
                yield from self._operator(left, right, op)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield Change(self.span(node)[0], self.span(operand)[0], "", "not is gone")
            case ast.Constant(value=bool(value)):
                yield Change(*self.span(node), str(not value), f"{value} is {not value}")
            case ast.Constant(value=int(value) | float(value)):
                new = value + 1 if isinstance(value, int) else value * 2 or 1.0
                yield Change(*self.span(node), repr(new), f"{value} is {new}")
            case ast.Return(value=ast.expr() as value) if not _is(value, None):
                yield Change(*self.span(value), "None", "nothing is returned")
            case ast.Expr(value=ast.Call() | ast.Yield() | ast.Await()):
                yield Change(*self.span(node), "pass", "a statement is gone")
            case ast.AugAssign():
                start, end = self.span(node.target)[1], self.span(node.value)[0]
                yield Change(start, end, " = ", "an in-place change is an assignment")
            case ast.Slice(lower=ast.expr() as lower):
                yield Change(*self.span(lower), "", "a slice starts at the start")
            case ast.Slice(upper=ast.expr() as upper):
                yield Change(*self.span(upper), "", "a slice ends at the end")
            case ast.IfExp(test=test) | ast.If(test=test) | ast.While(test=test):
                if not isinstance(test, ast.Compare | ast.UnaryOp):
                    yield Change(*self.span(test), f"not ({self._text(test)})", "a condition is turned round")
            case ast.Call(func=func, keywords=keywords):
                if isinstance(func, ast.Name) and func.id in RENAMED:
                    yield Change(*self.span(func), RENAMED[func.id], f"{func.id} is {RENAMED[func.id]}")
                if keywords and keywords[-1].arg is not None and (func_end := self.span(func)[1]):
                    start, end = self.span(keywords[-1])
                    comma = self.text.rfind(",", func_end, start)
                    yield Change(max(comma, func_end + 1), end, "", f"argument {keywords[-1].arg} is gone")

    def _operator(self, left: ast.expr, right: ast.expr, op: ast.AST) -> Iterator[Change]:
        old, new = SWAPPED.get(type(op), ("", ""))
        start, end = self.span(left)[1], self.span(right)[0]
        place = self.text.find(old, start, end) if old else -1
        if place >= 0 and not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            yield Change(place, place + len(old), new, f"'{old}' is '{new}'")

    def _text(self, node: ast.expr) -> str:
        return self.text[slice(*self.span(node))]

    def fragment(self, change: Change) -> tuple[str, str] | None:
        """The fewest whole lines round a change that occur once, before and after; None: no valid Python."""
        start = self.text.rfind("\n", 0, change.start) + 1
        end = self.text.find("\n", change.end)
        while self.text.count(self.text[start:end]) > 1 and start:
            start = self.text.rfind("\n", 0, start - 1) + 1
        find = self.text[start:end]
        replace = find[: change.start - start] + change.new + find[change.end - start :]
        try:
            compile(self.text.replace(find, replace), "source with a fault", "exec")
        except SyntaxError:
            return None
        return find, replace


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources(places: Sequence[str], root: Path) -> list[Path]:
    """Files of rooms of the package, of folders and files; all if none is named.

    Raises:
        ValueError: there is no such place.
    """
    found: list[Path] = []
    for place in places or PLACES:
        path = next((path for path in (root / PACKAGE / place, root / place) if path.exists()), None)
        if path is None:
            raise ValueError(f"there is no {place} in {PACKAGE} and none in {root}")
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    missing = [place for place, package in ELSEWHERE.items() if find_spec(package) is None]
    return [path for path in found if not any(place in str(path.relative_to(root)) for place in missing)]


@functools.cache
def tests_of_kept_faults(root: Path) -> dict[str, Counter[str]]:
    """How often the kept faults of each source file name which test file."""
    tests: dict[str, Counter[str]] = {}
    texts = {path: path.read_text() for path in sources((), root)}
    for fault in read_faults():
        for path, text in texts.items():
            if fault.find in text and str(path).endswith(fault.file):
                named = tests.setdefault(str(path.relative_to(root)), Counter())
                named.update({test.partition("::")[0] for test in fault.tests})
    return tests


@functools.cache
def test_files(root: Path) -> dict[str, str]:
    """Texts of all test files."""
    return {
        str(path.relative_to(root)): path.read_text() for path in sorted((root / "tests").rglob("test_*.py"))
    }


def proposed_tests(file: str, root: Path) -> list[str]:
    """Test files that kept faults of a source name most often, that import it and have its names most often,
    and those of its room; at most MOST_TESTS."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, name = module.rpartition(".")
    folder = file.split("/")[1] if file.startswith(PACKAGE) else "gpu" if "gpu_" in file else "e2e"
    room = f"tests/{folder}/"
    body = ast.parse((root / file).read_text()).body
    own = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    importing = {
        path: sum(map(text.count, own))
        for path, text in test_files(root).items()
        if module in text or (parent and f"from {parent} import {name}" in text) or Path(file).name in text
    }
    of_room = [path for path in test_files(root) if path.startswith(room)]
    kept = [path for path, _ in tests_of_kept_faults(root).get(file, Counter()).most_common(MOST_TESTS - 1)]
    tests = [*kept, *sorted(importing, key=lambda path: -importing[path]), *of_room]
    return list(dict.fromkeys(tests))[:MOST_TESTS]


def draw(paths: Sequence[Path], number: int, seed: int, root: Path = ROOT) -> list[dict[str, object]]:
    """Entries of a list of faults, one a line of source at most."""
    known = {path: Source(path.read_text()) for path in paths}
    pool = [(path, change) for path, source in known.items() for change in source.changes()]
    random.Random(seed).shuffle(pool)
    drawn: list[dict[str, object]] = []
    lines: set[tuple[Path, str]] = set()
    for path, change in pool:
        fragment = known[path].fragment(change)
        if fragment is None or (path, fragment[0]) in lines:
            continue
        lines.add((path, fragment[0]))
        file = str(path.relative_to(root))
        reason = f"{file}:{known[path].text.count(chr(10), 0, change.start) + 1}: {change.what}"
        entry = {"reason": reason, "file": file, "find": fragment[0], "replace": fragment[1]}
        drawn.append({**entry, "tests": proposed_tests(file, root)})
        if len(drawn) == number:
            break
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.fresh", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "places", nargs="*", help="rooms, folders or files; package and tools if none is given"
    )
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, required=True, help="the list, as python -m tests.mutants.run reads it"
    )
    options = parser.parse_args(arguments)
    try:
        drawn = draw(sources(options.places, ROOT), options.number, options.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    blocks = [
        "[[fault]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
        for entry in drawn
    ]
    options.output.write_text("\n".join(blocks))
    print(
        f"{len(drawn)} faults, {sum(not entry['tests'] for entry in drawn)} without a test: {options.output}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
