"""Rows of text from files: :mod:`sources` (which files), :mod:`compression`, :mod:`text` (chunks of lines,
rows), :mod:`long_text` (documents too long to be held decoded)."""
