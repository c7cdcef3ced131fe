"""The command line: a file for each sub-command of ``fairseq-sparsemixer``, with its flags.

A file here offers ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args)``; its docstring
is what ``--help`` says. It turns flags into values and calls the tool, which it imports only then:
help answers without torch and fairseq.
"""
