"""Where things lie: names of outputs, shards, lists and records."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_iiet.data.corpora.mmididx import check_prefix
from megatron_iiet.durable import check_output

_ENDINGS = (".idx", ".bin", ".idx.partial", ".bin.partial")
_SHARD_FILE = re.compile(r"\d{6,}\.(bin|idx)(\.partial)?")


@dataclass(frozen=True)
class Layout:
    """Paths of one output place.

    With a prefix P everything is one unit: ``P_text_document.{bin,idx,shards}`` and ``P.preprocess/``. With a
    folder D there are many: ``D/text_document/000000.{bin,idx}``, ``D/text_document.shards``,
    ``D/preprocess/``.
    """

    prefix: str | None
    folder: str | None

    @property
    def records(self) -> Path:
        """Folder of the plan and the records."""
        if self.folder is not None:
            return Path(self.folder) / "preprocess"
        return Path(f"{self.prefix}.preprocess")

    @property
    def plan(self) -> Path:
        """File of the plan."""
        return self.records / "plan.json"

    def check(self) -> None:
        """Raise a ValueError where the place cannot be written to."""
        if self.prefix is not None:
            check_prefix(self.prefix)
            check_output(Path(self.prefix))
        elif self.folder is not None and os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise ValueError(f"The output folder {self.folder} is a file; choose another name.")

    def list_prefix(self, output: str) -> str:
        """Prefix of an output's corpus, which its shard list carries."""
        return f"{self.prefix}_{output}" if self.folder is None else os.path.join(self.folder, output)

    def shard_name(self, output: str, unit: int) -> str:
        """Name of a shard in the list of its output."""
        return os.path.basename(f"{self.prefix}_{output}") if self.folder is None else f"{output}/{unit:06d}"

    def shard_prefix(self, output: str, unit: int) -> str:
        """Prefix of a shard's two files."""
        return os.path.join(os.path.dirname(self.list_prefix(output)), self.shard_name(output, unit))

    def files(self, outputs: set[str], discover: bool) -> list[tuple[str, Path]]:
        """Output and path of all files of its shards, finished or not; an index before its tokens.

        Args:
            discover: look for outputs besides those given: killed runs leave shards of sources that no record
                names. Only a folder of many shards tells which are its own.
        """
        if self.folder is None:
            paths = [
                (output, Path(self.list_prefix(output) + ending))
                for output in sorted(outputs)
                for ending in _ENDINGS
            ]
            return [(output, path) for output, path in paths if path.exists()]
        found = {path.name for path in Path(self.folder).glob("*_document")} if discover else set()
        return [
            (output, path)
            for output in sorted(outputs | found)
            for path in _shard_files(Path(self.folder) / output)
        ]


def _shard_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _SHARD_FILE.fullmatch(path.name)), reverse=True)


def output_name(source: str | None, split: str | None, key: str) -> str:
    """Name of an output, such as ``text_document`` or ``RedPajamaC4_train_text_document``."""
    return "_".join([*([source] if source else []), *([split] if split else []), key, "document"])
