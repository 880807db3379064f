"""tools/serve.py as a process, and what it is asked."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

TOOL = Path(__file__).resolve().parents[2] / "tools/serve.py"
PATIENCE = 120.0


class Server:
    """A started server; it takes requests."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        self.ready = ready = folder / "ready"
        ready.write_text("http://of-another-server/v1\n")
        self.output = folder / "output"
        command = [
            sys.executable,
            str(TOOL),
            "--model",
            str(model),
            "--port",
            "0",
            "--ready-file",
            str(ready),
        ]
        with self.output.open("w") as output:
            self.process = subprocess.Popen([*command, *flags], stdout=output, stderr=output)
        wait_for(lambda: "ready: " in self.output.read_text() or self.process.poll() is not None)
        assert ready.is_file(), self.output.read_text()
        self.url = ready.read_text().strip()
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: Any = None, kind: str = "application/json"
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and object of an answer."""
        connection = self.connection()
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": kind} if content is not None else {})
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}
        return *found, json.loads(answer.read())

    def load(self) -> tuple[int, int]:
        """How many sequences run, and wait."""
        _, _, state = self.ask("GET", "/health")
        return state["running"], state["waiting"]

    def end(self) -> int:
        """End it as a service manager would; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
