"""A model as a folder that needs no training stack to read: ``config.yaml``, fp32 ``model.safetensors``
without the vocabulary's padding."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_iiet.config import RunConfig, config_from_file, config_to_yaml
from megatron_iiet.durable import new_folder
from megatron_iiet.models.transformer import VOCABULARY_WEIGHTS, Transformer
from megatron_iiet.storage.parameters import StoredParameters
from megatron_iiet.storage.safetensors_stream import Shape, TensorToWrite, open_checked, write_safetensors

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"


def save(
    config: RunConfig,
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    extra_files: Sequence[str | Path] = (),
) -> None:
    """Write ``state`` (parameter name → tensor) and the configuration it belongs to.

    The folder appears whole or not at all: it is written under a temporary name and renamed. Tensors are
    asked for one at a time, so a mapping that reads them when asked needs memory for the largest only.
    Padding rows of the vocabulary, if ``state`` has them, are left out. ``extra_files`` are copied into the
    folder under their own names (tokenizer files).

    Raises:
        ValueError: the folder exists, or ``state`` does not fit the configuration.
    """
    folder = Path(folder)
    check_new(folder)
    expected = _expected_shapes(Transformer.on_meta(config))
    _check_shapes(expected, {name: expected.get(name, ()) for name in state}, str(folder))

    def tensor(name: str) -> TensorToWrite:
        return TensorToWrite.whole(expected[name], lambda: without_padding(config, name, state[name]))

    with new_folder(folder) as partial:
        (partial / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8")
        write_safetensors(partial / WEIGHTS_FILE, {name: tensor(name) for name in expected}, {"format": "pt"})
        for file in extra_files:
            shutil.copy(file, partial / Path(file).name)


def load(folder: str | Path, *, backend: str = "reference") -> Transformer:
    """The model of a folder that :func:`save` wrote, in fp32 and evaluation mode, on the CPU.

    ``backend`` is a name from :func:`megatron_iiet.ops.resolve_backend` for the device where it will run.

    Called on token ids [B, T] it returns logits [B, T, V]; layer n holds its merge coefficients as
    ``layers.{n}.solver.coefficients`` ([n + 1], fp32).

    Raises:
        ValueError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    stored = StoredModel(folder)
    config = stored.config
    model = Transformer.on_meta(config, backend)
    kept = [name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)]
    model.load_state_dict(
        {name: _with_padding(config, name, value) for name, value in stored.items()}, assign=True
    )
    for name in kept:  # the parameters are new ones, and have lost the mark
        model.get_parameter(name).keep_fp32 = True  # type: ignore[attr-defined]
    model.rotary = type(model.rotary)(config.model)  # its tables are not stored
    return model.eval()


class StoredModel(StoredParameters):
    """The parameters of a folder that :func:`save` wrote.

    Raises:
        ValueError: as :func:`load`.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} has no {name}, so it is not a model folder; "
                    "make one with tools/convert_checkpoint.py"
                )
        self.config = config_from_file(folder / CONFIG_FILE)
        self.config.training.recompute = "off"
        path = folder / WEIGHTS_FILE
        self._file = open_checked(path, "is damaged", "convert the model again")
        self.shapes = {name: stored.shape for name, stored in self._file.tensors.items()}
        _check_shapes(_expected_shapes(Transformer.on_meta(self.config)), self.shapes, str(path))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        shape = self.shapes[name][1:]
        rows = torch.empty(last - first, *shape)
        self._file.read(name, first * prod(shape), rows)
        return rows

    def holding(self, name: str, row: int) -> str:
        return f"tensor {name} in {self._file.path}"


def check_new(folder: str | Path) -> None:
    """Refuse a folder that :func:`save` could not create; for callers with long work before it.

    Raises:
        ValueError: something of that name exists.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already; choose another folder or remove it")


def tokenizer_path(name: str, folder: str | Path) -> str:
    """Where the tokenizer of the model in ``folder`` is: a portable folder has it beside the weights, and
    knows it by its bare name."""
    beside = Path(folder) / Path(name).name
    return str(beside) if name and beside.is_file() else name


def without_padding(config: RunConfig, name: str, tensor: Tensor) -> Tensor:
    """A parameter without the vocabulary's padding rows."""
    return tensor[: config.model.vocab_size] if name in VOCABULARY_WEIGHTS else tensor


def _with_padding(config: RunConfig, name: str, tensor: Tensor) -> Tensor:
    padding = config.model.padded_vocab_size - config.model.vocab_size
    if name not in VOCABULARY_WEIGHTS or not padding:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(padding, tensor.shape[1])))


def _expected_shapes(model: Transformer) -> dict[str, Shape]:
    """Shape of every parameter as it is stored: without padding."""
    return {name: tuple(without_padding(model.config, name, p).shape) for name, p in model.named_parameters()}


def _check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}: parameter {name} is {found.get(name, 'missing')}, the configuration asks for "
                f"{expected.get(name, 'none of that name')}; weights and configuration do not belong together"
            )
