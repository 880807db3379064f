"""Which checkpoints are removed after a newer one: only those that this program made for this run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_iiet.storage.checkpoint import checkpoints_folder, commit, tag_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 2, 4, 6 and 8."""
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    return tmp_path


def write_checkpoint(run: Path, step: int) -> Path:
    folder = checkpoints_folder(run) / tag_of(step)
    folder.mkdir(parents=True)
    for name in ("config.yaml", "state.json", "index.json", "rank_00000.safetensors"):
        (folder / name).write_text(name)
    return folder


def kept(run: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_0000000") for path in checkpoints_folder(run).glob("step_*"))


@pytest.mark.parametrize(
    ("keep", "left"), [(0, "2468"), (1, "8"), (2, "68"), (3, "468"), (4, "2468"), (9, "2468")]
)
def test_the_newest_are_kept(run: Path, keep: int, left: str) -> None:
    assert commit(run, 8, keep) == []
    assert kept(run) == list(left)
    assert (checkpoints_folder(run) / "latest").read_text() == "step_00000008\n"


def test_a_run_set_back_keeps_what_it_goes_on_from(run: Path) -> None:
    """From step 6 of 8 on to step 7: 6 and 7 are its newest; 8, which it left behind, is not its own."""
    write_checkpoint(run, 7)
    assert commit(run, 7, 2) == []
    assert kept(run) == ["6", "7", "8"]


def test_steps_are_numbers(tmp_path: Path) -> None:
    """With more digits than the name has room for, order by name would be wrong."""
    for step in (99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step)
    commit(tmp_path, 100_000_000, 1)
    assert [path.name for path in checkpoints_folder(tmp_path).glob("step_*")] == ["step_100000000"]


def test_what_others_put_there_stays(run: Path) -> None:
    """A copy by another name, an archive, a link to where a checkpoint was moved, names that look alike."""
    folder = checkpoints_folder(run)
    shutil.copytree(folder / "step_00000002", folder / "step_00000002-good")
    shutil.copytree(folder / "step_00000002", folder / "step_2")
    (folder / "step_00000002.tar").write_text("archive")
    (folder / "step_00000003").write_text("a file")
    shutil.move(folder / "step_00000004", run / "archived")
    (folder / "step_00000004").symlink_to(run / "archived")
    assert commit(run, 8, 1) == []
    assert kept(run) == ["2-good", "2.tar", "3", "4", "8", "step_2"]
    assert len(list((run / "archived").iterdir())) == 4


def test_a_folder_with_somebody_elses_file_stays_and_is_told(run: Path) -> None:
    folder = checkpoints_folder(run) / "step_00000002"
    (folder / "notes.txt").write_text("best so far")
    assert commit(run, 8, 1) == [
        f"{folder} is no longer needed, but holds notes.txt, which is not of a checkpoint; it stays"
    ]
    assert kept(run) == ["2", "8"]
    assert len(list(folder.iterdir())) == 5


def test_what_a_killed_save_left_goes_too(run: Path) -> None:
    folder = checkpoints_folder(run) / "step_00000004"
    for name in ("state.json", "index.json", "config.yaml"):
        (folder / name).unlink()
    (folder / "rank_00001.safetensors.0a1b2c3d.tmp").write_text("half")
    assert commit(run, 8, 1) == []
    assert kept(run) == ["8"]


def test_a_removal_that_fails_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    folder = checkpoints_folder(run)
    assert commit(run, 8, 2) == [
        f"{folder / tag_of(step)} is no longer needed, but cannot be removed: [Errno 13] Permission denied"
        for step in (2, 4)
    ]
