"""Running the preprocessing tool, and looking at what it wrote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import zstandard

from megatron_iiet.data.corpora.streams import open_corpus

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    "PYTHONPATH": str(ROOT),
}


def command(*arguments: object) -> list[str]:
    """The tool's command line."""
    return [sys.executable, str(TOOL), *map(str, arguments)]


def run_tool(
    *arguments: object, environment: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the tool to its end."""
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **(environment or {})},
        timeout=120,
    )


def published(place: Path) -> dict[str, bytes]:
    """Digest of every shard and list below a folder, by path; neither records nor temporary files."""
    return {
        str(path.relative_to(place)): hashlib.blake2b(path.read_bytes()).digest()
        for path in sorted(place.rglob("*"))
        if path.suffix in (".bin", ".idx", ".shards")
        and not any(parent.name.endswith("preprocess") for parent in path.parents if parent != place)
    }


def leftovers(place: Path) -> list[str]:
    """Temporary files below a folder."""
    return [path.name for path in sorted(place.rglob("*")) if path.suffix in (".partial", ".tmp")]


def documents(prefix: object) -> list[list[int]]:
    """All documents of a corpus."""
    corpus = open_corpus(str(prefix))
    return [corpus.document(index).tolist() for index in range(corpus.num_documents)]


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    """JSON lines, compressed as the file's name says."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(content) if path.suffix == ".zst" else content)
    return path


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
