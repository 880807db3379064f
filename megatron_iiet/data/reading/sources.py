"""Which files to read: paths, folders, globs, urls, and the data files of Hugging Face datasets by name."""

from __future__ import annotations

import glob
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megatron_iiet.data import stores
from megatron_iiet.data.reading import saved
from megatron_iiet.data.reading.kinds import ALL_KINDS, format_of, kind_name, tells_nothing
from megatron_iiet.data.stores import is_url, reason_of

_UNFINISHED = (".partial", ".tmp", ".incomplete", ".part")
_LEFT_OUT = {
    "licences, readmes and the like": re.compile(
        r"((.*\.)?licen[cs]es?|readme|notices?|copying|changelog|authors|contributors|contributing|citation)"
        r"(\b.*)?",
        re.IGNORECASE,
    ),
    "files of packages, sites, models and tokenizers": re.compile(
        r"(requirements|constraints)([-_.].*)?\.txt|(robots|humans|ads|security|cmakelists)\.txt"
        r"|(check|md5|sha\d+)[-_]?sums?\.txt|(package(-lock)?|composer|tsconfig|manifest)\.json"
        r"|(vocab|merges)\.txt|(vocab|tokenizer|tekken|special_tokens_map|added_tokens|.*\.index)\.json"
        r"|(.*_)?config\.json",
        re.IGNORECASE,
    ),
}
"""Names that tell what is no corpus, of files without a suffix, of text or JSON."""
_DATASET_FILES = re.compile(r"(dataset_infos?|dataset_dict|state|croissant)\.json|cache-.*\.arrow")
_STREAM = "stream "
_STANDARD_INPUT = "/dev/stdin"
_GLOB_CHARACTERS = frozenset("*?[")
_HUB_TIMEOUT_S = 20.0
_EXAMPLES = 3


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


