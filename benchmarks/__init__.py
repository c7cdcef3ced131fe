"""Measurements that are run on demand: ``python -m benchmarks.layer``."""
