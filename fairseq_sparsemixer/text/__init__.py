"""Raw lines to the pieces that a model reads, and back.

============  =====================================================================
``moses``     the tokens of the Moses scripts, and text from them
``subwords``  SentencePiece or Moses tokens cut by BPE, as fairseq's encoders do it
============  =====================================================================
"""
