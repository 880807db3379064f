"""Nothing that a test starts outlives the test, or a pytest that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.marks import long_but
from tests.processes import MARK, Session, marked

ROOT = Path(__file__).resolve().parents[1]
WITNESS = "MEGATRON_IIET_WITNESS"
"""Variable by which a test here finds what its pytest started; nothing else knows of it."""

RANK = "import time; time.sleep(600)"
LAUNCHER = f"""
import subprocess, sys
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)
print("started", flush=True)
"""
"""It gives its ranks sessions of their own, as DeepSpeed's does, and is gone before them."""
BODIES = {
    "launcher": f"""
    launcher = subprocess.Popen([sys.executable, "-c", {LAUNCHER + RANK!r}], stdout=subprocess.PIPE)
    assert launcher.stdout.readline() == b"started\\n"
""",
    "launcher that is gone": f"""
    subprocess.run([sys.executable, "-c", {LAUNCHER!r}], check=True)
""",
    "fork": """
    parent = os.getpid()
    if os.fork() == 0:
        die_with_parent(parent)
        time.sleep(600)
""",
    "deepspeed": """
    program = tmp_path / "program.py"
    program.write_text(f"from test_nested import write_and_wait; write_and_wait({str(tmp_path / 'ranks')!r})")
    command = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), str(program)]
    subprocess.Popen([sys.executable, *command])
    wait_for_two(tmp_path / "ranks")
""",
    "ranks": """
    rank = run_ranks, write_and_wait, 2, str(tmp_path / "ranks")
    threading.Thread(target=rank[0], args=rank[1:], daemon=True).start()
    wait_for_two(tmp_path / "ranks")
""",
}
"""What a test starts, and the fewest processes that are then to be seen below its pytest."""
PROCESSES = {"launcher": 3, "launcher that is gone": 2, "fork": 1, "deepspeed": 4, "ranks": 3}
MODULE = """
import os, subprocess, sys, threading, time
from tests.processes import die_with_parent
{imports}

def write_and_wait(folder):
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, os.environ["RANK"]), "w").close()
    time.sleep(600)

def wait_for_two(folder):
    while not folder.exists() or len(os.listdir(folder)) < 2:
        time.sleep(0.05)

def test_it(tmp_path):
{body}
    print("READY", flush=True, file=sys.__stderr__)
    time.sleep(600)
"""


def wait_for_none(witness: str) -> dict[int, str]:
    """Living processes of a witness, once there are none any more, or after a minute."""
    deadline = time.monotonic() + 60
    while (left := marked(witness, WITNESS)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def wait_for(witness: str, count: int) -> None:
    """Return once a witness has so many living processes; a minute is too long."""
    deadline = time.monotonic() + 60
    while len(found := marked(witness, WITNESS)) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def start_pytest(folder: Path, name: str, witness: str, *options: str) -> subprocess.Popen[str]:
    """pytest with our settings on one test, which waits for ever once it has started its processes."""
    imports = "from tests.distributed.harness import free_port, run_ranks"
    module = MODULE.format(body=BODIES[name], imports=imports if name in ("deepspeed", "ranks") else "")
    (folder / "test_nested.py").write_text(module)
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "tests.conftest"]
    command += [
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        f"--basetemp={folder / 'tmp'}",
        *options,
        str(folder),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{folder}", WITNESS: witness, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    long_but(
        [*((name, ()) for name in BODIES), ("launcher that is gone", ("-n", "1"))],
        *(("launcher", ()), ("fork", ()), ("launcher that is gone", ("-n", "1"))),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_pytest_that_is_killed_leaves_nothing_behind(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    witness = uuid.uuid4().hex
    pytest_process = start_pytest(tmp_path, name, witness, *options)
    assert pytest_process.stderr is not None
    said = []
    for line in pytest_process.stderr:
        said.append(line)
        if "READY" in line:
            break
    else:
        raise AssertionError("".join(said))
    wait_for(witness, PROCESSES[name] + 2)  # these, pytest and the guardian, which may still be starting
    pytest_process.kill()
    pytest_process.wait()
    assert wait_for_none(witness) == {}


@pytest.mark.parametrize("code", [LAUNCHER, LAUNCHER + RANK], ids=["launcher that is gone", "launcher"])
def test_a_test_that_ends_leaves_nothing_behind(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it fails; what was there before it stays."""
    witness = uuid.uuid4().hex
    monkeypatch.setenv(MARK, os.environ[MARK])
    monkeypatch.setenv(WITNESS, witness)
    session = Session()

    def fail() -> None:
        with session.end_of_test():
            launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "started\n"
            assert len(marked(witness, WITNESS)) >= 3
            raise RuntimeError("as a test may")

    earlier = subprocess.Popen([sys.executable, "-c", RANK])
    with pytest.raises(RuntimeError, match="as a test may"):
        fail()
    left = marked(witness, WITNESS)
    assert [left[process] for process in left if "time.sleep" in left[process]] == [
        f"{sys.executable} -c {RANK}"
    ]
    earlier.kill()
    earlier.wait()
