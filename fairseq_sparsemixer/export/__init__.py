"""Trained models for programs that know no fairseq, and back.

===========================  ==================================================================
``exporting``                a run becomes a folder of transformers, or of ONNX
``description``              what a model of fairseq is, as settings of the exported one
``graphs``                   the exported model as graphs of ONNX
``importing``                such a folder becomes a run
``requirements``             what is installed only for this
``modeling_sparsemixer``     the model, without fairseq: goes with the weights
``tokenization_sparsemixer`` its pieces, likewise
===========================  ==================================================================
"""
