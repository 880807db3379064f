"""Seeds the kept faults one at a time and says which of them the tests find.

    python -m tests.mutants.run                    # all
    python -m tests.mutants.run config hf          # rooms
    python -m tests.mutants.run schedules.py       # faults in a file
    python -m tests.mutants.run --match warm-up    # faults whose reason has this text
    python -m tests.mutants.run --list fresh.toml  # of another list, as fresh.py draws one

It works on a copy of the working tree in a temporary folder: the checkout is never changed, and a kill leaves
neither a process nor the copy behind. (mutmut and cosmic-ray make up their faults themselves, thousands of
them; they take no list of faults that a person chose.)

Exit status: 0 all are found, 1 one is not (or no longer fits the source), 2 nothing was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants.faults import LISTS, Fault, StaleFaultError, read_faults
from tests.processes import end, guard

ROOT = Path(__file__).resolve().parents[2]
FOUND, LATE, MISSED, STALE = "found", "found (time limit)", "NOT FOUND", "STALE"
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")


class Bench:
    """A copy of the tree, and a process that runs its tests."""

    def __init__(self, root: Path, seconds: float) -> None:
        folder = tempfile.mkdtemp(prefix="mutants-")
        self.mark = guard(folder)
        self.folder, self.root, self.seconds = Path(folder), Path(folder) / "tree", seconds
        copy_tree(root, self.root)
        self._log = self.folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("server.py")],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._clock = int(time.time())

    def close(self) -> None:
        """End the process and remove the copy."""
        end(self.mark)
        self._server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, tests: Sequence[str], seconds: float | None = None) -> int | None:
        """pytest's exit status, None if it took too long.

        Raises:
            RuntimeError: the process that runs the tests has ended.
        """
        asked = {"arguments": [*PYTEST, *tests], "log": str(self._log), "seconds": seconds or self.seconds}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs the tests is gone; was it killed, or short of memory?")
        answer = json.loads(line)
        end(self.mark, frozenset({self._server.pid}))
        return answer if answer is None else int(answer)

    def log(self) -> str:
        """What pytest said last."""
        return self._log.read_text(errors="replace")

    def try_fault(self, fault: Fault) -> str:
        """Put it in, run its tests, take it out; the verdict."""
        path = fault.locate(self.root)
        text = path.read_text()
        self._write(path, fault.apply(text))
        try:
            status = self.run(fault.tests)
        finally:
            self._write(path, text)
        return (
            LATE if status is None else MISSED if status in (0, pytest.ExitCode.NO_TESTS_COLLECTED) else FOUND
        )

    def _write(self, path: Path, text: str) -> None:
        """With a time of its own, by which Python knows that its byte code is of another text."""
        path.write_text(text)
        self._clock += 2
        os.utime(path, (self._clock, self._clock))


def copy_tree(root: Path, to: Path) -> None:
    """What git knows or would know of, and the extension as it was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    extensions = [str(path.relative_to(root)) for path in (root / "megatron_iiet").glob("_extension*")]
    for name in filter(None, [*listed, *extensions]):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def chosen(faults: Sequence[Fault], places: Sequence[str], match: str, root: Path) -> list[Fault]:
    """Those of rooms or files, and with a text in their reason.

    Raises:
        ValueError: there is none of a place.
    """
    known = {fault.room for fault in faults}
    found: list[Fault] = []
    for place in places or sorted(known):
        of_place = [f for f in faults if f.room == place or (place not in known and _is_in(f, place, root))]
        if not of_place:
            raise ValueError(f"there are no faults of {place}; rooms are {', '.join(sorted(known))}")
        found += [fault for fault in of_place if match in fault.reason and fault not in found]
    return found


def _is_in(fault: Fault, place: str, root: Path) -> bool:
    try:
        return str(fault.locate(root)).endswith(f"/{place}")
    except StaleFaultError:
        return False


def try_all(faults: Sequence[Fault], bench: Bench) -> Counter[str]:
    """Try one after another and print what was seen; how often each verdict was given."""
    verdicts: Counter[str] = Counter()
    for fault in faults:
        started = time.monotonic()
        try:
            verdict, said = bench.try_fault(fault), fault.reason
        except StaleFaultError as error:
            verdict, said = STALE, str(error)
        verdicts[verdict] += 1
        seconds = time.monotonic() - started
        print(f"{verdict:<18} {seconds:6.1f} s  {fault.room:<13} {said}", flush=True)
        if verdict == MISSED:
            print(f"{'':28} not by {' '.join(fault.tests)}", flush=True)
    return verdicts


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="*", help="rooms or files; all if none is given")
    parser.add_argument("--match", default="", help="only faults with this text in their reason")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the tests of one fault")
    parser.add_argument(
        "--list", type=Path, default=LISTS, help="a list, or a folder of lists; default: the kept ones"
    )
    options = parser.parse_args(arguments)
    try:
        faults = chosen(read_faults(options.list), options.places, options.match, root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bench = Bench(root, options.limit)
    try:
        tests = sorted({test for fault in faults for test in fault.tests})
        print(f"{len(faults)} faults; first {len(tests)} tests and test files without any", flush=True)
        status = bench.run(tests, 3600.0)
        if status != 0:
            print(bench.log()[-3000:], file=sys.stderr)
            print("error: these tests do not pass as the tree is; nothing was tried", file=sys.stderr)
            return 2
        verdicts = try_all(faults, bench)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        bench.close()
    found = verdicts[FOUND] + verdicts[LATE]
    print(f"found {found} of {len(faults)}, not found {verdicts[MISSED]}, stale {verdicts[STALE]}")
    return 0 if found == len(faults) else 1


if __name__ == "__main__":
    raise SystemExit(main())
