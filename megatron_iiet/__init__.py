"""megatron_iiet: large-scale pretraining of ODE-inspired ("numerical") Transformers.

A LLaMA decoder layer is a function F; a *solver* integrates it. See README.md.
"""

import io
import sys

from megatron_iiet import caches

__version__ = "0.1.0"


def _print_anything() -> None:
    """What a terminal has no characters for (→, ω, the text of a corpus) is printed as escapes: it is
    no reason to end a run. Every entry point imports this package before it prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


_print_anything()
caches.keep_where_it_can_be()  # before a library looks for its folder
