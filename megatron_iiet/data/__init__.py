"""From text to batches: documents -> token shards (``.bin``/``.idx``) -> samples -> micro-batches.

In the order the data flows: :mod:`reading` (files to rows of text), :mod:`tokenizers`, :mod:`preprocess`
(rows to shards, on many machines), :mod:`corpora` (the shards: format, lists, merging, verification),
:mod:`loader` (samples, their order, batches). All files, by path or url, are opened through :mod:`stores`.

Nothing is imported here, and torch only in :mod:`loader`, so that preprocessing workers never pay for it.
"""
