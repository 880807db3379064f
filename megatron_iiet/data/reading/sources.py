"""Which files to read: paths, folders, globs, urls, and the data files of Hugging Face datasets by name."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst"))
_KINDS = ".jsonl, .json or .ndjson files, plain or packed as .gz or .zst"
_UNFINISHED = (".partial", ".tmp")
_GLOB_CHARACTERS = frozenset("*?[")
_STREAM = "stream "
_HUB_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class InputFile:
    """One file of documents."""

    path: str  # local, or a url for fsspec: hf://datasets/NAME@REVISION/train/part.jsonl.zst
    size: int  # bytes, as stored (compressed)
    stamp: str  # changes with the content: nanoseconds of the last change, or the store's tag
    download: bool = False  # fetch it whole to the hub's cache before reading it (hf:// only)

    @property
    def identity(self) -> list[str | int]:
        """What records say of it: its first three fields."""
        return [self.path, self.size, self.stamp]

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once: standard input or a FIFO. Its stamp is another one every time."""
        return self.stamp.startswith(_STREAM)


def list_inputs(patterns: Iterable[str]) -> list[InputFile]:
    """Files behind paths, folders and globs, local or as urls: in the order given, each pattern's sorted.

    A folder stands for all files of JSON lines below it; hidden and unfinished ones (``.name``,
    ``*.partial``, ``*.tmp``) are left out.

    Raises:
        ValueError: a file is missing or of an unknown kind, a pattern matches nothing, a file occurs twice.
    """
    files: list[InputFile] = []
    for pattern in patterns:
        files += _describe_urls(_expand_url(pattern)) if "://" in pattern else _describe(_expand(pattern))
    first: dict[str, str] = {}
    for file in files:
        place = file.path if "://" in file.path else os.path.realpath(file.path)
        if place in first:
            also = "" if first[place] == file.path else f" (also as {first[place]})"
            raise ValueError(f"The input {file.path} is named twice{also}; name every file once.")
        first[place] = file.path
    return files


def list_dataset(name: str, split: str = "train", streaming: bool = False) -> list[InputFile]:
    """Data files of one split of a dataset: a name on the Hugging Face hub or a local dataset folder.

    ``datasets`` says which files make up the split (a README's ``configs``, or names like ``train/...``); the
    files are then read by this package. Files of the hub are pinned to its present revision. With
    ``streaming`` they are read over the network as they come; without, each is downloaded to the hub's cache
    first, by the process that reads it and when it does.

    Raises:
        ValueError: the dataset or its split is unknown or out of reach, it has several configurations and no
            default, or its files are of a kind that is not read here.
    """
    if not os.path.isdir(name):
        _check_hub(name)
    splits = _data_files(name)
    if split not in splits:
        raise ValueError(f"The dataset {name} has no split {split!r}, only {', '.join(sorted(splits))}.")
    paths = sorted(path for path in splits[split] if not path.endswith(_UNFINISHED))
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise ValueError(f"The dataset {name} keeps its text in {path}; {_KINDS} can be read.")
    local = [path for path in paths if "://" not in path]
    remote = [path for path in paths if "://" in path]
    return _describe(local) + [replace(file, download=not streaming) for file in _describe_urls(remote)]


