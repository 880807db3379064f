"""Text to token ids and back: :mod:`loading` (which tokenizer a file holds), a module for each kind, and
:mod:`fast` (an encoder several times as fast, where it proves equal on :mod:`hard_texts` and the corpus)."""
