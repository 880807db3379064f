"""From text to batches: documents -> token shards (``.bin``/``.idx``) -> windows -> micro-batches.

The files, in the order the data flows: :mod:`text` (read documents), :mod:`tokenizer`, :mod:`preprocess`
(documents to shards), :mod:`indexed` (the shard format), :mod:`samples` (windows and splits),
:mod:`permutation` (order without an index), :mod:`batches` (micro-batches and resume).

Nothing is imported here, so that preprocessing workers never pay for importing torch.
"""
