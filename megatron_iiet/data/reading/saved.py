"""Datasets that Hugging Face's ``save_to_disk`` wrote: which of a folder's Arrow files are theirs.

A folder with a ``state.json`` is one dataset; files beside those that it names are left from an earlier one
of more shards. A folder with a ``dataset_dict.json`` holds a dataset a split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

STATE = "state.json"
SPLITS = "dataset_dict.json"
NOT_NAMED = f"not named by the {STATE} beside them"


def named_files(folder: str, content: bytes) -> frozenset[str] | None:
    """Names of the dataset's files by its ``state.json``; None where that is of something else.

    Raises:
        ValueError: it is damaged, or of a release of `datasets` that kept the choice of rows apart.
    """
    state = _object(f"{folder}/{STATE}", content)
    if "_data_files" not in state:
        return None
    names = frozenset(str(file["filename"]) for file in state["_data_files"])
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} was saved with its choice of rows beside it (_indices_data_files of {STATE}), which "
            "is not read here; load it with the release of datasets that saved it, and save what "
            "flatten_indices() gives."
        )
    return names


def splits_of(folder: str) -> dict[str, str] | None:
    """Folders of a saved dataset by the names of their splits; None if none was saved there.

    Raises:
        ValueError: what says so is damaged.
    """
    if os.path.isfile(f"{folder}/{SPLITS}"):
        splits = _object(f"{folder}/{SPLITS}", _read(f"{folder}/{SPLITS}")).get("splits", [])
        return {str(split): f"{folder}/{split}" for split in splits}
    if os.path.isfile(f"{folder}/{STATE}"):
        split = _object(f"{folder}/{STATE}", _read(f"{folder}/{STATE}")).get("_split") or "train"
        return {str(split).partition("[")[0]: folder}
    return None


class Sieve:
    """Judges the Arrow files of folders, of whatever file system."""

    def __init__(self, exists: Callable[[str], bool], read: Callable[[str], bytes]) -> None:
        self._exists, self._read = exists, read
        self._named: dict[str, frozenset[str] | None] = {}  # by folder
        self._splits: dict[str, str] = {}  # folder of one by the folder of all

    def takes(self, path: str) -> bool:
        """Whether an Arrow file is one of the dataset in its folder, if that holds one.

        Raises:
            ValueError: a file of the dataset is missing, what names them is damaged, or this one is of
                another split than those before.
        """
        folder, _, name = path.rpartition("/")
        if folder not in self._named:
            self._named[folder] = self._judge(folder)
        named = self._named[folder]
        return named is None or name in named

    def _judge(self, folder: str) -> frozenset[str] | None:
        around, _, split = folder.rpartition("/")
        if self._exists(f"{around}/{SPLITS}") and self._splits.setdefault(around, folder) != folder:
            other = self._splits[around].rpartition("/")[2]
            raise ValueError(
                f"The input {around} holds splits of one dataset, {other}, {split} and maybe others; name "
                f"the folder of each that is to be read, as {around}/{other}."
            )
        if not self._exists(f"{folder}/{STATE}"):
            return None
        names = named_files(folder, self._read(f"{folder}/{STATE}"))
        for name in sorted(names or ()):
            if not self._exists(f"{folder}/{name}"):
                raise ValueError(f"{folder}/{name} is missing, and {STATE} beside it names it; put it back.")
        return names


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _object(path: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); save the dataset again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object; save the dataset again.")
    return found
