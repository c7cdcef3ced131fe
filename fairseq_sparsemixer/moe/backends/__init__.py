"""Ways to compute the same mixture; :mod:`fairseq_sparsemixer.moe.dispatch` chooses one."""
