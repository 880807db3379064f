"""The checkpoint store: any layout reads, bit for bit, what any other wrote, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from megatron_iiet.parallel.shard import Shard
from megatron_iiet.storage import fragments as store
from megatron_iiet.storage import integrity
from megatron_iiet.storage.fragments import Fragment, FragmentReader, Place, write_fragments, write_index
from megatron_iiet.storage.integrity import DamagedError, SaveIdentity
from megatron_iiet.storage.safetensors_stream import SafetensorsFile
from tests.tiny import read_full

SIZES = (1, 2, 4)
LARGEST = max(SIZES)
KINDS = {"p0": ("fp32", "exp_avg", "exp_avg_sq"), "p1": ("fp32", "exp_avg"), "p2": ("fp32",)}
"""Of three parameters, as optimizers that keep other moments have them."""
SAVE = SaveIdentity("ab" * 8, 7, "cd" * 16)
Weights = Mapping[str, tuple[Shard | None, dict[str, Tensor]]]


def random_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32 of all kinds, NaNs included: only a copy reproduces it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def local(full: Tensor, shard: Shard | None, size: int, rank: int) -> Tensor:
    return (shard.take(full, size, rank) if shard else full).flatten()


def write(folder: Path, weights: Weights, size: int, cut: Callable[[int], list[int]]) -> None:
    """Write a checkpoint as ``size`` tensor-parallel ranks would; ``cut`` gives the bounds of data ranks."""
    files: dict[str, list[Fragment]] = {}
    for name, (shard, tensors) in weights.items():
        shape = tuple(next(iter(tensors.values())).shape)
        for rank in range(size if shard else 1):
            flat = {kind: local(tensor, shard, size, rank) for kind, tensor in tensors.items()}
            for part, (a, b) in enumerate(pairwise(cut(len(next(iter(flat.values())))))):
                held = {kind: tensor[a:b] for kind, tensor in flat.items()}
                fragment = Fragment(name, Place(shape, shard, size, rank, a), b - a, held)
                files.setdefault(f"{rank}_{part}.safetensors", []).append(fragment)
    write_index(
        folder, {file: write_fragments(folder / file, found, SAVE) for file, found in files.items()}, SAVE
    )


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Digests of so many bytes each."""
    with mock.patch.object(store, "BLOCK_BYTES", size), mock.patch.object(integrity, "BLOCK_BYTES", size):
        yield


@st.composite
def parameters(draw: st.DrawFn) -> tuple[tuple[int, ...], Shard | None]:
    other = draw(st.integers(1, 5))
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    blocks = tuple(LARGEST * part for part in parts)
    n = sum(blocks)
    return draw(
        st.sampled_from(
            [
                ((other,), None),
                ((other, n), None),
                ((n,), Shard(0, blocks)),
                ((n, other), Shard(0, blocks)),
                ((other, n), Shard(1, blocks)),
                ((other, n), Shard(1, (n,))),
            ]
        )
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data(), size=st.sampled_from(SIZES), pieces=st.integers(1, 5))
def test_any_layout_reads_what_any_other_wrote(data: st.DataObject, size: int, pieces: int) -> None:
    weights = {}
    for i, (shape, shard) in enumerate(data.draw(st.lists(parameters(), min_size=1, max_size=3))):
        weights[f"p{i}"] = (
            shard,
            {kind: random_bits(shape, 3 * i + j) for j, kind in enumerate(KINDS[f"p{i}"])},
        )

    def cut(n: int) -> list[int]:
        inner = data.draw(st.lists(st.integers(0, n), min_size=pieces - 1, max_size=pieces - 1))
        return [0, *sorted(inner), n]

    # A budget of a few elements makes these small tensors pass through as many chunks as large ones.
    scratch = mock.patch.object(store, "SCRATCH_BYTES", data.draw(st.sampled_from([4, 100, 1 << 20])))
    cache = mock.patch.object(store, "OPEN_FILES", data.draw(st.sampled_from([1, 64])))
    with tempfile.TemporaryDirectory() as name, mock.patch("os.fsync"), scratch, cache:
        with blocks_of(data.draw(st.sampled_from([4, 12, 1 << 20]))):
            write(Path(name), weights, size, cut)
        with FragmentReader(Path(name), SAVE) as reader:  # which knows the size of the blocks from the index
            for parameter, (shard, tensors) in weights.items():
                assert reader.parameters[parameter].kinds == KINDS[parameter]
                for kind, full in tensors.items():
                    assert same_bits(read_full(reader, parameter, kind), full)
                check_intervals(data, reader, parameter, shard, *list(tensors.items())[-1])


