"""What the folder of a run holds, read and written in one place.

==================  =============================================================================
``arms``            which model is trained: a router and its number of experts, or the dense one
``folder``          a run read back, and runs of equal settings grouped
``record``          ``run.json``: what a run was started with
``logs``            fairseq's log
``points``          ``points.jsonl``: what is measured at each validation
``mending``         the last checkpoint, where a run was killed while it was written
==================  =============================================================================
"""
