"""From a trained IIET to the plan of an E-IIET: which iterations of which layers change anything.

:mod:`texts` (what is measured on), :mod:`forward` (a model without its training), :mod:`influence` (what is
measured), :mod:`plans` (which iterations stay), :mod:`figures` (tables and pictures), :mod:`analysis` (all of
it, as tools/iteration_influence.py runs it).
"""
