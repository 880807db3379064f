#!/usr/bin/env python
"""The demo's corpus (.jsonl.zst): the docstrings of the installed packages, English that everyone has.

Sources are parsed with :mod:`ast`, never imported. Rows have the shape of SlimPajama's, so the corpus goes
wherever SlimPajama would. It is for trying the repository out; nothing of it is redistributed, and a
summary of the packages' licences is written beside it.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path, PurePath

from megatron_iiet.durable import check_output, make_parent

SET_NAME = "PythonDocstrings"

_OWN_PACKAGE = "megatron-iiet"  # changes with every commit, a corpus should not
_SKIPPED_FOLDERS = frozenset(
    {"tests", "test", "_vendor", "vendor", "vendored", "_vendored", "extern", "third_party", "thirdparty"}
)
_SKIPPED_FILES = re.compile(r"^(test_.*|.*_test|conftest)\.py$")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_MIN_PROSE_SHARE = 0.5
_MAX_SEEN_SHARE = 0.8
_SHORT_LINE = 20  # characters; headings and the like repeat everywhere without being copies


@dataclass(frozen=True)
class Package:
    """An installed distribution and its Python sources."""

    name: str
    version: str
    license: str
    files: tuple[tuple[str, str], ...]
    """(path, dotted module name) pairs."""


@dataclass(frozen=True)
class Docstring:
    """One document of the corpus."""

    object: str
    """Dotted name of the module, class or function."""
    text: str


@dataclass(frozen=True)
class PackageShare:
    """What one package contributed; a row of the licence summary."""

    package: str
    version: str
    license: str
    documents: int
    characters: int


@dataclass(frozen=True)
class CorpusReport:
    """What was written."""

    files: tuple[Path, ...]
    packages: tuple[PackageShare, ...]
    dropped: dict[str, int]
    """Docstrings left out, by reason."""

    def __str__(self) -> str:
        documents = sum(share.documents for share in self.packages)
        characters = sum(share.characters for share in self.packages)
        largest = sorted(self.packages, key=lambda share: -share.characters)[:8]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        shares = ", ".join(f"{share.package} {share.characters / characters:.0%}" for share in largest)
        return (
            f"{documents:,} documents, {characters:,} characters from {len(self.packages)} packages "
            f"({shares}); left out: {dropped}; wrote {', '.join(map(str, self.files))}"
        )


def build_corpus(
    output: str | os.PathLike[str],
    packages: Sequence[str] | None = None,
    min_characters: int = 200,
    workers: int = 1,
) -> CorpusReport:
    """Write the docstrings of installed packages to ``output`` (.jsonl.zst) with a licence summary beside it.

    Left out: docstrings of fewer than ``min_characters``; exact duplicates; near duplicates, of whose longer
    lines over 80 % occurred in earlier documents; and those less than half prose, see :func:`prose_share`.
    Order is by a hash of the text: the same installation gives the same file, and a split by document is not
    a split by package.

    Raises:
        ValueError: the name has another ending or no place, a package is not installed, or no docstring
            qualifies.
    """
    target = Path(output)
    if not target.name.endswith(".jsonl.zst"):
        raise ValueError(f"The output {target} does not end in .jsonl.zst; name it so.")
    check_output(target)
    chosen = installed_packages(packages)
    rows: list[tuple[bytes, str]] = []
    shares: list[PackageShare] = []
    selection = _Selection()
    for package, docstrings in zip(chosen, _extract_all(chosen, min_characters, workers), strict=True):
        kept = [docstring for docstring in docstrings if selection.keep(docstring.text)]
        rows += ((_order_key(docstring.text), _row(package, docstring)) for docstring in kept)
        if kept:
            characters = sum(len(docstring.text) for docstring in kept)
            shares.append(PackageShare(package.name, package.version, package.license, len(kept), characters))
    if not rows:
        raise ValueError(f"No docstring of {min_characters} characters found; lower --min-characters.")
    make_parent(target)
    files = _write(target, [row for _, row in sorted(rows)], shares)
    return CorpusReport(files, tuple(shares), dict(selection.dropped))


def installed_packages(names: Sequence[str] | None = None) -> list[Package]:
    """The named distributions, or all but this one, by name; tests and vendored copies are left out.

    Raises:
        ValueError: a name is not installed.
    """
    packages = {_normalised(d.name): d for d in metadata.distributions() if d.name}
    if names is None:
        packages.pop(_OWN_PACKAGE, None)
    else:
        for name in names:
            if _normalised(name) not in packages:
                raise ValueError(f"The package {name} is not installed; check --packages.")
        packages = {_normalised(name): packages[_normalised(name)] for name in names}
    return [_package(packages[name]) for name in sorted(packages)]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _package(distribution: metadata.Distribution) -> Package:
    files = []
    for file in sorted(distribution.files or [], key=str):
        is_source = file.suffix == ".py" and ".." not in file.parts
        if (
            is_source
            and not _SKIPPED_FOLDERS.intersection(file.parts)
            and not _SKIPPED_FILES.match(file.name)
        ):
            files.append((str(file.locate()), _module_name(file)))
    return Package(distribution.name, distribution.version, _license(distribution), tuple(files))


def _module_name(file: PurePath) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _license(distribution: metadata.Distribution) -> str:
    """The licence as the metadata names it: expression, short text, or classifiers."""
    fields = distribution.metadata
    expression, text = (
        (fields.get_all(name) or [""])[0].strip() for name in ("License-Expression", "License")
    )
    classifiers = [
        c.split(" :: ")[-1] for c in fields.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    if len(text) > 60 or "\n" in text:  # some put the whole licence there
        text = ""
    return expression or text or ", ".join(classifiers) or "not stated"


def _extract_all(packages: Sequence[Package], min_characters: int, workers: int) -> Iterator[list[Docstring]]:
    """Docstrings of every package, in order."""
    if workers == 1:
        for package in packages:
            yield [doc for path, module in package.files for doc in extract(path, module, min_characters)]
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), gc.disable) as pool:
        # Syntax trees have no cycles: without the collector parsing takes three quarters of the time.
        files = [file for package in packages for file in package.files]
        paths, modules = [path for path, _ in files], [module for _, module in files]
        results = pool.map(extract, paths, modules, repeat(min_characters), chunksize=16)
        for package in packages:
            yield [doc for docstrings in islice(results, len(package.files)) for doc in docstrings]


def extract(path: str, module: str, min_characters: int) -> list[Docstring]:
    """Dedented docstrings of at least ``min_characters`` of one source file; none if it does not parse."""
    try:
        source = Path(path).read_bytes()
    except OSError:
        return []  # listed in the metadata, not installed
    # Parsing is what costs time: do it only where a long string is quoted.
    if not any(
        len(part) >= min_characters for quote in (b'"""', b"'''") for part in source.split(quote)[1::2]
    ):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, (ast.Module, *_DEFINITIONS)):
            text = ast.get_docstring(node)
            if text and len(text) >= min_characters and _is_encodable(text):
                found.append(Docstring(name, text))
        for child in reversed(getattr(node, "body", [])):
            if isinstance(child, _DEFINITIONS):
                stack.append((child, f"{name}.{child.name}"))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                stack.append((child, name))
    return found


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def prose_share(text: str) -> float:
    """Share of the characters of ``text`` in prose lines, 0 to 1.

    A prose line has at least three plain words (two or more letters, punctuation around them aside), and they
    are at least half of its blank-separated parts. Doctest examples (``>>>`` to the next blank line) and
    fenced code are never prose.
    """
    total = prose = 0
    in_example = in_fence = False
    for line in text.split("\n"):
        line = line.strip()
        total += len(line)
        if line.startswith("```"):
            in_fence = not in_fence
        in_example = (in_example or line.startswith(">>>")) and line != ""
        if in_example or in_fence:
            continue
        parts = line.split()
        words = (part.strip(".,;:()\"'") for part in parts)
        plain = sum(len(word) > 1 and word.isalpha() for word in words)
        if plain >= max(3, 0.5 * len(parts)):
            prose += len(line)
    return prose / max(total, 1)


