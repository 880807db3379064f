"""Users without a name or a home, homes that take nothing, temporary folders that are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import config_to_yaml
from megatron_iiet.training.metrics import read_log
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[1]
NAMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
"""As a user whom no list of users knows, with this one's files and no more rights than their modes give."""
ENTRY_POINTS = sorted(
    [*ROOT.glob("*_iiet.py"), *(file for file in (ROOT / "tools").glob("*.py") if file.name != "__init__.py")]
)


def _allowed() -> bool:
    try:
        return subprocess.run([*NAMELESS, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


needs_namespace = pytest.mark.skipif(not _allowed(), reason="user namespaces are not allowed here")


def start(*command: str | Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run a Python program as a user without a name; a variable that is None is not there."""
    dropped = {"USER", "LOGNAME", "MPLCONFIGDIR", "TRITON_HOME", "TORCH_EXTENSIONS_DIR", "TMPDIR"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*NAMELESS, sys.executable, *map(str, command)],
        cwd=ROOT,
        env={name: value for name, value in (kept | variables).items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A home that takes nothing."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o555)
    return folder


def homes(locked: Path) -> list[dict[str, Any]]:
    return [{"HOME": str(locked)}, {"HOME": None}, {"HOME": "/proc/nobody"}]


@needs_namespace
@pytest.mark.parametrize("home", range(3), ids=["read-only", "unset", "missing"])
def test_what_is_compiled_has_a_place(home: int, locked: Path, tmp_path: Path) -> None:
    """In a folder of the user's own that others can't write into; the same in every process."""
    asked = "import megatron_iiet, os; print(*map(os.environ.get, {!r}), sep='\\n')"
    names = ("TORCH_EXTENSIONS_DIR", "TRITON_HOME", "MPLCONFIGDIR")
    place = tmp_path / "megatron_iiet-54321"
    for _ in range(2):
        told = start("-c", asked.format(names), TMPDIR=str(tmp_path), **homes(locked)[home])
        assert told.stdout.split() == [str(place / n) for n in ("torch_extensions", ".triton", "matplotlib")]
    assert place.stat().st_mode & 0o777 == 0o700


@needs_namespace
def test_a_place_that_others_made_is_not_used(locked: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron_iiet-54321").mkdir()
    (tmp_path / "megatron_iiet-54321").chmod(0o777)
    asked = "import megatron_iiet, os; print(os.environ['TRITON_HOME'])"
    told = start("-c", asked, TMPDIR=str(tmp_path), HOME=str(locked)).stdout
    assert told.startswith(str(tmp_path))
    assert not told.startswith(str(tmp_path / "megatron_iiet-54321"))


def test_a_home_that_takes_files_and_what_is_set_stay(tmp_path: Path) -> None:
    asked = "import megatron_iiet, os; print([n for n in os.environ if n in {!r}], os.environ['TRITON_HOME'])"
    variables = {n: v for n, v in os.environ.items() if n not in ("TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR")}
    for home in (tmp_path, "/proc/nobody"):
        told = subprocess.run(
            [sys.executable, "-c", asked.format(("TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"))],
            cwd=ROOT,
            env={**variables, "HOME": str(home), "TRITON_HOME": "/set"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        moved = [] if home == tmp_path else ["TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"]
        assert told == f"{moved} /set\n"


@needs_namespace
@pytest.mark.slow
def test_every_entry_point_helps(locked: Path) -> None:
    for script in ENTRY_POINTS:
        done = start(script, "--help", HOME=str(locked), TMPDIR="/nowhere")
        assert (done.returncode, done.stderr) == (0, ""), script


@needs_namespace
@pytest.mark.slow
def test_a_run_starts_resumes_and_is_looked_at(locked: Path, tmp_path: Path) -> None:
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    given = tiny_config(
        make_data(tmp_path), run, training={"steps": 4}, checkpoint={"interval": 2}, logging={"interval": 1}
    )
    config.write_text(config_to_yaml(given), encoding="utf-8")
    for home, *overrides in (
        ({"HOME": str(locked), "TMPDIR": "/nowhere"}, "--training.stop_after", "2"),
        ({"HOME": None},),
    ):
        done = start("pretrain_iiet.py", "--config", config, *overrides, **home)
        assert done.returncode == 0, done.stderr
    assert {1, 2, 3, 4} <= read_log(run).keys()


@needs_namespace
@pytest.mark.slow
def test_an_output_folder_that_takes_nothing_is_refused(locked: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(config_to_yaml(tiny_config(make_data(tmp_path), locked / "run")), encoding="utf-8")
    done = start("pretrain_iiet.py", "--config", config, HOME=str(locked))
    assert done.returncode == 2
    assert f"error: output_dir is {locked / 'run'}, where nothing can be written" in done.stderr
    assert "model:" not in done.stdout  # what a built engine says first


@pytest.mark.slow
@needs_namespace
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="only root makes a file system")
def test_no_temporary_folder_at_all_is_a_sentence(locked: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, ROOT / "tools" / "plot_losses.py", "--run", f"a={tmp_path}"),
        *("--output", tmp_path / "loss.png"),
    ]
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    # The checkout may be in a temporary folder itself.
    mounts = f"mount --bind {ROOT} /mnt; "
    mounts += "for d in /tmp /var/tmp /usr/tmp; do [ ! -d $d ] || mount --bind /proc $d; done; cd /proc; "
    words = [str(word).replace(f"{ROOT}/", "/mnt/") for word in command]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh", *NAMELESS, *words],
        env={"HOME": str(locked), "TMPDIR": "/nowhere", "PYTHONPATH": "/mnt"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("; set TMPDIR to a folder that can be written\n")
    assert done.stderr.count("\n") == 1
