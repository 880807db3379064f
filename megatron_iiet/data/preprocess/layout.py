"""Where things lie: names of outputs, shards, lists and records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iiet.data.corpora.mmididx import check_prefix
from megatron_iiet.durable import check_output

_SHARD_FILE = re.compile(r"(\d{6}|[1-9]\d{6,})\.(?:bin|idx)")


@dataclass(frozen=True)
class Output:
    """One corpus among those that a run makes."""

    source: str | None  # by --split-by
    split: str | None  # train, validation, test, if some are held out
    key: str  # of the text

    @property
    def name(self) -> str:
        """Such as ``text_document`` or ``RedPajamaC4_train_text_document``."""
        return "_".join([*filter(None, (self.source, self.split)), self.key, "document"])


def known_outputs(options: Mapping[str, Any]) -> list[Output]:
    """Outputs that are known before any text is read, by a plan's options."""
    if options["split_by"] is not None:
        return []
    held_out = options["holdout_validation"] > 0 or options["holdout_test"] > 0
    splits = ["train", "validation", "test"] if held_out else [None]
    return [Output(None, split, key) for split in splits for key in options["json_keys"]]


@dataclass(frozen=True)
class Layout:
    """Paths of one output place.

    With a prefix P everything is one unit: ``P_text_document.{bin,idx,shards}`` and ``P.preprocess/``. With a
    folder D there are many: ``D/text_document/000000.{bin,idx}``, ``D/text_document.shards``,
    ``D/preprocess/``. Where documents are shuffled, these are the shuffled shards, and those of the units
    lie in the records.
    """

    prefix: str | None
    folder: str | None
    shuffles: bool = False

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

    @property
    def unshuffled(self) -> Layout:
        """Where a shuffle finds its documents."""
        return Layout(None, str(self.records / "unshuffled"))

    @property
    def units(self) -> Layout:
        """Where the shards of units are."""
        return self.unshuffled if self.shuffles else self

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

    def files(self, output: str) -> Iterator[tuple[int | None, Path]]:
        """Files with the names of an output's shards, and the number of the unit that each is of, which a
        single shard's does not tell; an index before its tokens."""
        prefix = Path(self.list_prefix(output))
        if self.folder is None:
            paths = (prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin"))
            yield from ((None, path) for path in paths if os.path.lexists(path))
        elif prefix.is_dir():
            for path in sorted(prefix.iterdir(), reverse=True):
                if found := _SHARD_FILE.fullmatch(path.name):
                    yield int(found[1]), path