class _Selection:
    """Decides, document after document, what enters the corpus."""

    def __init__(self) -> None:
        self._texts: set[bytes] = set()
        self._lines: set[str] = set()
        self.dropped: Counter[str] = Counter()

    def keep(self, text: str) -> bool:
        reason = self._reason_against(text)
        if reason:
            self.dropped[reason] += 1
            return False
        self._texts.add(_order_key(text))
        self._lines.update(_long_lines(text))
        return True

    def _reason_against(self, text: str) -> str | None:
        if _order_key(text) in self._texts:
            return "duplicates"
        if prose_share(text) < _MIN_PROSE_SHARE:
            return "mostly code or tables"
        lines = _long_lines(text)
        seen = sum(len(line) for line in lines if line in self._lines)
        if seen > _MAX_SEEN_SHARE * sum(map(len, lines)):
            return "near duplicates"
        return None


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) > _SHORT_LINE]


def _order_key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"corpus-order").digest()


def _row(package: Package, docstring: Docstring) -> str:
    meta = {
        "redpajama_set_name": SET_NAME,
        "package": package.name,
        "version": package.version,
        "license": package.license,
        "object": docstring.object,
    }
    return json.dumps({"text": docstring.text, "meta": meta}, ensure_ascii=False)


def _write(target: Path, rows: Iterable[str], shares: Sequence[PackageShare]) -> tuple[Path, ...]:
    import zstandard

    summary = target.with_name(f"{target.name}.licenses.json")
    partials = [path.with_name(f"{path.name}.partial") for path in (target, summary)]
    try:
        with partials[0].open("wb") as file, zstandard.ZstdCompressor(level=6).stream_writer(file) as stream:
            for row in rows:
                stream.write(row.encode() + b"\n")
        partials[1].write_text(
            json.dumps([asdict(share) for share in shares], indent=1) + "\n", encoding="utf-8"
        )
        for partial, path in zip(partials, (target, summary), strict=True):
            partial.rename(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return target, summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="file to write, ending in .jsonl.zst")
    parser.add_argument("--min-characters", type=int, default=200, help="leave out shorter docstrings")
    parser.add_argument("--packages", nargs="+", help="read only these packages (default: all installed)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="parsing processes")
    arguments = parser.parse_args()
    try:
        report = build_corpus(
            arguments.output,
            packages=arguments.packages,
            min_characters=arguments.min_characters,
            workers=arguments.workers,
        )
        print(report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
