"""Which checkpoints are removed after a newer one: only those that led to it, and that this program made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_iiet.storage.retention import (
    PINNED,
    REJECTED,
    describe_checkpoints,
    make_way,
    mark,
    reason_of,
    roll_back,
    unmark,
)
from tests.storage.saves import FILE, Saves, flip_a_bit


@pytest.fixture
def run(tmp_path: Path) -> Saves:
    """A run with checkpoints of the steps 2, 4, 6 and 8."""
    run = Saves(tmp_path)
    run.save(2, 4, 6, 8)
    return run


@pytest.mark.parametrize(
    ("keep", "left"), [(0, "2468"), (1, "8"), (2, "68"), (3, "468"), (4, "2468"), (9, "2468")]
)
def test_the_newest_are_kept(run: Saves, keep: int, left: str) -> None:
    assert run.prune(keep) == []
    assert run.kept() == list(left)
    assert (run.folder / "latest").read_text() == "step_00000008\n"


def test_multiples_pins_and_what_was_read_are_kept(run: Saves) -> None:
    mark(run.at(2), PINNED, "best so far")
    run.prune(1, keep_every=4)
    assert run.kept() == list("248")
    run.save(9)
    run.prune(1, spared=4)
    assert run.kept() == list("249")
    unmark(run.at(2), PINNED)
    run.prune(1)
    assert run.kept() == ["9"]


def test_a_run_set_back_keeps_what_it_goes_on_from(run: Saves) -> None:
    """From step 6 of 8 on to step 7: 6 and 7 are its newest; 8, which it left behind, is not its own."""
    run.set_back(6)
    run.save(7)
    assert run.prune(2) == []
    assert run.kept() == ["6", "7", "8"]
    run.save(9)
    run.prune(2)
    assert run.kept() == ["7", "8", "9"], "8 did not lead to 9"


def test_of_another_save_than_the_one_that_led_here_nothing_is_removed(run: Saves) -> None:
    other = Saves(run.output_dir / "other")
    other.save(4)
    shutil.rmtree(run.at(4))
    shutil.copytree(other.at(4), run.at(4))
    run.prune(1)
    assert run.kept() == ["4", "8"]


def test_steps_are_numbers(tmp_path: Path) -> None:
    """With more digits than the name has room for, order by name would be wrong."""
    run = Saves(tmp_path)
    run.save(99_999_999, 100_000_000)
    run.prune(1)
    assert run.kept() == ["step_100000000"]


def test_what_others_put_there_stays(run: Saves) -> None:
    """A copy by another name, an archive, a link to where a checkpoint was moved, names that look alike."""
    shutil.copytree(run.at(2), run.folder / "step_00000002-good")
    shutil.copytree(run.at(2), run.folder / "step_2")
    (run.folder / "step_00000002.tar").write_text("archive")
    (run.folder / "step_00000003").write_text("a file")
    shutil.move(run.at(4), run.output_dir / "archived")
    run.at(4).symlink_to(run.output_dir / "archived")
    assert run.prune(1) == []
    assert run.kept() == ["2-good", "2.tar", "3", "4", "8", "step_2"]
    assert len(list((run.output_dir / "archived").iterdir())) == 4


def test_a_folder_with_somebody_elses_file_stays_and_is_told(run: Saves) -> None:
    (run.at(2) / "notes.txt").write_text("best so far")
    assert run.prune(1) == [
        f"{run.at(2)} is no longer needed, but holds notes.txt, which is not of a checkpoint; it stays"
    ]
    assert run.kept() == ["2", "8"]
    assert len(list(run.at(2).iterdir())) == 5


def test_what_a_killed_save_left_goes_too(run: Saves) -> None:
    for name in ("state.json", "index.json", "config.yaml"):
        (run.at(4) / name).unlink()
    (run.at(4) / "rank_00001.safetensors.0a1b2c3d.tmp").write_text("half")
    assert run.prune(1) == []
    assert run.kept() == ["8"]


def test_a_removal_that_fails_is_a_warning(run: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert run.prune(2) == [
        f"{run.at(step)} is no longer needed, but cannot be removed: [Errno 13] Permission denied"
        for step in (2, 4)
    ]
    assert not (run.at(2) / "state.json").exists(), "what is half removed looks whole"


def test_a_pinned_checkpoint_moves_aside_when_its_step_is_saved_anew(run: Saves) -> None:
    mark(run.at(6), PINNED, "best so far")
    before = (run.at(6) / FILE).read_bytes()
    run.set_back(4)
    aside = run.folder / "step_00000006-pinned-1"
    told = make_way(run.at(6))
    assert told == f"{run.at(6)} is pinned, and this step is saved anew; it is {aside} now"
    run.save(6)
    assert (aside / FILE).read_bytes() == before
    run.prune(1)
    assert run.kept() == ["6", "6-pinned-1", "8"]


def test_rolling_back_rejects_what_came_after(run: Saves) -> None:
    roll_back(run.at(4))
    assert (run.folder / "latest").read_text() == "step_00000004\n"
    assert [reason_of(run.at(step), REJECTED) for step in (2, 4)] == [None, None]
    assert [reason_of(run.at(step), REJECTED) for step in (6, 8)] == [
        "the run was set back to step_00000004"
    ] * 2
    lines = describe_checkpoints(run.output_dir)
    assert [line.split()[0] for line in lines] == [run.at(step).name for step in (2, 4, 6, 8)]
    assert lines[1].endswith(", in force")
    assert lines[3].endswith(", of another branch, rejected (the run was set back to step_00000004)")
    roll_back(run.at(8))
    assert reason_of(run.at(8), REJECTED) is None
    assert describe_checkpoints(run.output_dir)[3].endswith(", in force")


def test_nothing_is_rolled_back_to_a_damaged_checkpoint(run: Saves) -> None:
    flip_a_bit(run.at(4) / FILE)
    with pytest.raises(ValueError, match="are not what was written there"):
        roll_back(run.at(4))
    assert (run.folder / "latest").read_text() == "step_00000008\n"
    assert reason_of(run.at(8), REJECTED) is None
