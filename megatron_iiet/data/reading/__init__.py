"""Rows of text from files: :mod:`sources` and :mod:`saved` (which files), :mod:`kinds` (what they are),
:mod:`compression`, :mod:`rows` and :mod:`tables` with :mod:`dictionaries` (each row as a line of JSON),
:mod:`text` (chunks of those, texts), :mod:`long_text` (documents too long to be held decoded)."""
