"""Studies: several models trained alike, measured at the same points, and what they show.

===============  ==================================================================================
``plan``         the YAML file of a study
``layout``       its folder, which holds all that the runs need
``machine``      precision and batch, chosen by the machine that begins it and then kept
``runner``       trains and scores what a plan names, and can be interrupted
``demo``         a plan of its own: a small model or some, on a corpus that comes with it
``engine``       works off the runs of either
===============  ==================================================================================
"""
