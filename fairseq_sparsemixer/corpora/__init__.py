"""Builders of translation corpora: from a download or the user's own text to fairseq's data.

======================  =========================================================================
``files``               (one folder up) text read strictly, files written whole or not at all
``subprocesses``        Python programs run beside this one, with their errors
``parallel``            a function over many lines, on several cores
``steps``               resumable steps: what is finished, and with which settings
``cleaning``            sentence pairs: normalised, split, kept or dropped for a counted reason
``splitting``           train/valid/test by document, near duplicates, the copy score
``binarise``            SentencePiece model, pieces, ``fairseq-preprocess``
``moses``, ``bpe``      tokens as the Moses scripts make them, cut by subword-nmt
``apt``                 packages and their descriptions, from the machine's own apt sources
``packages``            Debian packages, read as archives
``wheels``              pinned wheels, fetched with the user's pip and read as zip files
``downloads``           files of a web server: resumed and verified
``archives``            members of a tar archive, copied out by name
``homeassistant``       extraction of pairs from its wheel
``debian``              extraction of pairs from Debian's packages, in four domains
``wmt14``               the archives of WMT14 English-German, and how they are cleaned
``stages``              what the corpora share from text to ``bin/``
``prepare``             the command that runs it all
======================  =========================================================================

Only ``homeassistant``, ``debian``, ``wmt14`` and ``prepare`` know of a particular source.
"""
