"""The shard list ``PREFIX.shards``: which pairs make up a corpus, in which order, and their digests.

Layout of the list, little-endian; digests are blake2b with 16 bytes, of whole files::

    b"TOKSHARD" | u32 version = 1 | u32 bytes of JSON | JSON, utf-8 | zeros up to a multiple of 8
    i64[n + 1] token ends, from 0 | i64[n + 1] document ends, from 0 | u64[n + 1] name offsets, from 0
    16 B[n] digests of the .bin | 16 B[n] digests of the .idx | names, utf-8 | digest of all before

The JSON holds ``dtype``, ``shards``, ``tokens``, ``documents`` and ``info``, what the maker has to say of the
corpus. A name is the prefix of a pair, relative to the folder of the list or absolute.

Opening costs the same for one shard and for 100,000: the file is memory-mapped and checked at its ends.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.indexed_writer import DigestedFile
from megatron_iiet.data.corpora.mmididx import (
    BLOCK_BYTES,
    CODES,
    DIGEST_BYTES,
    Shard,
    new_digest,
    shards_path,
)
from megatron_iiet.durable import replacing

MAGIC = b"TOKSHARD"
VERSION = 1
_HEAD = struct.Struct("<8sII")
_ENTRY_BYTES = 3 * 8 + 2 * DIGEST_BYTES
_SMALL_LIST = 1 << 16  # bytes; lists up to this size are checked whole when opened
_DTYPES = {dtype.name: dtype for dtype in CODES}


class ShardList:
    """The file ``PREFIX.shards``; its entries are read when asked for.

    Attributes:
        path, folder: the file, and what relative names are relative to.
        dtype: type of the stored tokens.
        num_tokens, num_documents: of the whole corpus.
        info: what the maker of the corpus wrote about it.
        token_ends, document_ends: i64 [len + 1], numbers of tokens and documents before each shard, and all.

    Raises:
        ValueError: the file is of another format or version, cut short, or its parts contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < _HEAD.size + DIGEST_BYTES:
                raise self._damaged(f"it has only {self._size} bytes")
            self._map = mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ)
        head_bytes = self._read_head()
        self._map_arrays(head_bytes)
        if self._size <= _SMALL_LIST and not self.digest_matches():
            raise self._damaged("its last 16 bytes are not the digest of the rest")

    def _read_head(self) -> int:
        """Take over the JSON; bytes of it."""
        magic, version, head_bytes = _HEAD.unpack_from(self._map)
        if magic != MAGIC:
            raise ValueError(
                f"{self.path} is not a shard list: it starts with {magic!r} instead of {MAGIC!r}; "
                "check data.prefix or make the corpus again."
            )
        if version != VERSION:
            raise ValueError(
                f"{self.path} has format version {version}, only {VERSION} is known; make the corpus again."
            )
        try:
            head = json.loads(self._map[_HEAD.size : _HEAD.size + head_bytes].decode())
            counts = tuple(head[name] for name in ("shards", "tokens", "documents"))
            if not all(type(count) is int and 0 < count < 2**63 for count in counts):
                raise ValueError(f"shards, tokens, documents are {counts}")
            self._num_shards, self.num_tokens, self.num_documents = counts
            self.dtype = _DTYPES[head["dtype"]]
            self.info: dict[str, Any] = head["info"]
            if not isinstance(self.info, dict):
                raise TypeError(f"info is {self.info!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._damaged(f"its head does not read ({type(error).__name__}: {error})") from None
        return int(head_bytes)

    def _map_arrays(self, head_bytes: int) -> None:
        n, view = self._num_shards, memoryview(self._map)
        at = _padded(_HEAD.size + head_bytes)
        wanted = at + 3 * 8 + n * _ENTRY_BYTES + DIGEST_BYTES
        if self._size < wanted:
            raise self._damaged(f"{n} shards need at least {wanted} bytes, it has {self._size}")

        def section(size: int) -> memoryview:
            nonlocal at
            begin, at = at, at + size
            return view[begin:at]

        self.token_ends = section(8 * (n + 1)).cast("q")
        self.document_ends = section(8 * (n + 1)).cast("q")
        self._name_offsets = section(8 * (n + 1)).cast("Q")
        self._bin_digests = section(DIGEST_BYTES * n)
        self._idx_digests = section(DIGEST_BYTES * n)
        self._names = view[at : self._size - DIGEST_BYTES]
        for ends, last, what in (
            (self.token_ends, self.num_tokens, "token"),
            (self.document_ends, self.num_documents, "document"),
            (self._name_offsets, len(self._names), "name"),
        ):
            if (ends[0], ends[-1]) != (0, last):
                raise self._damaged(f"its {what} ends go from {ends[0]} to {ends[-1]}, not from 0 to {last}")

    def digest_matches(self) -> bool:
        """Whether the digest at the end of the file is that of the rest. Reads the whole list."""
        hashed, end = new_digest(), self._size - DIGEST_BYTES
        for at in range(0, end, BLOCK_BYTES):
            hashed.update(memoryview(self._map)[at : min(at + BLOCK_BYTES, end)])
        return hashed.digest() == self._map[end:]

    def content_digest(self) -> bytes:
        """Digest of what the shards hold in their order, as listed; their names do not count."""
        hashed = new_digest()
        for part in (self.token_ends, self.document_ends, self._bin_digests, self._idx_digests):
            hashed.update(part)
        return hashed.digest()

    def __len__(self) -> int:
        return self._num_shards

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(f"shard {index} of {len(self)} in {self.path}")
        tokens = self.token_ends[index + 1] - self.token_ends[index]
        documents = self.document_ends[index + 1] - self.document_ends[index]
        if tokens <= 0 or documents <= 0:
            raise self._damaged(f"shard {index} has {tokens} tokens, {documents} documents")
        digests = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
        return Shard(
            name=self._name(index),
            tokens=tokens,
            documents=documents,
            bin_digest=bytes(self._bin_digests[digests]),
            idx_digest=bytes(self._idx_digests[digests]),
        )

    def _name(self, index: int) -> str:
        begin, end = self._name_offsets[index], self._name_offsets[index + 1]
        if not begin < end <= len(self._names):
            raise self._damaged(f"the name of shard {index} goes from byte {begin} to {end}")
        try:
            return _checked_name(bytes(self._names[begin:end]).decode())
        except ValueError as error:
            raise self._damaged(f"the name of shard {index} does not read ({error})") from None

    def prefix_of(self, shard: Shard) -> str:
        """Prefix under which the pair's files are found."""
        return os.path.join(self.folder, shard.name)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is cut short or damaged: {what}; restore it, or write it again with the tool that "
            "made the corpus."
        )


