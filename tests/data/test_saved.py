"""Folders of Hugging Face's save_to_disk: what is read is what datasets.load_from_disk gives, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pytest

from megatron_iiet.data.reading.sources import find_inputs, list_dataset, list_inputs
from megatron_iiet.data.reading.text import iter_documents

ROWS = [f"document {number} “né”\n" for number in range(40)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """``save_to_disk`` of a dataset in three files, and of two splits."""
    whole = datasets.Dataset.from_dict({"text": ROWS, "id": list(range(40))})
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    splits = {"train_sft": whole, "validation": whole.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    return tmp_path


def texts(*inputs: str | Path) -> list[str]:
    return list(iter_documents(list_inputs([str(path) for path in inputs])))


def test_what_is_read_is_what_is_loaded(saved: Path) -> None:
    """Also a choice of rows in another order, and what is left of an earlier dataset of more files."""
    whole = datasets.load_from_disk(str(saved / "whole"))
    chosen = whole.shuffle(seed=1).filter(lambda row: row["id"] % 3 == 0)
    chosen.save_to_disk(saved / "chosen", num_shards=2)
    whole.save_to_disk(saved / "again", num_shards=3)
    chosen.save_to_disk(saved / "again", num_shards=2)
    for name in ("whole", "chosen", "again", "splits/train_sft", "splits/validation"):
        expected = datasets.load_from_disk(str(saved / name))["text"]
        assert texts(saved / name) == list(expected)
    assert texts(saved / "chosen") != sorted(texts(saved / "chosen"))
    found = find_inputs([str(saved / "again")])
    left_out = [Path(path).name for path in found.left_out["not named by the state.json beside them"]]
    assert left_out == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    assert texts(f"{saved}/again/*.arrow") == texts(saved / "chosen")


def test_behind_a_url(saved: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(saved), f"/{saved.name}", recursive=True)
    memory.pipe_file(f"/{saved.name}/whole/data-00000-of-00001.arrow", b"of an earlier one")
    assert texts(f"memory:///{saved.name}/whole") == ROWS
    with pytest.raises(ValueError, match=r"splits holds splits of one dataset, train_sft, validation"):
        texts(f"memory:///{saved.name}/splits")


def test_by_the_name_of_a_split(saved: Path) -> None:
    def by_name(name: str, split: str = "train") -> list[str]:
        return list(iter_documents(list_dataset(f"{saved}/{name}", split)))

    assert by_name("whole") == by_name("whole/") == ROWS
    assert by_name("splits", "train_sft") == ROWS
    assert by_name("splits", "validation") == ROWS[:5]
    with pytest.raises(ValueError, match=r"has no split 'train', only train_sft, validation\."):
        by_name("splits")
    datasets.Dataset.from_dict({"text": ROWS}, split="test[:50%]").save_to_disk(saved / "other")
    with pytest.raises(ValueError, match=r"has no split 'train', only test\."):
        by_name("other")
    assert by_name("other", "test") == ROWS


def state_of(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    r"splits holds splits of one dataset, train_sft, validation and .* as .*splits/train_sft\.": (
        "splits",
        lambda folder: None,
    ),
    r"whole/data-00001-of-00003\.arrow is missing, and state\.json beside it names it; put": (
        "whole",
        lambda folder: (folder / "data-00001-of-00003.arrow").unlink(),
    ),
    r"whole was saved with its choice of rows beside it \(_indices_data_files of state\.json\)": (
        "whole",
        lambda folder: state_of(folder, _indices_data_files=[{"filename": "indices.arrow"}]),
    ),
    r"whole/state\.json is damaged \(": (
        "whole",
        lambda folder: (folder / "state.json").write_text('{"_data_files": ['),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_another_dataset_is_refused(saved: Path, message: str) -> None:
    name, change = REFUSED[message]
    change(saved / name)
    with pytest.raises(ValueError, match=message) as error:
        list_inputs([str(saved / name)])
    assert "\n" not in str(error.value)
    memory = fsspec.filesystem("memory")
    memory.put(str(saved), f"/{saved.name}", recursive=True)
    with pytest.raises(ValueError, match=f"^(The input )?/.*{message}"):  # and not that it cannot be listed
        list_inputs([f"memory:///{saved.name}/{name}"])


def test_another_state_has_no_say(saved: Path) -> None:
    (saved / "whole" / "state.json").write_text('{"step": 3}')
    assert texts(saved / "whole") == ROWS