@contextmanager
def open_input(source: InputFile | str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file or url, opened for reading its stored bytes.

    Raises:
        OSError: it cannot be opened, or, for urls, what is done with the open file fails to read on.
    """
    path = source.path if isinstance(source, InputFile) else os.fspath(source)
    if "://" not in path:
        with open(path, "rb") as file:
            yield file
        return
    try:
        if isinstance(source, InputFile) and source.download and path.startswith("hf://"):
            with open(_downloaded(path), "rb") as file:
                yield file
            return
        import fsspec

        with fsspec.open(path, "rb") as file:
            yield file
    except ValueError:  # what the caller thinks of the content
        raise
    except Exception as error:  # every store has its own kinds
        raise OSError(f"{path} cannot be read ({_one_line(error)}); run again when it can.") from error


def _expand(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return _found(sorted(_files_below(pattern)), pattern)
    if os.path.exists(pattern) or _GLOB_CHARACTERS.isdisjoint(pattern):
        return [pattern]
    return _found(sorted(glob.glob(pattern, recursive=True)), pattern)


def _files_below(folder: str) -> Iterator[str]:
    """Files of JSON lines at any depth, also behind linked folders, but in no folder twice."""

    def fail(error: OSError) -> None:
        raise ValueError(f"The input folder {error.filename} cannot be listed ({error.strerror}).") from None

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _found(paths: list[str], pattern: str) -> list[str]:
    if not paths:
        raise ValueError(f"The input {pattern} holds or matches no {_KINDS}; check the path.")
    return paths


def _describe(paths: Iterable[str]) -> list[InputFile]:
    """Size and stamp of local files."""
    files = []
    for path in paths:
        if not os.path.isfile(path):
            found = "is no regular file" if os.path.exists(path) else "is missing"
            raise ValueError(f"The input {path} {'is a folder' if os.path.isdir(path) else found}.")
        _check_kind(path)
        status = os.stat(path)
        files.append(InputFile(path, status.st_size, str(status.st_mtime_ns)))
    return files


def _expand_url(pattern: str) -> list[str]:
    with _listing(pattern):
        from fsspec.core import url_to_fs

        store, path = url_to_fs(pattern)
        found, fixed = [path], len(path)  # only what comes behind the fixed part may be hidden
        if glob_part := re.search(r"[*?[]", path):
            found, fixed = store.glob(path), glob_part.start() - 1
        elif store.isdir(path):
            found = [name for name in store.find(path) if name.endswith(SUFFIXES)]
        hidden = re.compile(r"/\.")
        found = [name for name in found if not hidden.search(name, max(0, fixed))]
        found = sorted(map(store.unstrip_protocol, found))
    return _found(found, pattern)


def _describe_urls(urls: Iterable[str]) -> list[InputFile]:
    """Size and stamp of files in stores. Each folder is listed once: asking file by file takes hours."""
    folders: dict[str, dict[str, Mapping[str, Any]]] = {}
    files = []
    for url in urls:
        _check_kind(url)
        with _listing(url):
            from fsspec.core import url_to_fs

            store, path = url_to_fs(url)
            parent = url.rpartition("/")[0]
            if parent not in folders:
                folders[parent] = {
                    entry["name"]: entry for entry in store.ls(store._parent(path), detail=True)
                }
            entry = folders[parent].get(path) or store.info(path)
        files.append(InputFile(url, int(entry["size"]), _stamp(entry)))
    return files


def _stamp(entry: Mapping[str, Any]) -> str:
    """A file's tag in its store's words: Hugging Face's, S3's and others', else a time."""
    names = ("blob_id", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    return next((str(entry[name]) for name in names if entry.get(name)), "unknown")


def _check_kind(path: str) -> None:
    if not path.endswith(SUFFIXES):
        raise ValueError(f"The input {path} is of an unknown kind; give {_KINDS}.")


@contextmanager
def _listing(url: str) -> Iterator[None]:
    """Turns a store's errors into sentences."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"The input {url} is missing.") from None
    except Exception as error:  # every store has its own kinds
        raise ValueError(f"The input {url} cannot be listed: {_one_line(error)}") from error


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has the dataset; without a network ``datasets`` would retry for minutes."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"The dataset folder {name} is missing.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        return
    except OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set"
    except GatedRepoError:
        raise ValueError(_GATED.format(name=name)) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"The dataset {name} is neither a local folder nor a dataset on the hub that you may see; "
            "check the name, or log in with `hf auth login`."
        ) from None
    except Exception as error:  # the hub's and the HTTP client's: no name server, no route, too slow
        problem = _one_line(error)
    raise ValueError(
        f"The dataset {name} is no local folder, and the hub cannot be asked for it ({problem}); fetch it "
        f"where there is a network, with `hf download --repo-type dataset {name} --local-dir FOLDER`, and "
        "give the folder."
    )


_GATED = (
    "The dataset {name} is gated; accept its terms on its page at huggingface.co, then log in with "
    "`hf auth login`."
)


def _data_files(name: str) -> dict[str, list[str]]:
    """Data files of every split."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name)
    except Exception as error:  # of many kinds, some with pages of text
        text = _one_line(error)
        if "gated dataset" in text:
            raise ValueError(_GATED.format(name=name)) from None
        raise ValueError(f"The dataset {name} cannot be opened: {text}") from error
    return {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}


def _downloaded(url: str) -> str:
    """Local path of a hub file, fetched unless the cache has it."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    file: Any = HfFileSystem().resolve_path(url)
    return hf_hub_download(file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision)


def _one_line(error: Exception) -> str:
    """An error's text as one sentence of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
