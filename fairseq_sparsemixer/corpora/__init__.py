"""Builders of translation corpora: from a download or the user's own text to fairseq's data.

======================  =========================================================================
``files``               (one folder up) text read strictly, files written whole or not at all
``subprocesses``        Python programs run beside this one, with their errors
``workers``             a function over many lines, on several cores
``resumable``           resumable steps: what is finished, and with which settings
``cleaning``            sentence pairs: normalised, split, kept or dropped for a counted reason
``splitting``           train/valid/test by document, near duplicates, the copy score
``binarise``            SentencePiece model, pieces, ``fairseq-preprocess``
``bpe``                 Moses tokens cut by subword-nmt
``homeassistant``       extraction of pairs from its wheel
``debian``              extraction of pairs from Debian's packages, in four domains
``wmt14``               the archives of WMT14 English-German, and how they are cleaned
``text_to_binary``      what the corpora share from text to ``bin/``
``prepare``             the command that runs it all
======================  =========================================================================

Only ``homeassistant``, ``debian``, ``wmt14`` and ``prepare`` know of a particular source.
"""
