"""Corpora of tokens on disk: :mod:`mmididx` (Megatron's format) and :mod:`indexed_writer`, :mod:`shard_list`
(which pairs make up a corpus), :mod:`streams` (reading), :mod:`merge`, :mod:`inspection`,
:mod:`verification`."""
