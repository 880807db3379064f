"""Hugging Face folders of any causal language model, as transformers loads them: offline, safetensors only.

transformers is imported where it is used: that takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_iiet.config.hugging_face import CONFIG_FILE, read_json
from megatron_iiet.hf import register
from megatron_iiet.hf.travelling import MODELING_FILE, modeling_code
from megatron_iiet.storage import portable
from megatron_iiet.storage.hugging_face.llama import read_config


def is_hugging_face(path: str | Path) -> bool:
    """Whether a folder is one of transformers, not a portable folder or a run."""
    folder = Path(path)
    return (folder / CONFIG_FILE).is_file() and not (folder / portable.CONFIG_FILE).is_file()


def read_fields(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's ``config.json``; an IIET's are checked.

    Raises:
        ValueError: it cannot be read, or describes no IIET though it says so.
    """
    path = Path(folder) / CONFIG_FILE
    fields = read_json(path)
    if fields.get("model_type") != "iiet":
        return fields
    if not isinstance(fields.get("solver"), dict):
        raise ValueError(f"{path} names no solver; convert the model again")
    from megatron_iiet.hf.modeling_iiet import IIETConfig

    try:
        IIETConfig.from_dict(dict(fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; convert the model again") from error
    return fields


def is_own(folder: str | Path) -> bool:
    """Whether a folder is an export of an IIET."""
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") == "iiet"


def old_code(folder: str | Path) -> str:
    """What to tell of an export whose code is another version's, in a sentence; empty if it is not."""
    code = Path(folder) / MODELING_FILE
    if not is_own(folder) or (code.is_file() and code.read_bytes() == modeling_code()):
        return ""
    return (
        f"{code} is not this version's, which is used here; other programs run the folder's own: renew it "
        f"with tools/convert_checkpoint.py --refresh {folder}"
    )


def load_model(folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False, **fields: Any) -> Any:
    """The model of a folder; exports of an IIET by the classes of this package, not by the copy beside them,
    and with a note on the standard error where that is another version's.

    Args:
        trust_remote_code: run code that the folder brings.
        fields: of the configuration, instead of the folder's.

    Raises:
        ValueError: there is no such model, it is damaged, or brings code that is not trusted.
    """
    from transformers import AutoModelForCausalLM

    register()
    if note := old_code(folder):
        print(f"note: {note}", file=sys.stderr)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,  # nothing is unpickled
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **fields,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_sentence(folder, "model", error)) from error


def follows_documents(folder: str | Path) -> bool:
    """Whether the model was trained here: on documents that follow an end-of-document token, of which control
    tokens spelled out in a text are text."""
    return text_follows(folder) == "eod"


def text_follows(folder: str | Path) -> str:
    """``data.text_follows`` of an IIET's folder; of another one ``tokenizer``: what that puts there.

    Raises:
        ValueError: it is none that there is.
    """
    fields = read_fields(folder)
    if fields.get("model_type") != "iiet":
        return "tokenizer"
    return read_config(Path(folder)).data.text_follows


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there are files that some tokenizer is made of, not only settings of one."""
    found = {file.name for names in _TOKENIZERS for file in Path(folder).glob(names)}
    return bool(found - {"tokenizer_config.json"})


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False, *, exact: bool = True) -> Any:
    """The tokenizer of a folder; that of a model trained here takes control tokens spelled out in a text for
    text, as training does.

    Args:
        trust_remote_code: run code that the folder brings.
        exact: false takes them for the tokens, as AutoTokenizer does where nothing is said.

    Raises:
        ValueError: there is none, it is damaged, or brings code that is not trusted.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer; give one with --tokenizer, or put it there")
    register()
    spelled_out = (
        {"split_special_tokens": True} if exact and is_own(folder) and follows_documents(folder) else {}
    )
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **spelled_out
        )
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise ValueError(_sentence(folder, "tokenizer", error)) from error


_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "tekken*", "*.spm", "bpe*")


def _sentence(folder: str | Path, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{folder} brings code of its own; read it, then add --trust-remote-code to run it"
    return f"the {what} of {folder} cannot be loaded ({text[:300]}); repair, convert or download it again"
