"""Corpora of tokens on disk: :mod:`mmididx` (Megatron's format), :mod:`indexed` and :mod:`indexed_writer` (a
pair of files), :mod:`shard_list` and :mod:`shards` (many pairs as one corpus), :mod:`merge`,
:mod:`inspection`, :mod:`verification`."""
