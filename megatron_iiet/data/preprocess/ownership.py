"""Whose an output is: a file ``outputs/NAME`` in the records, made before anything of the output is written.

Nothing is removed or replaced that no such file names: a fitting name alone tells nothing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_iiet.data.preprocess.layout import Layout, Output
from megatron_iiet.durable import sync_folder, write_text

_FOLDER = "outputs"
_ENDINGS = (".shards", ".idx", ".bin", ".idx.partial", ".bin.partial")


class Claims:
    """The outputs that are a place's own."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.folder = layout.records / _FOLDER

    def names(self) -> set[str]:
        """Names of the outputs."""
        return {path.name for path in self.folder.glob("*_document")}

    def found(self, name: str) -> Path | None:
        """Something that is there of an output of that name, whoever made it."""
        prefix = self._layout.list_prefix(name)
        for ending in _ENDINGS:
            if os.path.lexists(prefix + ending):
                return Path(prefix + ending)
        folder = Path(prefix)
        if self._layout.folder is None or not os.path.lexists(folder):
            return None
        return next(iter(sorted(folder.iterdir())), None) if folder.is_dir() else folder

    def refuse_foreign(self, name: str) -> None:
        """Raise a ValueError where an output cannot be this place's: something is there, or another place,
        whose outputs have such names, has claimed it."""
        if (path := self.found(name)) is not None:
            raise ValueError(
                f"{path} is there already, and no plan in {self._layout.records} names it; choose another "
                "output, or remove it yourself if nobody needs it."
            )
        prefix = self._layout.list_prefix(name)
        for claim in claims_to(prefix):
            if claim != self.folder / name and claim.exists():
                raise ValueError(
                    f"{prefix} is an output of another run, which claimed it by {claim}; choose "
                    "another output."
                )

    def take(self, output: Output) -> None:
        """Make an output this place's, or see that it is.

        Raises:
            ValueError: somebody else's files are there, or another output of this run has the name.
        """
        claim = self.folder / output.name
        if (holder := _read(claim)) is None:
            try:
                self.refuse_foreign(output.name)
            except ValueError:
                if not claim.exists():  # else another process of this run was faster, and it is that one's
                    raise
            self.folder.mkdir(exist_ok=True)
            _place(claim, json.dumps(asdict(output)))
            others = (other for other in claims_to(self._layout.list_prefix(output.name)) if other != claim)
            if any(other.exists() for other in others):
                # Of two places that claim at the same moment one sees the other, or both do.
                if self.found(output.name) is None:
                    claim.unlink(missing_ok=True)
                self.refuse_foreign(output.name)
            holder = _read(claim)
        if holder != output:
            raise ValueError(
                f"The output {output.name} would hold both {_say(holder)} and {_say(output)}; rename a "
                "source or a key, or make them in outputs of their own."
            )

    def release(self, name: str) -> None:
        """Give an output back, unless something is left there that is not of this tool: then what follows may
        still write beside it."""
        if self.found(name) is None:
            folder = Path(self._layout.list_prefix(name))
            if self._layout.folder is not None and folder.is_dir() and not folder.is_symlink():
                folder.rmdir()
            (self.folder / name).unlink(missing_ok=True)


def _say(output: Output | None) -> str:
    if output is None:
        return "another"
    source = f"source {output.source!r} with " if output.source else ""
    split = f"split {output.split} of " if output.split else ""
    return f"{source}{split}key {output.key!r}"


def _read(claim: Path) -> Output | None:
    try:
        return Output(**json.loads(claim.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{claim} is damaged; remove it if the output of that name is this run's.") from None


def _place(claim: Path, text: str) -> None:
    """Make a file with its content in one step, unless there is one: of several processes the first wins."""
    own = claim.with_name(f"{claim.name}.{secrets.token_hex(4)}.tmp")
    write_text(own, text)
    try:
        os.link(own, claim)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        own.replace(claim)
    finally:
        own.unlink(missing_ok=True)
    sync_folder(claim.parent)


def claims_to(prefix: str) -> Iterator[Path]:
    """Where others would have claimed a corpus of this prefix: a folder of many, or shorter prefixes."""
    folder, name = os.path.split(prefix)
    yield Path(folder, "preprocess", _FOLDER, name)
    for at, letter in enumerate(name):
        if letter == "_":
            yield Path(folder, f"{name[:at]}.preprocess", _FOLDER, name[at + 1 :])