@dataclass
class Found:
    """Files behind patterns."""

    files: list[InputFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # paths by the reason

    def leave_out(self, reason: str, path: str) -> None:
        """Note a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def __str__(self) -> str:
        kinds = Counter(kind_name(file.path) for file in self.files)
        said = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
        return f"inputs: {said}{self.said_left_out('; left out: ')}"

    def said_left_out(self, introduction: str) -> str:
        """Reasons, numbers and examples; nothing where nothing is left out."""
        phrases = []
        for reason, paths in self.left_out.items():
            more = ", …" if len(paths) > _EXAMPLES else ""
            names = ", ".join(os.path.basename(path) for path in paths[:_EXAMPLES])
            phrases.append(f"{len(paths):,} {reason} ({names}{more})")
        return introduction + ", ".join(phrases) if phrases else ""


def refuse_changed(file: InputFile) -> None:
    """Refuse a local file that is no longer what it was when it was listed.

    Raises:
        ValueError: it has another size or time, or is gone.
    """
    if is_url(file.path) or file.is_stream:
        return
    (now,) = _describe([file.path])
    if now.identity != file.identity:
        raise ValueError(
            f"The input {file.path} changed while it was read: {file.size:,} bytes when it was listed, "
            f"{now.size:,} now{'' if now.size != file.size else ', but of another time'}; once nobody "
            "writes to it, run the same command again."
        )


def list_inputs(patterns: Iterable[str], input_format: str | None = None) -> list[InputFile]:
    """The files of :func:`find_inputs`."""
    return find_inputs(patterns, input_format).files


def find_inputs(patterns: Iterable[str], input_format: str | None = None) -> Found:
    """Files behind paths, folders and globs, local or as urls: in the order given, each pattern's sorted.

    A folder stands for all files below it, and a glob for all that it matches, but for those that
    :func:`_why_not` tells; one named by itself is read whatever its name. ``-`` is standard input.
    ``input_format`` says what files are whose names tell nothing.

    Raises:
        ValueError: a file is missing or of an unknown kind, a pattern matches nothing that is read, a file
            occurs twice.
    """
    found = Found()
    for pattern in patterns:
        expand, describe = (_expand_url, _describe_urls) if is_url(pattern) else (_expand, _describe)
        paths = expand(_STANDARD_INPUT if pattern == "-" else pattern, found, input_format)
        found.files += describe(paths)
    first: dict[str, str] = {}
    for file in found.files:
        place = file.path if is_url(file.path) else os.path.realpath(file.path)
        if place in first:
            also = "" if first[place] == file.path else f" (also as {first[place]})"
            raise ValueError(f"The input {file.path} is named twice{also}; name every file once.")
        first[place] = file.path
    return found


def list_dataset(name: str, split: str = "train", streaming: bool = False) -> list[InputFile]:
    """Data files of one split of a dataset: a name on the Hugging Face hub or a local dataset folder.

    ``datasets`` says which files make up the split (a README's ``configs``, or names like ``train/...``), or
    the records of its ``save_to_disk``; the files are then read by this package. Files of the hub are pinned
    to its present revision. With ``streaming`` they are read over the network as they come; without, each is
    downloaded to the hub's cache first, by the process that reads it and when it does.

    Raises:
        ValueError: the dataset or its split is unknown or out of reach, it has several configurations and no
            default, or its files are of a kind that is not read here.
    """
    if not os.path.isdir(name):
        _check_hub(name)
    on_disk = saved.splits_of(name.rstrip("/")) if os.path.isdir(name) else None
    splits = _data_files(name) if on_disk is None else on_disk
    if split not in splits:
        raise ValueError(f"The dataset {name} has no split {split!r}, only {', '.join(sorted(splits))}.")
    if on_disk is not None:
        return list_inputs([on_disk[split]])
    paths = sorted(path for path in splits[split] if not path.endswith(_UNFINISHED))
    for path in paths:
        if not format_of(path):
            raise ValueError(f"The dataset {name} keeps its text in {path}; {ALL_KINDS} files can be read.")
    local = [path for path in paths if not is_url(path)]
    remote = [path for path in paths if is_url(path)]
    return _describe(local) + [replace(file, download=not streaming) for file in _describe_urls(remote)]


@contextmanager
def open_input(source: InputFile | str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file or url, opened for reading its stored bytes.

    Raises:
        OSError: it cannot be opened, or, for urls, what is done with the open file fails to read on.
    """
    path = source.path if isinstance(source, InputFile) else os.fspath(source)
    if path == _STANDARD_INPUT:
        with open(0, "rb", closefd=False) as file:
            yield file
        return
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    with stores.reading(path, passing=(ValueError,)):  # what the caller thinks of the content
        if isinstance(source, InputFile) and source.download and path.startswith("hf://"):
            with open(_downloaded(path), "rb") as file:
                yield file
            return
        store, name = stores.store_of(path)
        with store.open(name, "rb", block_size=stores.READ_BYTES) as file:
            yield file


def _why_not(path: str, input_format: str | None) -> str | None:
    """Why a file that a folder holds or a glob matches is not read."""
    name = os.path.basename(path)
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(_UNFINISHED):
        return "unfinished"
    for reason, names in _LEFT_OUT.items():
        if names.fullmatch(name) and format_of(name) in (None, "txt", "json"):
            return reason
    if _DATASET_FILES.fullmatch(name):
        return "files about datasets or caches of them"
    if not format_of(name) and not (input_format and tells_nothing(name)):
        return "of unknown kinds"
    return None


def _sort_out(
    paths: Iterable[str],
    exists: Callable[[str], bool],
    read: Callable[[str], bytes],
    found: Found,
    input_format: str | None,
) -> list[str]:
    """Those of a folder's or glob's files that are read, sorted; the others are noted."""
    is_plan: dict[str, bool] = {}

    def of_a_plan(folder: str) -> bool:
        """Whether preprocessing keeps its plan and records there, or in a folder around it."""
        if folder not in is_plan:
            around, _, name = folder.rpartition("/")
            is_plan[folder] = bool(around) and of_a_plan(around)
            if name == "preprocess" or name.endswith(".preprocess"):
                is_plan[folder] |= exists(f"{folder}/plan.json")
        return is_plan[folder]

    taken, sieve = [], saved.Sieve(exists, read)
    for path in sorted(paths):
        is_record = of_a_plan(path.rpartition("/")[0])
        reason = "records of preprocessing" if is_record else _why_not(path, input_format)
        if not reason and format_of(path) == "arrow" and not sieve.takes(path):
            reason = saved.NOT_NAMED
        if reason:
            found.leave_out(reason, path)
        else:
            taken.append(path)
    return taken


def _expand(pattern: str, found: Found, input_format: str | None) -> list[str]:
    if os.path.isdir(pattern):
        paths: Iterable[str] = _files_below(pattern, found)
    elif os.path.exists(pattern) or _GLOB_CHARACTERS.isdisjoint(pattern):
        _check_kind(pattern, input_format)
        return [pattern]
    else:
        paths = glob.glob(pattern, recursive=True)
        if folder := next(filter(os.path.isdir, paths), None):
            raise ValueError(f"The input {folder} is a folder.")
    taken = _sort_out(paths, os.path.exists, lambda path: Path(path).read_bytes(), found, input_format)
    if fifo := next((path for path in taken if Path(path).is_fifo()), None):
        raise ValueError(f"The input {fifo} can be read only once; name it by itself, or move it away.")
    return _refuse_none(taken, pattern, found)


def _files_below(folder: str, found: Found) -> Iterator[str]:
    """Files at any depth, also behind linked folders, but in no folder twice and in no hidden one."""

    def fail(error: OSError) -> None:
        raise ValueError(f"The input folder {error.filename} cannot be listed ({error.strerror}).") from None

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        for name in folders:
            if name.startswith("."):
                found.leave_out("hidden", os.path.join(parent, name))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in names)


def _refuse_none(paths: list[str], pattern: str, found: Found) -> list[str]:
    if not paths:
        raise ValueError(
            f"The input {pattern} holds or matches no {ALL_KINDS} files"
            f"{found.said_left_out('; left out: ')}; check the path."
        )
    return paths


def _describe(paths: Iterable[str]) -> list[InputFile]:
    """Size and stamp of local files."""
    files = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            problem = "is missing" if is_missing else f"cannot be read ({error.strerror})"
            raise ValueError(f"The input {path} {problem}.") from None
        if path == _STANDARD_INPUT or stat.S_ISFIFO(status.st_mode):
            files.append(InputFile(path, 0, f"{_STREAM}{time.time_ns()}"))
        elif stat.S_ISREG(status.st_mode):
            files.append(InputFile(path, status.st_size, str(status.st_mtime_ns)))
        else:
            what = "a folder" if os.path.isdir(path) else "no regular file"
            raise ValueError(f"The input {path} is {what}.")
    return files


def _expand_url(pattern: str, found: Found, input_format: str | None) -> list[str]:
    if pattern.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"The input {pattern} is on a web server, which lists no files and need not tell when one has "
            "changed; download it and give the file, or pipe its text in (curl -L ... | zcat) with --input -."
        )
    with _listing(pattern):
        store, path = stores.store_of(pattern)
        paths, fixed = None, len(path)  # only what comes behind the fixed part may be hidden
        if glob_part := re.search(r"[*?[]", path):
            paths, fixed = store.glob(path), glob_part.start() - 1
        elif store.isdir(path):
            paths = store.find(path)
    if paths is None:
        _check_kind(pattern, input_format)
        return [store.unstrip_protocol(path)]
    hidden = re.compile(r"/\.")
    seen = []
    for name in paths:
        if hidden.search(name, max(0, fixed)):
            found.leave_out("hidden", name)
        else:
            seen.append(name)
    with _listing(pattern, passing=(ValueError,)):
        taken = _sort_out(seen, store.exists, store.cat_file, found, input_format)
    return _refuse_none([store.unstrip_protocol(name) for name in taken], pattern, found)


