"""Places of outputs: missing folders are made, what can't be written to is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iiet.durable import check_output, make_parent


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


def test_a_relative_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_parent(Path("x"))
    make_parent(Path("a/x"))
    assert (tmp_path / "a").is_dir()
