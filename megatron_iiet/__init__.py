"""megatron_iiet: large-scale pretraining of ODE-inspired ("numerical") Transformers.

A LLaMA decoder layer is a function F; a *solver* integrates it. See README.md.
"""

__version__ = "0.1.0"
