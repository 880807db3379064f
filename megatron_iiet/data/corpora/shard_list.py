"""The shard list ``PREFIX.shards``: which pairs make up a corpus, in which order, and their digests.

Layout of the list, little-endian; digests are blake2b with 16 bytes, of whole files::

    b"TOKSHARD" | u32 version = 1 | u32 bytes of JSON | JSON, utf-8 | zeros up to a multiple of 8
    i64[n + 1] token ends, from 0 | i64[n + 1] document ends, from 0 | u64[n + 1] name offsets, from 0
    16 B[n] digests of the .bin | 16 B[n] digests of the .idx | names, utf-8 | digest of all before

The JSON holds ``dtype``, ``shards``, ``tokens``, ``documents`` and ``info``, what the maker has to say of the
corpus. A name is the prefix of a pair, relative to the folder of the list, absolute, or a url.

Opening a list of 100,000 shards, some 8 MB, takes milliseconds: the file is read, and its digest compared.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.mmididx import DIGEST_BYTES, DigestedFile, Shard, new_digest, shards_path
from megatron_iiet.data.stores import is_url, open_file
from megatron_iiet.durable import write_bytes

MAGIC = b"TOKSHARD"
VERSION = 1
_HEAD = struct.Struct("<8sII")


class ShardList:
    """The file ``PREFIX.shards``, read whole; its digest vouches for what it says.

    Attributes:
        path, folder: the file, and what relative names are relative to.
        dtype: type of the stored tokens.
        num_tokens, num_documents: of the whole corpus.
        info: what the maker of the corpus wrote about it.
        token_ends, document_ends: i64 [len + 1], numbers of tokens and documents before each shard, and all.

    Raises:
        ValueError: the file is of another format or version, cut short or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = open_file(path)
        self.path = file.name
        self.folder = os.path.dirname(self.path)
        content = memoryview(file.read(0, file.size))
        magic, version, head_bytes = _HEAD.unpack(bytes(content[: _HEAD.size]).ljust(_HEAD.size, b"\0"))
        if magic != MAGIC:
            raise ValueError(
                f"{path} is not a shard list: it starts with {magic!r} instead of {MAGIC!r}; "
                "check data.prefix or make the corpus again."
            )
        if version != VERSION:
            raise ValueError(
                f"{path} has format version {version}, only {VERSION} is known; make the corpus again."
            )
        if new_digest(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
            raise ValueError(
                f"{path} is cut short or damaged: its last {DIGEST_BYTES} bytes are not the digest of the "
                "rest; restore it, or write it again with the tool that made the corpus."
            )
        head = json.loads(bytes(content[_HEAD.size : _HEAD.size + head_bytes]))
        self._num_shards = n = int(head["shards"])
        self.num_tokens, self.num_documents = int(head["tokens"]), int(head["documents"])
        self.dtype, self.info = np.dtype(head["dtype"]), dict[str, Any](head["info"])
        at = _padded(_HEAD.size + head_bytes)

        def section(size: int) -> memoryview:
            nonlocal at
            begin, at = at, at + size
            return content[begin:at]

        self.token_ends = section(8 * (n + 1)).cast("q")
        self.document_ends = section(8 * (n + 1)).cast("q")
        self._name_offsets = section(8 * (n + 1)).cast("Q")
        self._bin_digests = section(DIGEST_BYTES * n)
        self._idx_digests = section(DIGEST_BYTES * n)
        self._names = content[at:-DIGEST_BYTES]

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
        digests = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
        shard = Shard(
            name=bytes(self._names[self._name_offsets[index] : self._name_offsets[index + 1]]).decode(),
            tokens=self.token_ends[index + 1] - self.token_ends[index],
            documents=self.document_ends[index + 1] - self.document_ends[index],
            bin_digest=bytes(self._bin_digests[digests]),
            idx_digest=bytes(self._idx_digests[digests]),
        )
        _check_shard(shard)  # a digest says nothing of who wrote it, and files of these names are removed
        return shard

    def prefix_of(self, shard: Shard) -> str:
        """Prefix under which the pair's files are found."""
        return shard.name if is_url(shard.name) else os.path.join(self.folder, shard.name)


def write_shards(
    prefix: str | os.PathLike[str], shards: Sequence[Shard], dtype: np.dtype[Any], info: Mapping[str, Any]
) -> Path:
    """Write ``PREFIX.shards``, whole or not at all; equal arguments give equal bytes, and a list with
    these stays as it is.

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
    content = io.BytesIO()
    out = DigestedFile(content)
    out.write(_HEAD.pack(MAGIC, VERSION, len(text)) + text)
    out.write(bytes(_padded(out.num_bytes) - out.num_bytes))
    for array in ends:
        out.write(array.astype("<i8"))
    for digests in ([shard.bin_digest for shard in shards], [shard.idx_digest for shard in shards]):
        out.write(b"".join(digests))
    out.write(b"".join(names))
    out.write(out.digest)
    if not (path.is_file() and path.read_bytes() == content.getbuffer()):
        write_bytes(path, content.getbuffer())
    return path


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _check_shard(shard: Shard) -> None:
    name = shard.name
    name.encode()  # file names that are no text raise UnicodeEncodeError, a ValueError
    if not os.path.basename(name) or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no name of a pair below the folder of the list.")
    if shard.tokens <= 0 or shard.documents <= 0:
        raise ValueError(f"Shard {name} has {shard.tokens} tokens and {shard.documents} documents.")
    if {len(shard.bin_digest), len(shard.idx_digest)} != {DIGEST_BYTES}:
        raise ValueError(f"Shard {name} has digests of another size than {DIGEST_BYTES} bytes.")
