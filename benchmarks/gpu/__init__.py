"""What a GPU can do, checked and measured within the minutes given: ``python -m benchmarks.gpu``.

Each step is a process of its own, which writes what it has so far to a file of JSON; a device that
asserts, or a step that takes too long, costs that step alone.
"""
