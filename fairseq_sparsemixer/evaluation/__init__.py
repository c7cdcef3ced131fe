"""Averaging, translation and scoring: what a trained run is worth.

===============  ===============================================================================
``options``      what a command line chooses: a model, how it searches, which scores
``average``      the mean of several checkpoints
``translator``   raw lines in, translations out
``precision``    in which a model translates, and how it is prepared for that
``translate``    a file, a pipe or a prompt through a translator
``evaluate``     a test set translated and scored, against a baseline too
``losses``       a set scored with a model that does not translate
``scored_text``  the text that is scored
``several``      what an evaluation of several pairs of languages holds
``system``       one system's translations and their scores
``scoring``      the metrics
``tokens``       BLEU over tokens
``summary``      what an evaluation found, as text
===============  ===============================================================================
"""