def write_shards(
    prefix: str | os.PathLike[str], shards: Sequence[Shard], dtype: np.dtype[Any], info: Mapping[str, Any]
) -> Path:
    """Write ``PREFIX.shards``, whole or not at all; equal arguments give equal bytes.

    Several processes may write the same list at once.

    Raises:
        ValueError: no shards, an empty one, a name that is not utf-8 or leaves the folder, or info that is no
            JSON.
    """
    path = shards_path(prefix)
    if not len(shards):
        raise ValueError(f"No shards for {path}: a corpus has at least one.")
    for shard in shards:
        _check_shard(shard)
    names = [shard.name.encode() for shard in shards]
    counts = ((shard.tokens for shard in shards), (shard.documents for shard in shards), map(len, names))
    ends = [np.cumsum(np.fromiter(chain([0], values), dtype=np.int64)) for values in counts]
    head = {
        "dtype": np.dtype(dtype).name,
        "shards": len(shards),
        "tokens": int(ends[0][-1]),
        "documents": int(ends[1][-1]),
        "info": dict(info),
    }
    try:
        text = json.dumps(head, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"The info for {path} cannot be written as JSON: {error}.") from None
    with replacing(path) as file:
        out = DigestedFile(file)
        out.write(_HEAD.pack(MAGIC, VERSION, len(text)) + text)
        out.write(bytes(_padded(out.num_bytes) - out.num_bytes))
        for array in ends:
            out.write(array.astype("<i8"))
        for digests in ([shard.bin_digest for shard in shards], [shard.idx_digest for shard in shards]):
            out.write(b"".join(digests))
        out.write(b"".join(names))
        out.write(out.digest)
    return path


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _check_shard(shard: Shard) -> None:
    _checked_name(shard.name)
    if shard.tokens <= 0 or shard.documents <= 0:
        raise ValueError(f"Shard {shard.name} has {shard.tokens} tokens and {shard.documents} documents.")
    if {len(shard.bin_digest), len(shard.idx_digest)} != {DIGEST_BYTES}:
        raise ValueError(f"Shard {shard.name} has digests of another size than {DIGEST_BYTES} bytes.")


def _checked_name(name: str) -> str:
    name.encode()  # file names that are no text raise UnicodeEncodeError, a ValueError
    if not os.path.basename(name) or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no name of a pair below the folder of the list")
    return name
