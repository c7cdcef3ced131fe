"""Builders of translation corpora: from a download or the user's own text to fairseq's data.

======================  =========================================================================
``files``               text files read and written whole or not at all
``subprocesses``        Python programs run beside this one, with their errors
``steps``               resumable steps: what is finished, and with which settings
``cleaning``            sentence pairs: normalised, split, kept or dropped for a counted reason
``splitting``           train/valid/test by document, near duplicates, the copy score
``binarise``            SentencePiece model, pieces, ``fairseq-preprocess``
``wheels``              pinned wheels, fetched with the user's pip and read as zip files
``homeassistant``       the one source so far: extraction of pairs from its wheel
``prepare``             the command that runs it all
======================  =========================================================================

Only ``homeassistant`` and ``prepare`` know of a particular source.
"""
