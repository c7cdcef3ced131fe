"""Trained models for programs that know no fairseq.

===========================  ==================================================================
``exporting``                a run becomes a folder of transformers
``requirements``             what is installed only for this
``modeling_sparsemixer``     the model, without fairseq: goes with the weights
``tokenization_sparsemixer`` its pieces, likewise
===========================  ==================================================================
"""
