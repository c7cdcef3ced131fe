"""Studies: several models trained alike, measured at the same points, and what they show.

===============  ==================================================================================
``plan``         the YAML file of a study
``runner``       the command that trains and scores what a plan names, and can be interrupted
===============  ==================================================================================
"""
