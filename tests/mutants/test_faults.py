"""The kept faults still fit the source, and the tool that seeds them says what it saw."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants import fresh, run
from tests.mutants.faults import Fault, StaleFaultError, read_faults
from tests.processes import marked

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_fault_fits_the_source_once() -> None:
    for fault in read_faults():
        text = fault.locate(ROOT).read_text()
        ast.parse(fault.apply(text))


def test_no_fault_is_listed_twice() -> None:
    faults = read_faults()
    assert len(faults) >= 100
    assert len({fault.reason for fault in faults}) == len(faults)
    assert len({(fault.file, fault.find, fault.replace) for fault in faults}) == len(faults)


def test_entries_that_do_not_fit(tmp_path: Path) -> None:
    package = tmp_path / "megatron_iiet"
    package.mkdir()
    for name in ("one.py", "two.py"):
        (package / name).write_text("x = 1\n")
    (package / "one.py").write_text("x = 1\ny = 2\n")
    test = tmp_path / "tests/test_it.py"
    test.parent.mkdir()
    test.write_text("")

    def fault(find: str, file: str = "", named: str = "tests/test_it.py::test_x") -> Fault:
        return Fault("room", "it is wrong", find, "z = 3", (named,), file)

    assert fault("y = 2").locate(tmp_path) == package / "one.py"
    assert fault("x = 1", "two.py").locate(tmp_path) == package / "two.py"
    with pytest.raises(StaleFaultError, match=r"'x = 1' must occur once .* megatron_iiet/one.py \(1\), mega"):
        fault("x = 1").locate(tmp_path)
    with pytest.raises(
        StaleFaultError, match=r"occurs in no file; change the entry 'it is wrong' in mutants"
    ):
        fault("w = 0").locate(tmp_path)
    with pytest.raises(StaleFaultError, match=r"tests/gone.py is missing; name another test"):
        fault("y = 2", named="tests/gone.py").locate(tmp_path)
    for content, words in (
        ('[[fault]]\nfind = "a"\nreplace = "b"', "entry 1: .* missing 1 required .* 'reason'"),
        ('[[fault]]\nreason = "r"\nfind = "a"\nreplace = "b"', "entry 1 names no test"),
    ):
        (tmp_path / "room.toml").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_faults(tmp_path)


SLEEP = "__import__('time').sleep(600)"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one function, and tests that see half of what can go wrong with it."""
    files = {
        "megatron_iiet/__init__.py": "",
        "megatron_iiet/room.py": "def larger(a, b):\n    return a if a > b else b\n",
        "tests/test_room.py": "from megatron_iiet.room import larger\n\n\ndef test_it():\n"
        "    assert larger(2, 1) == 2\n",
        "tests/test_none.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "project", check=True)
    kept = [
        Fault("a", "the smaller one", "a > b", "a < b", ("tests/test_room.py",)),
        Fault("a", "always the first", "else b", "else a", ("tests/test_room.py",)),
        Fault("b", "it hangs", "return a if", f"{SLEEP}\n    return a if", ("tests/test_room.py",)),
        Fault("b", "no test of it runs", "else b", "else a", ("tests/test_none.py",)),
        Fault("b", "gone", "a >= b", "a < b", ("tests/test_room.py",)),
    ]
    monkeypatch.setattr(run, "read_faults", lambda lists: kept)
    return tmp_path / "project"


@pytest.mark.long
def test_found_missed_stale(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_text() for path in project.rglob("*.py")}
    assert run.main(["--limit", "20"], project) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if " s  " in line] == [
        "found",
        "NOT FOUND",
        "found (time limit)",
        "NOT FOUND",
        "STALE",
    ]
    assert lines[-1] == "found 2 of 5, not found 2, stale 1"
    assert {path: path.read_text() for path in project.rglob("*.py")} == before
    assert run.main(["a", "--match", "smaller"], project) == 0


@pytest.mark.slow
def test_nothing_is_tried_where_the_tests_fail_anyway(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tests/test_room.py").write_text("def test_it():\n    assert False\n")
    assert run.main(["a"], project) == 2
    assert "error: these tests do not pass as the tree is; nothing was tried" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_leaves_neither_copy_nor_process_behind(project: Path) -> None:
    """While a test runs that would never end."""
    test = "import time\n\n\ndef test_it():\n    time.sleep(600)\n"
    (project / "tests/test_room.py").write_text(test)
    code = f"""
from pathlib import Path
from tests.mutants.run import Bench
bench = Bench(Path({str(project)!r}), 600.0)
print(bench.folder, bench.mark, flush=True)
bench.run(["tests/test_room.py"])
"""
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    folder, mark = tool.stdout.readline().split()
    wait_until(lambda: (Path(folder) / "log").exists() and len(marked(mark)) > 0)
    assert (Path(folder) / "tree/megatron_iiet/room.py").is_file()
    tool.kill()
    tool.wait()
    wait_until(lambda: not Path(folder).exists())
    assert marked(mark) == {}


def wait_until(fulfilled: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.05)


def test_an_unknown_place(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["c"], project) == 2
    assert capsys.readouterr().err == "error: there are no faults of c; rooms are a, b\n"


SOURCE = """
def pick(rows: list[int] = [1], *, most: int | None = None) -> int:
    \"\"\"1 < 2 and more.\"\"\"
    if not rows:
        raise ValueError(f"{most} is {1 + 1}")
    rows.sort(reverse=True)
    total = max(rows[1:]) if most is None or rows[0] < most else -1
    total += 0.5
    return total
"""


CONDITION = "most is None or rows[0] < most"


def test_fresh_faults_are_of_what_runs() -> None:
    source = fresh.Source(SOURCE)
    changed = {
        (change.what, SOURCE[: change.start].count("\n") + 1, SOURCE[change.start : change.end], change.new)
        for change in source.changes()
    }
    assert changed == {
        ("1 is 2", 2, "1", "2"),
        ("not is gone", 4, "not ", ""),
        ("a statement is gone", 6, "rows.sort(reverse=True)", "pass"),
        ("argument reverse is gone", 6, "reverse=True", ""),
        ("True is False", 6, "True", "False"),
        ("max is min", 7, "max", "min"),
        ("a condition is turned round", 7, CONDITION, f"not ({CONDITION})"),
        ("a slice starts at the start", 7, "1", ""),
        ("1 is 2", 7, "1", "2"),
        ("'is' is 'is not'", 7, "is", "is not"),
        ("'or' is 'and'", 7, "or", "and"),
        ("0 is 1", 7, "0", "1"),
        ("'<' is '<='", 7, "<", "<="),
        ("an in-place change is an assignment", 8, " += ", " = "),
        ("0.5 is 1.0", 8, "0.5", "1.0"),
        ("nothing is returned", 9, "total", "None"),
    }


@pytest.mark.slow
def test_fresh_faults_are_a_list_that_can_be_tried(tmp_path: Path) -> None:
    drawn = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for path in drawn:
        assert fresh.main(["--number", "12", "--seed", "3", "--output", str(path), "models", "tools"]) == 0
    assert drawn[0].read_text() == drawn[1].read_text()
    faults = read_faults(drawn[0])
    assert len(faults) == 12
    for fault in faults:
        path = fault.locate(ROOT)
        assert str(path.relative_to(ROOT)) == fault.file
        compile(fault.apply(path.read_text()), "source with a fault", "exec")
    assert fresh.main(["--output", str(tmp_path / "c.toml"), "no_room"]) == 2
