"""Raw lines to the pieces that a model reads, and back.

============  =====================================================================
``bleu``      the tokeniser that sacreBLEU scores a language with
``moses``     the tokens of the Moses scripts, and text from them
``subwords``  SentencePiece or Moses tokens cut by BPE, as fairseq's encoders do it
============  =====================================================================
"""

SENTENCEPIECE_MODEL = "sentencepiece.bpe.model"
BPE_CODES = "bpecodes"
"""Files beside a model's dictionaries, by the names that fairseq's ``from_pretrained`` looks for:
which of them is there says how text is cut."""
MOSES_TOKENS = "moses.json"
"""Beside the codes: how the tokens were made, where not as those of WMT14."""
