"""How a checkpoint knows itself: which save each of its files belongs to, and an XXH3 digest of everything.
Digests find what a disk, a copy or an editor has spoilt; whoever wants to forge one can."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megatron_iiet import durable
from megatron_iiet.config import ConfigError

BLOCK_BYTES = 1 << 20
"""What one digest is of: so much of a tensor from its start on, the last block less. A read of an interval
reads the blocks it touches to their ends."""
REMEDY = "copy the whole checkpoint again, or use another one"
_DIGITS = 16  # of a block's digest
SEAL = "digest"
"""Key of a sealed JSON file's own digest."""


class DamagedError(ConfigError):
    """Of a checkpoint that is not as it was written: an older one may be whole."""


@dataclass(frozen=True)
class SaveIdentity:
    """One save of one run; in every file of a checkpoint."""

    save: str
    """Drawn at random for each save."""
    step: int
    """Optimizer steps taken."""
    config: str
    """Digest of the checkpoint's ``config.yaml``."""

    @classmethod
    def draw(cls, step: int, config_yaml: str) -> SaveIdentity:
        """The identity of a new save."""
        return cls(secrets.token_hex(8), step, digest_of(config_yaml.encode()))

    def as_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file, which holds texts."""
        return {name: str(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"save {self.save} of step {self.step}"


class Blocks(NamedTuple):
    """The digests of a stored tensor's blocks."""

    size: int
    """Bytes in each but the last."""
    digests: str
    """One behind the other, in hexadecimal digits."""

    def cover(self, size: int) -> bool:
        """Whether there is a digest of every block of a tensor of ``size`` bytes."""
        return self.size > 0 and len(self.digests) == _DIGITS * -(-size // self.size)

    def holds(self, number: int, data: memoryview) -> bool:
        """Whether ``data`` is what was block ``number`` when it was written."""
        return xxhash.xxh3_64_hexdigest(data) == self.digests[_DIGITS * number : _DIGITS * (number + 1)]


class BlockDigests:
    """Digests of the blocks of a tensor that comes in parts of any size."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._filled = 0
        self._found = ""

    def update(self, part: memoryview) -> None:
        """Add the next bytes."""
        while part:
            taken, part = part[: BLOCK_BYTES - self._filled], part[BLOCK_BYTES - self._filled :]
            self._hash.update(taken)
            self._filled += len(taken)
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> str:
        """Of all blocks, the last one perhaps shorter; see :attr:`Blocks.digests`."""
        if self._filled:
            self._end_block()
        return self._found

    def _end_block(self) -> None:
        self._found += self._hash.hexdigest()
        self._hash.reset()
        self._filled = 0


def digest_of(document: bytes) -> str:
    """Of a document."""
    return xxhash.xxh3_128_hexdigest(document)


def write_sealed(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """Replace a JSON file by one that holds ``content`` and its digest."""
    sealed = {**content, SEAL: digest_of(_canonical(content))}
    separators = (",", ":") if indent is None else None
    durable.write_text(path, json.dumps(sealed, indent=indent, separators=separators) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedError: it is missing, no file, or holds no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; {REMEDY}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}); {REMEDY}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it holds no object; use another checkpoint")
    return content


def misfit(value: Any, form: Any, at: str = "") -> str:
    """Where plain data is not of the form that it should be of, and what is there; "" if nowhere.

    ``form``: ``int`` is a whole number from 0 on; any other type itself; ``None`` nothing, or no such key; a
    tuple has alternatives; a list the form of every item, or, if it has several, of each; a dict the forms by
    key, that of any other key under ``str``.
    """
    parts: list[tuple[Any, Any, str]] | None = None
    if isinstance(form, tuple):
        found = [misfit(value, one, at) for one in form]
        return "" if "" in found else max(found, key=lambda each: each.partition(" is ")[0].count("."))
    if isinstance(form, list) and isinstance(value, list) and len(form) in (1, len(value)):
        parts = [(item, form[i % len(form)], at) for i, item in enumerate(value)]
    elif isinstance(form, dict) and isinstance(value, dict):
        others = [(key, form[str]) for key in value if str in form and key not in form]
        named = [(key, each) for key, each in form.items() if key is not str]
        parts = [(value.get(key), each, f"{at}.{key}".lstrip(".")) for key, each in named + others]
    if parts is not None:
        return next(filter(None, (misfit(*part) for part in parts)), "")
    if form is int:
        fits = type(value) is int and 0 <= value < 1 << 63
    else:
        fits = value is None if form is None else isinstance(form, type) and isinstance(value, form)
    return "" if fits else f"{at} is {'missing' if value is None else f'{value!r:.60}'}"


def check_seal(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What :func:`write_sealed` wrote, without its digest.

    Raises:
        DamagedError: the digest is another one.
    """
    bare = {key: value for key, value in content.items() if key != SEAL}
    if content.get(SEAL) != digest_of(_canonical(bare)):
        raise DamagedError(
            f"{path} is damaged or was edited: its digest is not that of what it holds; copy it again, or "
            "use another checkpoint"
        )
    return bare


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
