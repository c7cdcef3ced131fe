"""What the folder of a run holds, read and written in one place.

==================  =============================================================================
``arms``            which model is trained: a router and its number of experts, or the dense one
``folder``          a run read back
``settings``        what decides how a run trains, from its config
``grouping``        runs that differ by the seed alone, and what others differ in
``record``          ``run.json``: what a run was started with
``logs``            fairseq's log
``points``          ``points.jsonl``: what is measured at each validation
``metrics``         what is measured besides losses, and how it is shown
``checkpoints``     which there are, and what one holds
``reading``         the one way in which one is read: by ``archives`` (the file), ``vetting`` (its
                    settings) and ``allocations`` (the size of its model)
``mending``         the last checkpoint, where a run was killed while it was written
==================  =============================================================================
"""
