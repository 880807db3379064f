"""Whatever happens to a file of a checkpoint, nobody trains on from it or exports it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import LoadedConfig, config_from_dict
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.storage import checkpoint, retention
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from megatron_iiet.training.resume import check_resumable
from megatron_iiet.training.run import Run
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, read_full, tiny_config

Damage = Callable[[Path, Path], object]
"""Given a checkpoint and an older one of the same run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes, checkpoints after 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_data(folder)
    layouts = {"ZeRO-1": (1, {}), "pipeline": (0, {"pipeline": 2})}
    for name, (stage, parallel) in layouts.items():
        sections = {"training": {"stop_after": 4}, "checkpoint": {"interval": 2}, "parallel": parallel}
        config = tiny_config(data, folder / name, **sections)
        run_ranks(pretrain_rank, 2, as_data(config), ds_json(folder, stage))
    return {name: checkpoint.checkpoints_folder(folder / name) for name in layouts}


def read_all(folder: Path) -> int:
    """Everything that a resumed run reads; how many tensors that is."""
    config, state = checkpoint.read_config(folder), checkpoint.read_state(folder)
    check_resumable(folder, config, state.data["contents"])
    with checkpoint.open_weights(folder) as reader:
        kinds = [(name, kind) for name, entry in reader.parameters.items() for kind in entry.kinds]
        for name, kind in kinds:
            read_full(reader, name, kind)
    return len(kinds)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def flip(path: Path, place: float) -> None:
    """One bit, so far into what follows the header."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - start - 1))] ^= 4
    path.write_bytes(content)


def zero(path: Path, where: int) -> None:
    """A page, as file systems leave it after a crash."""
    content = bytearray(path.read_bytes())
    content[where : where + 4096] = bytes(len(content[where : where + 4096]))
    path.write_bytes(content)


def swap_offsets(path: Path) -> None:
    """Of two tensors of one size in a header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    a, b = "exp_avg/norm.weight", "exp_avg_sq/norm.weight"
    assert header[a]["shape"] == header[b]["shape"]
    header[a]["data_offsets"], header[b]["data_offsets"] = (
        header[b]["data_offsets"],
        header[a]["data_offsets"],
    )
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


def resize(path: Path, share: float, more: int = 0) -> None:
    """Cut a file, or add zeros."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share) + more)


def spoil(path: Path, after: bytes, offset: int, byte: bytes = b"~") -> None:
    """Another byte, so far behind where a text begins."""
    content = bytearray(path.read_bytes())
    where = content.index(after) + (offset or len(after))
    assert content[where : where + 1] != byte
    content[where : where + 1] = byte
    path.write_bytes(content)


def swap_values(path: Path) -> None:
    """Of two tensors of one size."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    (a, b), (c, d) = (
        (start + low, start + high)
        for low, high in (header[f"{kind}/norm.weight"]["data_offsets"] for kind in ("exp_avg", "exp_avg_sq"))
    )
    content[a:b], content[c:d] = content[c:d], content[a:b]
    path.write_bytes(content)


def holding(folder: Path, name: str) -> Path:
    """The file that has something of a parameter."""
    index = json.loads((folder / "index.json").read_text())
    return folder / str(index["parameters"][name]["pieces"][0][0])


def swap_files(one: Path, other: Path) -> None:
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


