"""The table of docs/resume.md: all keys by what a change of them means to a run that has checkpoints.

python -m tests.config.resume_table docs/resume.md    # writes it anew
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_iiet.config.changes import Change
from megatron_iiet.config.keys import key_changes

BEGIN = "<!-- the classes of megatron_iiet/config/schema.py; make check compares -->\n"
END = "<!-- end -->\n"


def resume_table() -> str:
    """The table in Markdown, a row a class, keys by section in the order of the schema."""
    rows = ["| class | resumed with another value | keys |", "|---|---|---|"]
    for change in Change:
        sections: dict[str, list[str]] = {}
        for key, of_it in key_changes().items():
            section, _, leaf = key.rpartition(".")
            if of_it is change:
                sections.setdefault(section, []).append(leaf)
        keys = "<br>".join(
            f"`{section}`: {', '.join(leaves)}" if section else f"`{', '.join(leaves)}`"
            for section, leaves in sections.items()
        )
        rows.append(f"| **{change.name.lower()}** | {change.value} | {keys} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """A document with the table of today between its two comments."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{resume_table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_table(document.read_text()))
