"""The kept list of single-line faults, one TOML file a room, and how one is put into a source file.

An entry names a fragment by its text, so that it is found wherever its file is moved to:

    [[fault]]
    reason = "what a tired colleague did"
    find = "an exact fragment that occurs once in megatron_iiet/"
    replace = "what stands there instead"
    tests = ["tests/training/test_metrics.py"]      # what should find it; the narrowest that does
    file = "euler.py"                               # only where several files have the fragment; or a path

Outside the package, `file` is a path: "tools/generate.py".
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

LISTS = Path(__file__).parent
PACKAGE = "megatron_iiet"


class StaleFaultError(ValueError):
    """An entry of the list does not fit the source any more."""


@dataclass(frozen=True)
class Fault:
    """One line as it should not be."""

    room: str
    reason: str
    find: str
    replace: str
    tests: tuple[str, ...]
    file: str = ""
    """Name of the file, or its path from the root; empty: any of the package."""

    def locate(self, root: Path) -> Path:
        """The file that has the fragment, once.

        Raises:
            StaleFaultError: none has, several have, or one has it twice; or a test file is missing.
        """
        path = root / self.file
        files = (
            [path] if self.file and path.is_file() else sorted((root / PACKAGE).rglob(self.file or "*.py"))
        )
        counts = {file: n for file in files if (n := file.read_text().count(self.find))}
        if list(counts.values()) != [1]:
            places = ", ".join(f"{file.relative_to(root)} ({n})" for file, n in counts.items())
            raise StaleFaultError(
                f"{self.room}: {self.find!r} must occur once in {self.file or PACKAGE}, but occurs in "
                f"{places or 'no file'}; change the entry '{self.reason}' in {LISTS.name}/{self.room}.toml"
            )
        for test in self.tests:
            if not (root / test.partition("::")[0]).is_file():
                raise StaleFaultError(
                    f"{self.room}: {test} is missing; name another test in the entry '{self.reason}' in "
                    f"{LISTS.name}/{self.room}.toml"
                )
        return next(iter(counts))

    def apply(self, text: str) -> str:
        """A source text with the fault in it."""
        return text.replace(self.find, self.replace)


def read_faults(lists: Path = LISTS) -> list[Fault]:
    """All entries of a folder of lists, room by room, or of one list.

    Raises:
        ValueError: an entry lacks a field, has an unknown one, or changes nothing.
    """
    faults = []
    for path in sorted(lists.glob("*.toml")) if lists.is_dir() else [lists]:
        for number, entry in enumerate(tomllib.loads(path.read_text()).get("fault", []), 1):
            try:
                fault = Fault(room=path.stem, **{**entry, "tests": tuple(entry.get("tests", ()))})
            except TypeError as error:
                raise ValueError(f"{path.name}, entry {number}: {error}; see {__name__}") from None
            if not fault.tests or fault.find == fault.replace:
                raise ValueError(f"{path.name}, entry {number} names no test, or changes nothing")
            faults.append(fault)
    return faults
