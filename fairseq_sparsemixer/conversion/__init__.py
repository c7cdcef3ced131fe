"""From a dense model to one with experts, and back.

================  ===============================================================================
``checkpoints``   a checkpoint's model without its dictionaries, and a checkpoint of another model
``upcycling``     ``fairseq-sparsemixer upcycle``: every expert a copy of the dense network
================  ===============================================================================
"""