RANKS = ("rank_00000.safetensors", "rank_00001.safetensors")
DAMAGES: dict[str, tuple[Damage, str]] = {
    **{
        f"a bit at {place} of {rank}": (
            lambda new, old, rank=rank, place=place: flip(new / rank, place),
            rf"{rank} is damaged: bytes \d+ to \d+, of .*, are not what was written there",
        )
        for rank in RANKS
        for place in (0.0, 0.37, 1.0)
    },
    "a page of zeros": (lambda new, old: zero(new / RANKS[1], 8192), "are not what was written there"),
    "a header of zeros": (lambda new, old: zero(new / RANKS[0], 0), "its header cannot be read"),
    "swapped offsets": (
        lambda new, old: swap_offsets(holding(new, "norm.weight")),
        "of exp_avg(_sq)?/norm.weight, are not what was written there",
    ),
    "a rank's file of an older step": (
        lambda new, old: shutil.copy(old / RANKS[1], new / RANKS[1]),
        r"rank_00001\.safetensors (is of another save than index\.json beside it: of save \w+ of step 2, not "
        r"of save \w+ of step 4|has \d+ bytes)",
    ),
    "the index of an older step": (
        lambda new, old: shutil.copy(old / "index.json", new / "index.json"),
        "index.json is of save .* of step 2, but the checkpoint of save .* of step 4",
    ),
    "the state of an older step": (
        lambda new, old: shutil.copy(old / "state.json", new / "state.json"),
        "step_00000004 holds the checkpoint of step 2, not the one that its name says; give it the name step",
    ),
    "files that changed their names": (
        lambda new, old: swap_files(*(new / rank for rank in RANKS)),
        "damaged|has .* bytes",
    ),
    "another step": (
        lambda new, old: edit(new / "state.json", '"step": 4', '"step": 3'),
        r"state\.json is damaged or was edited: its digest is not that of what it holds",
    ),
    "another place in the data": (
        lambda new, old: edit(new / "state.json", '"samples": 32', '"samples": 24'),
        r"state\.json is damaged or was edited",
    ),
    "a state without its digest": (
        lambda new, old: edit(new / "state.json", '"digest"', '"digits"'),
        r"state\.json is damaged or was edited",
    ),
    "half a state": (
        lambda new, old: (new / "state.json").write_bytes((new / "state.json").read_bytes()[:99]),
        r"state\.json is damaged \(",
    ),
    "a state of before there were saves": (
        lambda new, old: edit(new / "state.json", '"format": 5', '"format": 4'),
        "state.json is damaged",
    ),
    "an edited index": (
        lambda new, old: edit(
            new / "index.json", '"norm.weight":{"shape":[32]', '"norm.weight":{"shape":[31]'
        ),
        r"index\.json is damaged or was edited",
    ),
    "an edited configuration": (
        lambda new, old: edit(new / "config.yaml", "rotary_base: 10000.0", "rotary_base: 20000.0"),
        r"config\.yaml was edited or damaged: its digest is not the one in state\.json beside it",
    ),
    "the configuration of another run": (
        lambda new, old: (new / "config.yaml").write_text("model: {}\n"),
        r"config\.yaml was edited or damaged",
    ),
    "half a file of a rank": (
        lambda new, old: resize(new / RANKS[0], 0.5),
        r"rank_00000\.safetensors has \d+ bytes, but index\.json says",
    ),
    "a file of a rank without its last byte": (
        lambda new, old: resize(new / RANKS[1], 1, -1),
        r"rank_00001\.safetensors has \d+ bytes, but index\.json says",
    ),
    "a file of a rank with a byte more": (
        lambda new, old: resize(new / RANKS[1], 1, 1),
        r"rank_00001\.safetensors has \d+ bytes, but index\.json says",
    ),
    "an empty file of a rank": (lambda new, old: resize(new / RANKS[0], 0), "has 0 bytes, but index"),
    "a folder in the place of a rank's file": (
        lambda new, old: ((new / RANKS[0]).unlink(), (new / RANKS[0]).mkdir()),
        r"rank_00000\.safetensors is no file",
    ),
    "one rank's file twice": (
        lambda new, old: shutil.copy(new / RANKS[0], new / RANKS[1]),
        "damaged|has .* bytes",
    ),
    "the save in a file's header": (
        lambda new, old: spoil(new / RANKS[0], b'"save":"', 8),
        r"rank_00000\.safetensors is of another save than index\.json",
    ),
    "the name of a tensor in a header": (
        lambda new, old: spoil(holding(new, "norm.weight"), b'"exp_avg/norm.', 0),
        r"for exp_avg/norm\.weight it has nothing",
    ),
    "the type of a tensor in a header": (
        lambda new, old: spoil(holding(new, "norm.weight"), b'"dtype":"F32"', 9, b"I"),
        "it has I32 of shape|its header cannot be read",
    ),
    "the length of a header": (
        lambda new, old: spoil(new / RANKS[0], b"", 0, b"\xff"),
        "its header cannot be read",
    ),
    "the values of two tensors": (
        lambda new, old: swap_values(holding(new, "norm.weight")),
        "are not what was written there",
    ),
    "files and index of an older step": (
        lambda new, old: [shutil.copy(old / name, new / name) for name in (*RANKS, "index.json")],
        "index.json is of save .* of step 2, but the checkpoint of save .* of step 4",
    ),
    "everything of an older step": (
        lambda new, old: shutil.copytree(old, new, dirs_exist_ok=True),
        "step_00000004 holds the checkpoint of step 2",
    ),
    "half an index": (lambda new, old: resize(new / "index.json", 0.5), r"index\.json is damaged \("),
    "an empty index": (lambda new, old: resize(new / "index.json", 0), r"index\.json is damaged \("),
    "an index that holds nothing": (
        lambda new, old: (new / "index.json").write_text("{}"),
        r"index\.json is damaged: it is of format None",
    ),
    "an index of before there were saves": (
        lambda new, old: edit(new / "index.json", '"format":5', '"format":1'),
        r"index\.json is damaged",
    ),
    "an empty state": (lambda new, old: resize(new / "state.json", 0), r"state\.json is damaged \("),
    "a state that is a list": (lambda new, old: (new / "state.json").write_text("[]"), "it holds no object"),
    "a state that says nothing": (
        lambda new, old: (new / "state.json").write_text("{}"),
        r"state\.json is damaged: its format is None",
    ),
    "another layout": (
        lambda new, old: edit(new / "state.json", '"tensor": 1', '"tensor": 2'),
        r"state\.json is damaged or was edited",
    ),
    "an empty configuration": (
        lambda new, old: resize(new / "config.yaml", 0),
        r"config\.yaml was edited or damaged",
    ),
    "a line more in the configuration": (
        lambda new, old: resize(new / "config.yaml", 1, 1),
        r"config\.yaml was edited or damaged",
    ),
    "no configuration": (lambda new, old: (new / "config.yaml").unlink(), "has no config.yaml, so it is not"),
    "no index": (lambda new, old: (new / "index.json").unlink(), r"index\.json is missing; copy the whole"),
    "no file of a rank": (lambda new, old: (new / RANKS[1]).unlink(), r"rank_00001\.safetensors is missing"),
    "no state": (lambda new, old: (new / "state.json").unlink(), r"state\.json is missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", long_but(["ZeRO-1", "pipeline"], "ZeRO-1"))
def test_every_damage_is_named(layout: str, runs: dict[str, Path], tmp_path: Path) -> None:
    old, new = (runs[layout] / f"step_0000000{step}" for step in (2, 4))
    assert read_all(new) == read_all(old) >= 3 * 20
    for number, (what, (damage, message)) in enumerate(DAMAGES.items()):
        copy = tmp_path / f"{number}" / new.name
        shutil.copytree(new, copy)
        damage(copy, old)
        with pytest.raises(ValueError, match=message) as caught:
            pytest.fail(f"{what}: {read_all(copy)} tensors were read")
        assert str(copy) in str(caught.value), what


def resumed_from(config: dict[str, Any], ds_path: Path) -> list[str]:
    """Resume as a start does; what the main rank says of it, and the step."""
    said: list[str] = []
    Run.say = lambda run, text: said.append(text) if run.context.is_main else None  # type: ignore[method-assign]
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, _ = prepare(loaded.config, ds_config, context)
        run.close()
        return [*said, f"step {run.step}"]


@pytest.mark.slow
def test_all_ranks_leave_a_damaged_checkpoint_and_take_the_one_before(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """Of what one rank reads, under ZeRO-3 also of another's file; and of what nobody needs to read."""
    damages: dict[str, tuple[int, Damage]] = {
        r"rank_00001\.safetensors is damaged: bytes \d+ to \d+": (
            1,
            lambda new, old: flip(new / RANKS[1], 0.9),
        ),
        r"rank_00000\.safetensors is damaged: bytes \d+ to \d+": (
            3,
            lambda new, old: flip(new / RANKS[0], 0.1),
        ),
        r"state\.json is missing|'latest' names 'step_00000004'": (
            1,
            lambda new, old: (new / "state.json").unlink(),
        ),
        r"rank_00000\.safetensors is of another save": (
            1,
            lambda new, old: shutil.copy(old / RANKS[0], new / RANKS[0]),
        ),
    }
    for number, (message, (stage, damage)) in enumerate(damages.items()):
        run = tmp_path / f"{number}"
        shutil.copytree(runs["ZeRO-1"].parent, run)
        old, new = (checkpoint.checkpoints_folder(run) / f"step_0000000{step}" for step in (2, 4))
        config = replace(checkpoint.read_config(old), output_dir=str(run))
        config.training.stop_after = None
        damage(new, old)
        said, others = run_ranks(resumed_from, 2, as_data(config), ds_json(tmp_path, stage))
        assert said[-1] == others[-1] == "step 2", said
        told = [text for text in said if text.startswith("warning: ")]
        assert any(re.search(message, text) for text in told), (message, said)
        assert f"resuming from {old}" in "\n".join(said)


@pytest.mark.slow
def test_beside_damaged_checkpoints_nobody_starts_from_scratch(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["ZeRO-1"].parent, tmp_path / "run")
    folder = checkpoint.checkpoints_folder(tmp_path / "run")
    config = replace(checkpoint.read_config(folder / "step_00000004"), output_dir=str(tmp_path / "run"))
    config.training.stop_after = None
    for step in (2, 4):
        flip(folder / f"step_0000000{step}" / RANKS[0], 0.5)
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(RanksFailedError, match=r"ConfigError: .* has no checkpoint that can be gone on from"):
        run_ranks(resumed_from, 2, as_data(config), ds_json(tmp_path, 1))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


@pytest.mark.slow
def test_a_save_is_another_one_each_time(runs: dict[str, Path]) -> None:
    saves = {
        json.loads((folder / step / "index.json").read_text())["save"]["save"]
        for folder in runs.values()
        for step in ("step_00000002", "step_00000004")
    }
    assert len(saves) == 4


@pytest.mark.slow
def test_without_latest_a_run_goes_on_from_most_steps(runs: dict[str, Path], tmp_path: Path) -> None:
    """And never from nothing: a kill between a checkpoint and the name of it leaves a run so."""
    shutil.copytree(runs["ZeRO-1"].parent, tmp_path / "run")
    folder = checkpoint.checkpoints_folder(tmp_path / "run")
    (folder / "latest").unlink()
    assert checkpoint.latest_tag(tmp_path / "run") == "step_00000004"


@pytest.mark.slow
def test_a_link_in_the_way_of_a_save_is_replaced(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["ZeRO-1"], tmp_path / "checkpoints")
    there = tmp_path / "checkpoints" / "step_00000004"
    link = tmp_path / "step_00000004"
    link.symlink_to(there)
    retention.make_way(link)
    assert not link.is_symlink()
    assert read_all(there)
