"""Studies: several models trained alike, measured at the same points, and what they show.

===============  ==================================================================================
``choices``      which experts a model's layers choose, token by token
``points``       what is measured at each validation of a run, as JSON lines
``plan``         the YAML file of a study
``runner``       the command that trains and scores what a plan names, and can be interrupted
===============  ==================================================================================
"""