def check_intervals(
    data: st.DataObject, reader: FragmentReader, name: str, shard: Shard | None, kind: str, full: Tensor
) -> None:
    for size in SIZES:
        for rank in range(size):
            expected = local(full, shard, size, rank)
            start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
            for a, b in [(start, end), (0, len(expected))]:
                found = reader.read(name, kind, Place(full.shape, shard, size, rank, a), b - a)
                assert same_bits(found, expected[a:b])


MATRIX, GAIN = random_bits((6, 8), 0), random_bits((6,), 1)
COLUMNS = Shard(1, (8,))
WEIGHTS: Weights = {"w": (COLUMNS, {"fp32": MATRIX}), "gain": (None, {"fp32": GAIN})}
WHOLE = Place((6, 8), COLUMNS, 1, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, WEIGHTS, 2, lambda n: [0, n // 3, n])
    return tmp_path


def test_out_is_filled_wherever_it_is(folder: Path) -> None:
    with FragmentReader(folder, SAVE) as reader:
        out = torch.zeros(60)
        assert reader.read("w", "fp32", WHOLE, 48, out[6:54]).data_ptr() == out[6:].data_ptr()
        assert same_bits(out[6:54], MATRIX.flatten())
        assert not out[:6].any()
        assert not out[54:].any()
        strided = torch.zeros(48, 2)
        reader.read("w", "fp32", WHOLE, 48, strided[:, 0])
        assert same_bits(strided[:, 0], MATRIX.flatten())
        learned = torch.zeros(48, requires_grad=True)
        reader.read("w", "fp32", WHOLE, 48, learned)
        assert same_bits(learned.detach(), MATRIX.flatten())


def test_same_layout_reads_just_the_blocks_of_the_interval(tmp_path: Path) -> None:
    with blocks_of(16):
        write(tmp_path, WEIGHTS, 2, lambda n: [0, n])
    with FragmentReader(tmp_path, SAVE) as reader, mock.patch("os.preadv", wraps=os.preadv) as preadv:
        # Of 24 elements, in blocks of 4: the third block's last two, the fourth, the fifth's first.
        found = reader.read("w", "fp32", Place((6, 8), COLUMNS, 2, 1, 10), 7)
    assert same_bits(found, COLUMNS.take(MATRIX, 2, 1).flatten()[10:17])
    assert [len(call.args[1][0]) for call in preadv.mock_calls] == [16, 16, 16]


def test_a_closed_reader_opens_again(folder: Path) -> None:
    reader = FragmentReader(folder, SAVE)
    for _ in range(2):
        assert same_bits(read_full(reader, "gain"), GAIN)
        reader.close()


def test_the_library_reads_the_files(folder: Path) -> None:
    with safe_open(folder / "1_0.safetensors", "pt") as file:
        assert set(file.keys()) == {"fp32/w"}
        assert file.metadata() == {
            "format": "megatron_iiet.fragments.5",
            "save": SAVE.save,
            "step": "7",
            "config": SAVE.config,
        }
        assert same_bits(file.get_tensor("fp32/w"), COLUMNS.take(MATRIX, 2, 1).flatten()[:8])
    with (folder / "1_0.safetensors").open("rb") as raw:
        assert int.from_bytes(raw.read(8), "little") % 8 == 0


def test_the_index_says_where_everything_is(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    assert index["parameters"]["gain"] == {
        "shape": [6],
        "shard": None,
        "tensor_size": 1,
        "kinds": ["fp32"],
        "pieces": [["0_0.safetensors", 0, 0, 2], ["0_1.safetensors", 0, 2, 4]],
    }
    assert index["save"] == {"save": SAVE.save, "step": 7, "config": SAVE.config}
    assert index["files"]["1_0.safetensors"] == {
        "bytes": (folder / "1_0.safetensors").stat().st_size,
        "digests": {"fp32/w": xxh3_64_hexdigest(COLUMNS.take(MATRIX, 2, 1).flatten()[:8].numpy().tobytes())},
    }


@pytest.mark.parametrize("parts", [[40], [16, 16, 8], [1, 30, 9], [0, 33, 7]])
def test_digests_are_of_blocks_whatever_the_parts(parts: list[int]) -> None:
    data = bytes(range(40))
    with blocks_of(16):
        digests = integrity.BlockDigests()
        for first, last in pairwise([0, *accumulate(parts)]):
            digests.update(memoryview(data)[first:last])
        assert digests.finish() == "".join(
            xxh3_64_hexdigest(data[first : first + 16]) for first in (0, 16, 32)
        )


def test_an_empty_file_is_fine(folder: Path) -> None:
    empty = Fragment("gain", Place((6,), None, 1, 0, 6), 0, {"fp32": torch.empty(0)})
    whole = replace(empty, place=replace(empty.place, start=0), numel=6, tensors={"fp32": GAIN})
    written = {
        file: write_fragments(folder / file, [f], SAVE) for file, f in {"a": empty, "b": whole}.items()
    }
    write_index(folder, written, SAVE)
    assert same_bits(read_full(FragmentReader(folder, SAVE), "gain"), GAIN)
    with safe_open(folder / "a", "pt") as file:
        assert not list(file.keys())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "v"}, "has no parameter v; use"),
        ({"kind": "exp_avg"}, "has no exp_avg of w, only fp32"),
        ({"shard": None}, r"w in .* split by Shard\(dim=1.*the model's has \[6, 8\] split by None"),
        ({"shape": (8, 6)}, r"has shape \[6, 8\] .* model's has \[8, 6\]"),
        ({"start": 1}, r"elements \[1, 49\) of w for tensor-parallel rank 0 of 1: each holds 48"),
        ({"tensor_size": 2, "tensor_rank": 2, "numel": 1}, "tensor-parallel rank 2 of 2"),
        ({"tensor_size": 3}, "a block of 8 .* does not split evenly over 3"),
        ({"out": torch.zeros(48, dtype=torch.bfloat16)}, r"cannot read w into torch.bfloat16 of \[48\]"),
        ({"out": torch.zeros(47)}, r"into torch.float32 of \[47\]; give torch.float32 of \[48\]"),
    ],
)
def test_wrong_requests(folder: Path, change: dict[str, Any], message: str) -> None:
    place = replace(WHOLE, **{key: value for key, value in change.items() if hasattr(WHOLE, key)})
    others = {key: value for key, value in change.items() if not hasattr(WHOLE, key)}
    with FragmentReader(folder, SAVE) as reader, pytest.raises(ValueError, match=message):
        reader.read(**({"name": "w", "kind": "fp32", "place": place, "numel": 48} | others))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """As a program with a fault would write it, or, not sealed, as somebody edits it."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    del index["digest"]
    if seal:
        integrity.write_sealed(path, index)
    else:
        path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), r"index\.json is missing"),
        (lambda f: (f / "index.json").write_text('{"format": 1'), r"index\.json is damaged \(Expecting"),
        (lambda f: (f / "index.json").write_text("[]"), r"index\.json is damaged: it holds no object"),
        (
            lambda f: edit_index(f, lambda i: i.update(format=7)),
            "is damaged: it is of format 7, not 5; copy the whole",
        ),
        (lambda f: edit_index(f, lambda i: i.pop("format")), "is of format None, not 5"),
        (lambda f: edit_index(f, lambda i: i.pop("files")), "of format 5: KeyError.'files'"),
        (
            lambda f: edit_index(f, lambda i: i["save"].update(step=8), seal=False),
            r"index\.json is damaged or was edited: its digest is not",
        ),
        (
            lambda f: edit_index(f, lambda i: i["save"].update(step=8)),
            "is of save abababababababab of step 8, but the checkpoint of save abababababababab of step 7",
        ),
        (
            lambda f: edit_index(f, lambda i: i["save"].update(config="ee" * 16)),
            r"index\.json is of save .*; copy the whole checkpoint again, or use another one",
        ),
        (lambda f: (f / "1_0.safetensors").unlink(), r"1_0\.safetensors is missing"),
        (
            lambda f: os.truncate(f / "1_0.safetensors", 100),
            r"1_0\.safetensors has 100 bytes, but index\.json says \d+: it is truncated",
        ),
        (
            lambda f: edit_index(f, lambda i: i["parameters"]["gain"]["pieces"].pop()),
            "has a gap between elements 6 and 2 of gain on tensor-parallel rank 0 of 1, which holds 6",
        ),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        FragmentReader(folder, SAVE)
    assert str(folder) in str(caught.value)


def test_damaged_files(folder: Path) -> None:
    path = folder / "0_0.safetensors"
    good = path.read_bytes()
    with FragmentReader(folder, SAVE) as reader:
        path.write_bytes(b"\xff" * len(good))
        with pytest.raises(ValueError, match=r"0_0\.safetensors is damaged: its header cannot be read"):
            read_full(reader, "gain")
        path.write_bytes(good.replace(b"fp32/gain", b"fp32/main"))
        with pytest.raises(ValueError, match=r"for fp32/gain it has nothing, not F32 of shape \[2\]"):
            read_full(reader, "gain")
        reader.close()
        path.write_bytes(good[:-1])
        with pytest.raises(ValueError, match="damaged: it ends at byte"):
            read_full(reader, "gain")


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("damage", ["flip", "zeros"])
def test_a_block_that_is_not_as_it_was_written(place: str, damage: str, tmp_path: Path) -> None:
    """Wherever in it, whichever interval of it is read; the other blocks are as good as ever."""
    values = random_bits((12,), 5)
    with blocks_of(16):
        write(tmp_path, {"v": (None, {"fp32": values})}, 1, lambda n: [0, n])
    path = tmp_path / "0_0.safetensors"
    good = bytearray(path.read_bytes())
    block = len(good) - 32  # the second of three
    at = block if place == "first" else block + 15
    good[at : at + 1] = bytes([good[at] ^ 1]) if damage == "flip" else b"\0"
    if damage == "zeros":
        good[block : block + 16] = bytes(16)
    path.write_bytes(good)
    with FragmentReader(tmp_path, SAVE) as reader:
        for start, numel in ((0, 12), (3, 2), (4, 1), (7, 1), (5, 2), (7, 5)):
            with pytest.raises(ValueError, match=rf"bytes {block} to {block + 16}, of fp32/v, are not what"):
                interval(reader, start, numel)
        for start, numel in ((0, 4), (8, 4), (9, 1)):
            assert same_bits(interval(reader, start, numel), values[start : start + numel])


@pytest.mark.parametrize("digests", [True, False])
def test_verifying_reads_everything_once(tmp_path: Path, digests: bool) -> None:
    """A chunk at a time, the last one shorter."""
    write(tmp_path, {"v": (None, {"fp32": random_bits((12,), 5)}), "w": WEIGHTS["w"]}, 1, lambda n: [0, n])
    path, read = tmp_path / "0_0.safetensors", mock.patch("os.preadv", wraps=os.preadv)
    if not digests:
        edit_index(tmp_path, downgrade, seal=False)
    with (
        mock.patch.object(store, "_VERIFIED", 8),
        FragmentReader(tmp_path, SAVE if digests else None) as reader,
        read as preadv,
    ):
        assert reader.verify() == 4 * (12 + 48)
        sizes = [len(call.args[1][0]) for call in preadv.mock_calls]
        assert sizes == ([48, 48, *[192] * 6] if digests else [32, 16, *[32] * 6])
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(DamagedError, match=r"0_0\.safetensors is damaged: it ends at byte"):
            reader.verify()


@pytest.mark.parametrize("left", ["", "0" * 32])
def test_a_tensor_without_a_digest_of_every_block(folder: Path, left: str) -> None:
    """Of an index that a program with a fault wrote."""

    def edit(index: dict[str, Any]) -> None:
        digests = index["files"]["0_1.safetensors"]["digests"]
        digests.update({"fp32/gain": left}) if left else digests.pop("fp32/gain")

    edit_index(folder, edit)
    with FragmentReader(folder, SAVE) as reader:
        for read in (reader.check_headers, reader.verify, lambda: read_full(reader, "gain")):
            with pytest.raises(DamagedError, match=r"index\.json has no digests of fp32/gain in 0_1\.safe"):
                read()
        assert same_bits(read_full(reader, "w"), MATRIX)


def interval(reader: FragmentReader, start: int, numel: int) -> Tensor:
    return reader.read("v", "fp32", Place((12,), None, 1, 0, start), numel)


def test_a_file_of_another_save(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of an earlier step of the same run, say: the same names, shapes and size, even the same weights."""
    other = tmp_path_factory.mktemp("other")
    earlier = replace(SAVE, step=6)
    with mock.patch(f"{__name__}.SAVE", earlier):
        write(other, WEIGHTS, 2, lambda n: [0, n // 3, n])
    shutil.copy(other / "1_0.safetensors", folder / "1_0.safetensors")
    with FragmentReader(folder, SAVE) as reader:
        assert same_bits(read_full(reader, "gain"), GAIN)
        with pytest.raises(
            ValueError, match=r"1_0\.safetensors is of another save than index\.json beside it"
        ):
            read_full(reader, "w")
    with pytest.raises(ValueError, match=r"index\.json is of save .* of step 7, but the checkpoint of save"):
        FragmentReader(folder, earlier)


def test_files_that_changed_their_names(tmp_path: Path) -> None:
    """Both of one save and size, with tensors of the same names and shapes."""
    write(tmp_path, {"gain": WEIGHTS["gain"]}, 1, lambda n: [0, n // 2, n])
    (tmp_path / "0_0.safetensors").rename(tmp_path / "other")
    (tmp_path / "0_1.safetensors").rename(tmp_path / "0_0.safetensors")
    (tmp_path / "other").rename(tmp_path / "0_1.safetensors")
    with (
        FragmentReader(tmp_path, SAVE) as reader,
        pytest.raises(ValueError, match="are not what was written"),
    ):
        read_full(reader, "gain")


def test_a_folder_of_before_there_were_digests(folder: Path) -> None:
    """Format 1 is read; but not as a part of a checkpoint that has them."""
    edit_index(folder, downgrade, seal=False)
    with FragmentReader(folder, None) as reader:
        assert same_bits(read_full(reader, "w"), MATRIX)
        assert reader.parameters["gain"].kinds == ("fp32",)
    with pytest.raises(ValueError, match="of a format without saves, but the checkpoint of save abab"):
        FragmentReader(folder, SAVE)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("kinds"), "damaged: kinds is missing"),
        (
            lambda index: index["files"]["0_0.safetensors"].update(bytes=-1),
            r"files\.0_0.safetensors.bytes is -1",
        ),
        (lambda index: index["parameters"]["gain"].update(shape=["x"]), r"parameters\.gain\.shape is 'x'"),
        (lambda index: index["parameters"]["gain"].update(tensor_size=1.5), r"gain\.tensor_size is 1\.5"),
        (lambda index: index["parameters"]["w"].update(shard={}), r"w\.shard\.dim is missing"),
        (
            lambda index: index["parameters"]["w"].update(tensor_size=0),
            "w in .*: a block of .* does not split",
        ),
        (lambda index: index["parameters"]["gain"]["pieces"][0].pop(), r"gain\.pieces is \["),
        (
            lambda index: index["parameters"]["gain"]["pieces"][0].__setitem__(2, float("nan")),
            "pieces is nan",
        ),
        (lambda index: index["files"].clear(), r"has no size of 0_0\.safetensors, which has "),
        (lambda index: index.update(format=4), r"is damaged: it is of format 4, not 5; copy the whole"),
    ],
)
def test_an_edited_index_without_digests(
    edit: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    """Nothing says that it was edited but what stands there."""
    edit_index(folder, lambda index: (downgrade(index), edit(index)), seal=False)
    with pytest.raises(ValueError, match=message) as caught:
        FragmentReader(folder, None)
    assert str(folder) in str(caught.value)
    assert "format 5:" not in str(caught.value)


@pytest.mark.parametrize("name", ["index.json", "0_0.safetensors"])
def test_a_folder_in_the_place_of_a_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} (cannot be read \(Is a directory\)|is no file); copy"):
        FragmentReader(folder, SAVE)


def downgrade(index: dict[str, Any]) -> None:
    """As format 1 was."""
    index |= {"format": 1, "kinds": ["fp32"]}
    del index["save"], index["block_bytes"]
    for file in index["files"].values():
        del file["digests"]
    for parameter in index["parameters"].values():
        del parameter["kinds"]


@pytest.mark.parametrize("offset", [2**70, 1.5, -9, "0"])
def test_offsets_that_are_none(offset: Any, folder: Path) -> None:
    path = folder / "0_0.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["fp32/gain"]["data_offsets"] = [offset, 0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ValueError, match=r"0_0\.safetensors is damaged: its header cannot be read"):
        SafetensorsFile(path)


def gain(start: int, numel: int, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Fragment:
    tensors = {"fp32": GAIN[start : start + numel]} if tensors is None else tensors
    return Fragment("gain", replace(Place((6,), None, 1, 0, start), **changes), numel, tensors)


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([gain(0, 4)], "a gap between elements 6 and 4 of gain"),
        ([gain(0, 2), gain(3, 3)], "a gap between elements 3 and 2 of gain"),
        ([gain(0, 4), gain(3, 3)], "an overlap between elements 3 and 4 of gain"),
        ([gain(0, 6), gain(0, 6)], "an overlap between elements 0 and 6 of gain"),
        ([gain(6, 0)], "a gap between elements 6 and 0 of gain"),
        ([gain(0, 6), gain(0, 6, tensor_rank=1)], "gain on tensor-parallel rank 1 of 1"),
        ([gain(0, 6, shard=Shard(0, (6,)), tensor_size=2)], "an overlap .* rank 0 of 2, which holds 3"),
        ([gain(0, 3, shard=Shard(0, (6,)), tensor_size=2)], "a gap between .* rank 1 of 2, which holds 3"),
        ([gain(0, 4), gain(4, 2, shape=(7,))], r"1 has gain with shape \[7\], .* has \[6\]"),
        ([gain(0, 4), gain(4, 2, tensors={"exp_avg": GAIN[4:]})], "gain with kinds .'exp_avg'"),
    ],
)
def test_the_index_needs_every_element_once(tmp_path: Path, fragments: list[Fragment], message: str) -> None:
    written = {str(i): write_fragments(tmp_path / str(i), [f], SAVE) for i, f in enumerate(fragments)}
    with pytest.raises(ValueError, match=message) as caught:
        write_index(tmp_path, written, SAVE)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_the_index_needs_every_file(tmp_path: Path) -> None:
    written = write_fragments(tmp_path / "a", [gain(0, 6)], SAVE)
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="a is missing"):
        write_index(tmp_path, {"a": written}, SAVE)


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([gain(0, 2), gain(2, 4)], "gain comes twice"),
        ([replace(gain(0, 2), numel=3)], r"fp32 of gain to .*: it is torch.float32 of \[2\]; .* of \[3\]"),
        ([gain(0, 6, tensors={"fp32": GAIN.double()})], r"it is torch.float64 of \[6\]"),
        ([gain(0, 6, tensors={"fp32": GAIN, "exp_avg": GAIN[1:]})], r"exp_avg of gain to .* of \[5\]"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, fragments: list[Fragment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_fragments(tmp_path / "file", fragments, SAVE)
    assert not list(tmp_path.iterdir())


class _Unreachable(Tensor):
    """A tensor on a device that fails."""

    def to(self, *_: object, **__: object) -> Tensor:
        raise RuntimeError("device lost")


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    named: list[bool] = []
    with mock.patch("os.fsync", side_effect=lambda _: named.append((tmp_path / "file").exists())):
        write_fragments(tmp_path / "file", [gain(0, 6)], SAVE)
    assert named == [False, True]  # the file, then its name in the folder


def test_a_failing_writer_leaves_no_file(tmp_path: Path) -> None:
    good = gain(0, 6)
    bad = replace(good, name="bad", tensors={"fp32": torch.zeros(6).as_subclass(_Unreachable)})
    with pytest.raises(RuntimeError, match="device lost"):
        write_fragments(tmp_path / "file", [good, bad], SAVE)
    assert not list(tmp_path.iterdir())
    write_fragments(tmp_path / "file", [good], SAVE)
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(RuntimeError, match="device lost"):
        write_fragments(tmp_path / "file", [good, bad], SAVE)
    assert (tmp_path / "file").read_bytes() == before


KILLED = """
import os, sys, torch
from pathlib import Path
from megatron_iiet.storage import fragments
from megatron_iiet.storage.integrity import SaveIdentity
class Killing(dict):  # when the writer asks for the tensor, in the middle of the file
    def __getitem__(self, kind):
        os._exit(9)

f = fragments.Fragment("w", fragments.Place((6,), None, 1, 0, 0), 6, Killing(fp32=torch.zeros(6)))
fragments.write_fragments(Path(sys.argv[1]), [f], SaveIdentity("", 0, ""))
"""
MEMORY = """
import math, re, sys
from pathlib import Path
from megatron_iiet.storage import fragments
from megatron_iiet.storage.fragments import FragmentReader, Place
from megatron_iiet.storage.integrity import SaveIdentity

def peak():  # of this process alone; ru_maxrss would count the parent's before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

fragments.SCRATCH_BYTES = 1 << 20
reader = FragmentReader(Path(sys.argv[1]), SaveIdentity("ab" * 8, 7, "cd" * 16))
small = reader.parameters["small"]
reader.read("small", "fp32", Place(small.shape, small.shard, 1, 0, 0), math.prod(small.shape))
before = peak()
entry = reader.parameters["w"]
for size in (1, 2, 8):
    n = entry.local_numel(size)
    reader.read("w", "fp32", Place(entry.shape, entry.shard, size, 0, 0), n)
print(peak() - before)
"""


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    assert run(KILLED, tmp_path / "file").returncode == 9
    assert not (tmp_path / "file").exists()


@pytest.mark.slow
def test_peak_memory_of_a_resharding_read(tmp_path: Path) -> None:
    full, small = torch.arange(16 << 20, dtype=torch.float32).view(4096, 4096), torch.ones(512, 512)
    weights = {"w": (Shard(1, (4096,)), full), "small": (Shard(1, (512,)), small)}
    write(tmp_path, {name: (s, {"fp32": t}) for name, (s, t) in weights.items()}, 2, lambda n: [0, n // 3, n])
    done = run(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    # What is read, 1 MiB of scratch and up to 13 MiB of torch's code; a stored shard would make it about 1.5.
    assert 0.9 * full.nbytes < int(done.stdout) < 1.4 * full.nbytes
