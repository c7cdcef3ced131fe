"""Several models against each other: tables, speed-up, significance.

================  ===============================================================================
``conditions``    whether runs may be compared, and how their scores differ
``histories``     the training of runs over time, from points or logs
``speed_up``      updates to the baseline's scored loss, and to its best loss
``means``         figures of several seeds as one
``table``         ``fairseq-sparsemixer table``
``results``       the test set as plain data: scores, significance, domains; settings
================  ===============================================================================
"""
