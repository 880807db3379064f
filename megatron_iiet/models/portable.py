"""A model as a folder that needs no training stack to read: ``config.yaml``, fp32 ``model.safetensors``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_iiet.config import RunConfig, config_from_file, config_to_yaml
from megatron_iiet.models.transformer import Transformer

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"


def save(
    config: RunConfig, state: dict[str, Tensor], folder: str | Path, *, extra_files: Sequence[str | Path] = ()
) -> None:
    """Write ``state`` (parameter name → tensor) and the configuration it belongs to.

    The folder appears whole or not at all: it is written under a temporary name and renamed.
    ``extra_files`` are copied into it under their own names (tokenizer files).

    Raises:
        ValueError: the folder exists, or ``state`` does not fit the configuration.
    """
    folder = Path(folder)
    check_new(folder)
    with torch.device("meta"):
        model = Transformer(config)
    _check_state(model, state, str(folder))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG_FILE).write_text(config_to_yaml(config))
    save_file({k: v.detach().float().contiguous() for k, v in state.items()}, partial / WEIGHTS_FILE)
    for file in extra_files:
        shutil.copy(file, partial / Path(file).name)
    partial.rename(folder)


def load(folder: str | Path) -> Transformer:
    """The model of a folder that :func:`save` wrote, in fp32 and evaluation mode.

    Called on token ids [B, T] it returns logits [B, T, V]; layer n holds its merge coefficients as
    ``layers.{n}.solver.coefficients`` ([n + 1], fp32).

    Raises:
        ValueError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, so it is not a model folder; "
                "make one with tools/convert_checkpoint.py"
            )
    config = config_from_file(folder / CONFIG_FILE)
    config.training.recompute = "off"
    with torch.device("meta"):
        model = Transformer(config)
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged ({error}); convert the model again") from None
    _check_state(model, state, str(folder / WEIGHTS_FILE))
    kept = [name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)]
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    for name in kept:  # the parameters are new ones, and have lost the mark
        model.get_parameter(name).keep_fp32 = True  # type: ignore[attr-defined]
    model.rotary = type(model.rotary)(config.model)  # its tables are not stored
    return model.eval()


def check_new(folder: str | Path) -> None:
    """Refuse a folder that :func:`save` could not create; for callers with long work before it.

    Raises:
        ValueError: something of that name exists.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already; choose another folder or remove it")


def _check_state(model: Transformer, state: dict[str, Tensor], where: str) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}: parameter {name} is {found.get(name, 'missing')}, the configuration asks for "
                f"{expected.get(name, 'none of that name')}; weights and configuration do not belong together"
            )
