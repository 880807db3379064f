"""Which checkpoint a run goes on from, whatever a kill, a disk or a person has left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_iiet.config import ConfigError
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.retention import REJECTED, mark, roll_back
from megatron_iiet.storage.selection import Candidates, find_candidates
from tests.storage.saves import FILE, Saves, flip_a_bit


@pytest.fixture
def run(tmp_path: Path) -> Saves:
    """Set back from 8 to 4, and from there on to 5 and 7."""
    run = Saves(tmp_path)
    run.save(2, 4, 6, 8)
    run.set_back(4)
    run.save(5, 7)
    return run


def steps(found: Candidates) -> list[int]:
    return [int(tag[5:]) for tag in found.tags]


def test_what_latest_names_and_then_what_led_to_it(run: Saves) -> None:
    found = find_candidates(run.output_dir)
    assert (steps(found), found.notes) == ([7, 5, 4, 2], [])
    assert found.others == ["step_00000006", "step_00000008"]
    (run.folder / "latest").write_text("step_00000008\n")  # as a person does
    assert steps(find_candidates(run.output_dir)) == [8, 6, 4, 2]


def test_a_run_without_any(tmp_path: Path) -> None:
    assert find_candidates(tmp_path) == Candidates()
    killed = checkpoint.checkpoints_folder(tmp_path) / "step_00000002"
    killed.mkdir(parents=True)
    (killed / "index.json").write_text("{}")
    told = f"{killed} is not complete, as a kill leaves a first save; starting from scratch"
    assert find_candidates(tmp_path) == Candidates(notes=[told])


def test_without_latest_what_was_written_last(run: Saves) -> None:
    """Not what has the most steps: that is of a branch that was left."""
    (run.folder / "latest").unlink()
    found = find_candidates(run.output_dir)
    assert steps(found) == [7, 5, 8, 6, 4, 2]
    assert found.notes == ["'latest' is missing; of the complete checkpoints the one written last is taken"]


@pytest.mark.parametrize("text", ["step_00000009", "nonsense", "", "\0", "../7"])
def test_latest_that_names_nothing(text: str, run: Saves) -> None:
    (run.folder / "latest").write_text(text)
    found = find_candidates(run.output_dir)
    assert steps(found)[:2] == [7, 5]
    assert found.notes == [f"'latest' names {text!r}, which is not a complete checkpoint"]


def test_of_one_that_is_gone_not_the_branch_that_was_left(run: Saves) -> None:
    for step in (7, 5):
        (run.at(step) / "state.json").unlink()
    assert steps(find_candidates(run.output_dir)) == [6, 4, 2]


def test_of_a_state_that_cannot_be_read_those_of_fewer_steps(run: Saves) -> None:
    (run.at(7) / "state.json").write_text("{}")
    found = find_candidates(run.output_dir)
    assert steps(found) == [6, 5, 4, 2]
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"step_00000007 is left out: {run.at(7) / 'state.json'} is")


def test_what_led_here_is_known_by_its_save(run: Saves) -> None:
    """Not by its step: somebody has put another run's there."""
    other = Saves(run.output_dir / "other")
    shutil.rmtree(run.at(5))
    shutil.copytree(other.save(5), run.at(5))
    assert steps(find_candidates(run.output_dir)) == [7, 4, 2]


def test_rejected_ones_are_left_out(run: Saves) -> None:
    mark(run.at(7), REJECTED, "its next step had no finite loss")
    found = find_candidates(run.output_dir)
    assert steps(found) == [5, 4, 2]
    assert found.notes == ["step_00000007 is left out: it was rejected (its next step had no finite loss)"]
    roll_back(run.at(2))
    (run.folder / "latest").unlink()
    assert steps(find_candidates(run.output_dir)) == [2], "what came after is rejected"


def test_older_checkpoints_do_not_say_what_led_to_them(run: Saves) -> None:
    """Those of fewer steps are taken for that, and a checkpoint without digests is one of them."""
    for step in (5, 7):
        path = run.at(step) / "state.json"
        content = {
            key: value for key, value in json.loads(path.read_text()).items() if key in "step data layout"
        }
        path.write_text(json.dumps({"format": 4, **content}))
    assert steps(find_candidates(run.output_dir)) == [7, 6, 5, 4, 2]


def test_a_format_of_later_is_refused_where_it_is_the_one_to_take(run: Saves) -> None:
    for step in (6, 7):
        (run.at(step) / "state.json").write_text('{"format": 6}')
    with pytest.raises(ConfigError, match=r"step_00000007/state.json is of format 6, not 5; use the version"):
        find_candidates(run.output_dir)
    (run.folder / "latest").write_text("step_00000005\n")
    assert steps(find_candidates(run.output_dir)) == [5, 4, 2]


def test_latest_is_no_folder(run: Saves) -> None:
    (run.folder / "latest").unlink()
    (run.folder / "latest").mkdir()
    with pytest.raises(
        ConfigError, match="latest is a folder, not a file that names a checkpoint; remove it"
    ):
        find_candidates(run.output_dir)


def test_reading_all_finds_what_headers_do_not_show(run: Saves) -> None:
    assert checkpoint.verify(run.at(7)) == 4000
    flip_a_bit(run.at(7) / FILE)
    checkpoint.check_whole(run.at(7))
    with pytest.raises(ValueError, match="are not what was written there"):
        checkpoint.verify(run.at(7))
    shutil.copy(run.at(5) / FILE, run.at(7) / FILE)
    with pytest.raises(ValueError, match=r"is of another save than index\.json beside it"):
        checkpoint.check_whole(run.at(7))
