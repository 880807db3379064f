"""Where libraries keep what they compile, with homes that take nothing. (Root may write anywhere: what the
kernel would say to another user is said here.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_iiet import caches

VARIABLES = ("TORCH_EXTENSIONS_DIR", "TRITON_HOME", "MPLCONFIGDIR")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A home and a folder for what is temporary; nothing is said of caches."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in (*VARIABLES, "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set comes to an end with the test
    return home, temporary


def set_now() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if os.environ[name]}


def test_a_home_that_takes_files_is_used(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    caches.keep_where_it_can_be()
    assert set_now() == {}
    assert list(places[1].iterdir()) == [], "and nothing is made"


@pytest.mark.parametrize("home", ["missing", "read-only", "no folder"])
def test_else_a_folder_of_this_user(
    home: str, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, temporary = places
    if home == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != there)
    else:
        there.rmdir()
        if home == "no folder":
            there.write_text("")
    caches.keep_where_it_can_be()
    own = temporary / f"megatron_iiet-{os.getuid()}"
    assert set_now() == {
        "TORCH_EXTENSIONS_DIR": str(own / "torch_extensions"),
        "TRITON_HOME": str(own / ".triton"),
        "MPLCONFIGDIR": str(own / "matplotlib"),
    }
    assert own.stat().st_mode & 0o777 == 0o700


def test_what_the_user_says_stays(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of a library, or where all caches or all settings are."""
    there, temporary = places
    there.rmdir()
    monkeypatch.setenv("TRITON_HOME", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "made" / "later"))
    caches.keep_where_it_can_be()
    own = temporary / f"megatron_iiet-{os.getuid()}"
    assert set_now() == {"TRITON_HOME": "/elsewhere", "MPLCONFIGDIR": str(own / "matplotlib")}


@pytest.mark.parametrize("kind", ["a link", "a file", "open to others", "another's"])
def test_a_folder_that_somebody_else_may_fill_is_not_taken(
    kind: str, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, temporary = places
    own = temporary / f"megatron_iiet-{os.getuid()}"
    if kind == "a link":
        own.symlink_to(temporary)
    elif kind == "a file":
        own.write_text("")
    elif kind == "open to others":
        own.mkdir()
        own.chmod(0o720)
    else:
        own.mkdir(mode=0o700)
        users = iter((os.getuid(), os.getuid() + 1))
        monkeypatch.setattr(os, "getuid", lambda: next(users))
    found = caches._own_folder()
    assert found != own
    assert found.parent == temporary
    assert found.name.startswith("megatron_iiet-")
    assert found.stat().st_mode & 0o777 == 0o700


def test_one_s_own_folder_is_found_again(places: tuple[Path, Path]) -> None:
    first = caches._own_folder()
    first.chmod(0o755)  # others may read
    assert caches._own_folder() == first == places[1] / f"megatron_iiet-{os.getuid()}"
