"""Files are there whole or not at all; what can't be written to is refused before the work."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_iiet import durable
from megatron_iiet.durable import append_line, check_output, make_parent, new_folder, replacing, write_text


def test_missing_folders_are_made(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "file")
    assert not (tmp_path / "a").exists()
    make_parent(tmp_path / "a" / "b" / "file")
    make_parent(tmp_path / "a" / "b" / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


@pytest.mark.parametrize("place", ["file/x", "file/a/b/x"])
def test_no_folder_below_a_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    for function in (check_output, make_parent):
        with pytest.raises(ValueError, match=r"x cannot be written: .*/file is a file, not a folder; choose"):
            function(tmp_path / place)


@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///tmp/x", "gs://b/x"])
def test_a_url_is_no_place(url: str) -> None:
    """It would be a folder of the name ``s3:``."""
    for function in (check_output, make_parent):
        with pytest.raises(ValueError, match="is a url, but outputs are written to local folders"):
            function(Path(url))


def test_a_relative_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_parent(Path("x"))
    make_parent(Path("a/x"))
    assert (tmp_path / "a").is_dir()


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither listed nor entered it need be; root, who may do all, runs tests too."""
    for lacking in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda path, mode, lacking=lacking: not mode & lacking)
        with pytest.raises(ValueError, match=r"b/x cannot be written: .* is not writable; choose another"):
            make_parent(tmp_path / "a/b/x")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is put on disk, in order: names of files as they are then, and of folders."""
    names: list[str] = []

    def fsync(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_a_file_is_replaced_whole_and_on_disk(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "file"
    write_text(path, "old é")
    assert path.read_bytes() == "old é".encode()
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old é"
        (temporary,) = set(os.listdir(tmp_path)) - {"file"}
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
    assert synced[2:] == [temporary, tmp_path.name], "first what it holds, then its name"
    with pytest.raises(KeyError), replacing(path) as file:  # noqa: PT012  (the block is what breaks off)
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
    assert len(synced) == 4


def test_two_who_replace_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as one:
        with replacing(path) as other:
            other.write(b"first")
        one.write(b"last")
        assert path.read_text() == "first"
    assert path.read_text() == "last"


def test_lines_are_added_each_on_its_own(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "log"
    append_line(path, "é")
    append_line(path, "b")
    assert path.read_bytes() == "é\nb\n".encode()
    path.write_bytes(b"a\nhalf")
    append_line(path, "c")
    append_line(path, "d")
    assert path.read_bytes() == b"a\nhalf\nc\nd\n"
    assert synced == ["log", tmp_path.name] * 4


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_file_systems_without_fsync(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That they have none is no error; that a disk fails is one."""

    def fsync(descriptor: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        if code in (errno.EIO, errno.ENOSPC):
            with pytest.raises(OSError, match="no"):
                durable.sync_file(file)
        else:
            durable.sync_file(file)
        assert (tmp_path / "file").read_bytes() == b"x", "it is handed to the system in any case"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """Writes say neither."""
    path = tmp_path / "log"

    def fill() -> None:
        with durable.naming(path), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OSError, match=rf"No space left on device, [\d,]+ bytes free: '{path}'$"):
        fill()
    with pytest.raises(OSError, match=r"Permission denied$"), durable.naming(path):
        raise PermissionError(errno.EACCES, "Permission denied")


class TestNewFolder:
    """Of two processes one is killed: what it left goes, and nothing else."""

    def killed(self, folder: Path) -> None:
        writing = new_folder(folder)
        with writing as partial:
            (partial / "half").write_text("")
            shutil.copytree(partial, folder.with_name("left"))
        shutil.rmtree(folder)
        folder.with_name("left").rename(partial)

    def test_what_a_kill_left_is_replaced(self, tmp_path: Path) -> None:
        self.killed(tmp_path / "new")
        with new_folder(tmp_path / "new") as partial:
            (partial / "whole").write_text("")
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
            "new",
            "new/whole",
        ]

    def test_an_empty_one_is(self, tmp_path: Path) -> None:
        (tmp_path / "new.partial").mkdir()
        with new_folder(tmp_path / "new"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["new"]

    @pytest.mark.parametrize("kind", ["folder", "file", "link", "link to one of ours"])
    def test_nothing_of_others_is(self, tmp_path: Path, kind: str) -> None:
        theirs, place = tmp_path / "theirs", tmp_path / "new.partial"
        self.killed(tmp_path / "other")
        (tmp_path / "other.partial").rename(theirs)
        if kind != "link to one of ours":
            (theirs / ".being_written").unlink()
        if kind == "folder":
            theirs.rename(place)
        elif kind == "file":
            (theirs / "half").rename(place)
        else:
            place.symlink_to(theirs)
        before = sorted(tmp_path.rglob("*"))
        words = r"new\.partial, where .* is there and not left .*move it away"
        with pytest.raises(ValueError, match=words), new_folder(tmp_path / "new"):
            pass
        assert sorted(tmp_path.rglob("*")) == before


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    durable.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: [][0])
    with pytest.raises(IndexError):
        durable.sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sigterm_runs_the_clean_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second one does not cut it short."""
    handlers: dict[int, Callable[..., object] | signal.Handlers] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    durable.leave_cleanly_on_sigterm()
    assert list(handlers) == [signal.SIGTERM]
    leave = handlers[signal.SIGTERM]
    assert callable(leave)
    with pytest.raises(SystemExit) as left:
        leave(signal.SIGTERM, None)
    assert left.value.code == 143
    assert handlers == {signal.SIGTERM: signal.SIG_IGN}