def _describe_urls(urls: Iterable[str]) -> list[InputFile]:
    """Size and stamp of files in stores. Each folder is listed once: asking file by file takes hours."""
    folders: dict[str, dict[str, Mapping[str, Any]]] = {}
    files = []
    for url in urls:
        with _listing(url):
            store, path = stores.store_of(url)
            parent = url.rpartition("/")[0]
            if parent not in folders:
                folders[parent] = {
                    entry["name"]: entry for entry in store.ls(store._parent(path), detail=True)
                }
            entry = folders[parent].get(path) or store.info(path)
            files.append(InputFile(url, *stores.stamp_of(url, entry)))
    return files


def _check_kind(path: str, input_format: str | None) -> None:
    """Refuse a file named by itself whose name tells a kind that is not read."""
    if not (format_of(path) or input_format or tells_nothing(path)):
        raise ValueError(
            f"The input {path} is of an unknown kind; give {ALL_KINDS} files, or --input-format."
        )


@contextmanager
def _listing(url: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns a store's errors into sentences, but for those passing."""
    try:
        yield
    except passing:
        raise
    except FileNotFoundError:
        raise ValueError(f"The input {url} is missing.") from None
    except Exception as error:  # every store has its own kinds
        raise ValueError(f"The input {url} cannot be listed: {reason_of(error)}") from error


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
        problem = reason_of(error)
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
        text = reason_of(error)
        if "gated dataset" in text:
            raise ValueError(_GATED.format(name=name)) from None
        raise ValueError(f"The dataset {name} cannot be opened: {text}") from error
    return {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}


def _downloaded(url: str) -> str:
    """Local path of a hub file, fetched unless the cache has it."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    file: Any = HfFileSystem().resolve_path(url)
    return hf_hub_download(file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision)
