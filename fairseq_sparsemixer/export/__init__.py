"""Trained models for programs that know no fairseq, and back.

===========================  ==================================================================
``exporting``                a run becomes a folder of transformers
``importing``                such a folder becomes a run
``requirements``             what is installed only for this
``modeling_sparsemixer``     the model, without fairseq: goes with the weights
``tokenization_sparsemixer`` its pieces, likewise
===========================  ==================================================================
"""
