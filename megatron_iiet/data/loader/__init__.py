"""Corpora to batches: :mod:`samples` (what a sample is, with :mod:`packing`), :mod:`order` (which comes when,
with :mod:`blend`), :mod:`batches` (who reads what, with :mod:`read_ahead` and :mod:`counting`),
:mod:`validation` (what is validated on)."""
