"""Several models against each other: tables, speed-up, significance.

================  ===============================================================================
``conditions``    whether runs may be compared, and how their scores differ
``speed_up``      how soon runs are as good as the baseline
``results``       the test set as plain data: scores, significance, domains, settings
``table``         ``fairseq-sparsemixer table``
================  ===============================================================================
"""
