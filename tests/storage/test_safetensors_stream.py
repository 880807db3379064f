"""Files written and read a part at a time, against the library's own reader and writer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_iiet.storage import safetensors_stream
from megatron_iiet.storage.safetensors_stream import SafetensorsFile, TensorToWrite, write_safetensors

ROWS, SCALAR = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(1.5)


@pytest.fixture(params=[4, 24, 1 << 20], ids="chunks of {} bytes".format)
def chunk(request: pytest.FixtureRequest) -> Iterator[int]:
    """Less than a row, two rows, all."""
    with mock.patch.object(safetensors_stream, "CHUNK_BYTES", request.param):
        yield request.param


def of_rows(dtype: torch.dtype) -> TensorToWrite:
    return TensorToWrite.of_rows((7, 3), dtype, lambda first, last: ROWS[first:last])


def test_the_library_reads_what_is_written(tmp_path: Path, chunk: int) -> None:
    tensors = {
        **{str(dtype): of_rows(dtype) for dtype in safetensors_stream.DTYPES.values()},
        "scalar": TensorToWrite.whole((), lambda: SCALAR),
        "empty": TensorToWrite.of_rows((0, 3), torch.float32, lambda first, last: ROWS[first:last]),
        "last": TensorToWrite.whole((7, 3), lambda: ROWS.double()),
    }
    write_safetensors(tmp_path / "file", tensors, {"format": "pt"})
    found = load_file(tmp_path / "file")
    assert list(json.loads((tmp_path / "file").read_bytes()[8:].split(b"}}")[0] + b"}}")) == [
        "__metadata__",
        *tensors,
    ]
    for dtype in safetensors_stream.DTYPES.values():
        assert found[str(dtype)].dtype == dtype
        assert torch.equal(found[str(dtype)], ROWS.to(dtype))
        assert torch.equal(of_rows(dtype).make(), ROWS.to(dtype))
    assert torch.equal(found["last"], ROWS)
    assert (found["scalar"].item(), found["scalar"].shape, found["empty"].shape) == (1.5, (), (0, 3))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", safetensors_stream.DTYPES.values(), ids=str)
def test_any_interval_of_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype, chunk: int) -> None:
    save_file({"a": torch.ones(5), "b": ROWS.to(dtype), "s": SCALAR}, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    assert set(file.tensors) == {"a", "b", "s"}
    flat = ROWS.to(dtype).float().view(-1)
    for start in range(21):
        for stop in range(start, 22):
            out = torch.full((stop - start,), float("nan"))
            file.read("b", start, out)
            assert torch.equal(out, flat[start:stop])
    whole, scalar = torch.empty(7, 3), torch.empty(())
    file.read("b", 0, whole)
    file.read("s", 0, scalar)
    assert torch.equal(whole, flat.view(7, 3))
    assert scalar.item() == 1.5


@pytest.mark.parametrize(
    ("shape", "parts", "found"),
    [
        ((7, 3), [ROWS[:5], ROWS[:1]], r"\(6, 3\), not \(7, 3\)"),
        ((7, 3), [ROWS[:5], ROWS], r"\(12, 3\), not \(7, 3\)"),
        ((7, 3), [ROWS[:, :2], ROWS], r"\(7, 2\), not \(7, 3\)"),
        ((7, 3), [ROWS[:5, 0], ROWS], r"\(5,\), not \(7, 3\)"),
        ((7, 3), [], r"\(0, 3\), not \(7, 3\)"),
        ((7, 3), [SCALAR], r"\(\), not \(7, 3\)"),
        ((7,), [SCALAR] * 7, r"\(\), not \(7,\)"),
        ((), [ROWS], r"\(7, 3\), not \(\)"),
    ],
)
def test_other_rows_than_announced(
    shape: tuple[int, ...], parts: list[torch.Tensor], found: str, tmp_path: Path
) -> None:
    tensor = TensorToWrite(shape, torch.float32, lambda: parts)
    with pytest.raises(ValueError, match=f"cannot write .*: w is {found}"):
        write_safetensors(tmp_path / "file", {"w": tensor}, {})
    assert not list(tmp_path.iterdir())


def test_fp16_holds_no_large_value(tmp_path: Path) -> None:
    large = TensorToWrite.of_rows((1,), torch.float16, lambda first, last: torch.tensor([7e4]))
    with pytest.raises(ValueError, match=r"w holds 70000, which fp16 \(largest value 65504\) cannot hold"):
        write_safetensors(tmp_path / "file", {"w": large}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no header", b"\2" + bytes(7) + b"[]", b"\xff" * 100])
def test_no_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file is damaged: its header cannot be read; mend it"):
        SafetensorsFile(tmp_path / "file", "mend it")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": ROWS, "d": ROWS.double()}, path)
    file = SafetensorsFile(path)
    with pytest.raises(ValueError, match="d is stored as F64, not as one of F32, BF16, F16; copy it again"):
        file.read("d", 0, torch.empty(1))
    with pytest.raises(ValueError, match=r"for a it has F32 of shape \[7, 3\], not F32 of shape \[21\]"):
        file.require("a", "F32", (21,))
    with pytest.raises(ValueError, match=r"for d it has F64 of shape \[7, 3\], not F32 of shape \[7, 3\]"):
        file.require("d", "F32", (7, 3))
    file.require("a", "F32", (7, 3))
    content = path.read_bytes()
    path.write_bytes(content[: file.tensors["a"].offset + 8])
    with pytest.raises(ValueError, match=r"it ends at byte \d+, within a; copy it again"):
        file.read("a", 0, torch.empty(3))
