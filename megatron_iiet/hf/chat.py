"""Chat templates for exported folders: Jinja that writes a conversation as one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Roles are plain text, so that any tokenizer can write them; what an assistant says ends as documents do.
TURNS = """{%- for message in messages %}
{%- if not loop.first %}{{ '\\n' }}{% endif %}
{{- '### ' + message['role'].capitalize() + ':\\n' + message['content'].strip() }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n### Assistant:\\n' }}{% endif %}"""
NAMED = {"turns": TURNS}
"""Templates by name."""

_EXAMPLE = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And 2 + 2?"},
]


def read_template(name: str) -> bytes:
    """The template of this name, or in this file.

    Raises:
        ValueError: there is no such template or file, or it is no text.
    """
    if name in NAMED:
        return NAMED[name].encode()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--chat-template is {name!r}, but is neither a file nor {', '.join(NAMED)}")
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the chat template {path} is no UTF-8 text; give a Jinja template") from None
    return content


def try_template(folder: Path, source: str) -> None:
    """Write a conversation with the tokenizer and the template of ``folder``; a model that never sees where
    an answer ends never learns to stop.

    Raises:
        ValueError: it cannot be written, or says nothing of what was said.
    """
    from megatron_iiet.hf.folders import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    try:
        text = tokenizer.apply_chat_template(_EXAMPLE, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's own and whatever a template raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the chat template {source} cannot write a conversation ({reason[:200]}); correct it"
        ) from error
    missing = [message["content"] for message in _EXAMPLE[1:] if message["content"] not in text]
    if missing:
        raise ValueError(
            f"the chat template {source} leaves out what was said ({missing[0]!r}); write every message's "
            "content"
        )
