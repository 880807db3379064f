"""A Hugging Face hub with folders as datasets: as much of its HTTP interface as its clients need to read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "1" * 40


@contextmanager
def serve_hub(root: Path, gated: str = "") -> Iterator[str]:
    """Serve the datasets ``root/OWNER/NAME``; gives the address for ``HF_ENDPOINT``.

    Args:
        gated: name of a dataset that is refused to those who are not logged in, that is, to all.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            match = re.match(r"(/api)?/datasets/([^/]+/[^/]+)(?:/(\w+)/(\w+)/?(.*))?$", unquote(url.path))
            if not match:
                return self.reply(404)
            api, name, verb, _, place = match.groups()
            dataset = root / name
            if name == gated:
                return self.reply(401, X_Error_Code="GatedRepo")
            if not dataset.is_dir():
                return self.reply(404, X_Error_Code="RepoNotFound")
            if api and verb == "tree":
                return self.list_files(dataset, dataset / place, "recursive=true" in url.query.lower())
            if api:
                return self.reply(200, json.dumps({"id": name, "sha": REVISION, "tags": []}).encode())
            return self.send_file(dataset / place)

        def list_files(self, dataset: Path, folder: Path, recursive: bool) -> None:
            if not folder.is_dir():
                return self.reply(404, X_Error_Code="EntryNotFound")
            entries = [
                {
                    "type": "directory" if path.is_dir() else "file",
                    "path": path.relative_to(dataset).as_posix(),
                    "oid": "" if path.is_dir() else _tag(path.read_bytes()),
                    "size": 0 if path.is_dir() else path.stat().st_size,
                }
                for path in (folder.rglob("*") if recursive else folder.iterdir())
            ]
            return self.reply(200, json.dumps(entries).encode())

        def send_file(self, path: Path) -> None:
            if not path.is_file():
                return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)
            content = path.read_bytes()
            headers = {"ETag": f'"{_tag(content)}"', "X_Repo_Commit": REVISION}
            wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not wanted:
                return self.reply(200, content, **headers)
            start, last = map(int, wanted.groups())
            part = content[start : last + 1]
            return self.reply(206, part, Content_Range=f"bytes {start}-{last}/{len(content)}", **headers)

        def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
