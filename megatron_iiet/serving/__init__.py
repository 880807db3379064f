"""Many texts at once from one model: a batch that sequences join and leave between two tokens, and the HTTP
server over it.

``cache.py`` keeps keys and values, ``continuation.py`` makes text of one sequence's tokens, ``batch.py`` runs
the model, ``engine.py`` decides who runs; ``protocol.py`` and ``app.py`` are the only ones that know of HTTP.
"""
