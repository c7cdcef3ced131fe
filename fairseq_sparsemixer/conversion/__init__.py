"""From a dense model to one with experts, and back.

================  ===============================================================================
``checkpoints``   a checkpoint's model without its dictionaries, and a checkpoint of another model
``upcycling``     ``fairseq-sparsemixer upcycle``: every expert a copy of the dense network
``usage``         what experts are worth on a text: load, and the loss without them
``smaller``       layers of fewer experts, and of none
``pruning``       ``fairseq-sparsemixer prune``
================  ===============================================================================
"""
