"""Renew the code and settings of an export that an older version of this package wrote; its weights stay."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from megatron_iiet.config.hugging_face import CONFIG_FILE, read_json
from megatron_iiet.durable import write_text
from megatron_iiet.hf.folders import is_own, read_fields
from megatron_iiet.hf.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from megatron_iiet.hf.tokenizer import to_json
from megatron_iiet.hf.travelling import AUTO_MAP, MODELING_FILE, modeling_code


def refresh(folder: str | Path) -> list[str]:
    """What was renewed, each file whole or not at all; nothing if the export is of this version.

    Raises:
        ValueError: the folder is no export of an IIET, or describes none that this version computes.
    """
    folder = Path(folder)
    if not is_own(folder):
        raise ValueError(
            f"{folder} is no export of an IIET (model_type 'iiet' in {CONFIG_FILE}): nothing is renewed"
        )
    renewed = []
    fields = read_fields(folder)
    code = folder / MODELING_FILE
    if not code.is_file() or code.read_bytes() != modeling_code():
        write_text(code, modeling_code().decode())
        renewed.append(MODELING_FILE)
    if fields.get("auto_map") != AUTO_MAP:
        fields |= {"auto_map": AUTO_MAP, "transformers_version": metadata.version("transformers")}
        write_text(folder / CONFIG_FILE, to_json(fields).decode())
        renewed.append(f"{CONFIG_FILE} (auto_map)")
    settings = folder / TOKENIZER_CONFIG
    said = read_json(settings) if settings.is_file() else {}
    if said.pop("split_special_tokens", None):
        write_text(settings, to_json(said).decode())
        renewed.append(f"{TOKENIZER_CONFIG} (split_special_tokens, with which no fine-tuning learns to stop)")
    return renewed
