"""Builders of translation corpora: from a download or the user's own text to fairseq's data.

Each corpus has one door, which returns what is in ``record.json``:

=================  ==============================================================================
``homeassistant``  ``preparation.prepare_homeassistant``: user-interface messages, from a wheel
``debian``         ``preparation.prepare_debian``: texts of Debian's packages, in four domains
``wmt14``          ``preparation.prepare_wmt14``: WMT14 English-German, or own text cleaned alike
``iwslt14``        ``prepare_iwslt14``: talks, German to English, as fairseq's example has them
``own_text``       ``prepare_raw_text``: the user's own text, as it is
``glue``           ``prepare_glue``: tasks to fine-tune on, in the pieces of another corpus
=================  ==============================================================================

They share, from what knows least to what knows most:

==================  =============================================================================
``subprocesses``    Python programs run beside this one, with their errors
``workers``         a function over many lines, on several cores
``resumable``       steps: what is finished, and with which settings
``cleaning``        sentence pairs: normalised, split, kept or dropped for a counted reason
``splitting``       train/valid/test by document, near duplicates, the copy score
``folder``          what a corpus' folder holds, and where
``downloads``       files of a web server: resumed and verified
``archives``        their members, copied out by name
``parallel_text``   two files whose lines correspond, read and written in step
``pieces``          text in pieces, written and counted
``spm``             ... cut by SentencePiece
``bpe``             ... from Moses tokens cut by subword-nmt
``binarise``        ``fairseq-preprocess``
``text_to_binary``  the steps from text to ``bin/`` and ``record.json``
``split_step``      the step from pairs to ``raw/``
``summary``         what is printed of a record
==================  =============================================================================

Importing any of them loads neither torch nor fairseq nor numpy.
"""
