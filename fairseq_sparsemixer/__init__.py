"""SparseMixer for fairseq: a Switch Transformer whose router learns from its discrete choice.

Importing the package (which is what fairseq's ``--user-dir`` does) registers the model, its
architectures and the criterion. ``fairseq_sparsemixer.moe`` is plain PyTorch and also works where
fairseq is not installed.
"""

from importlib.util import find_spec

from fairseq_sparsemixer.version import __version__  # noqa: F401

if find_spec("fairseq") is not None:
    from fairseq_sparsemixer import compat

    compat.apply()

    from fairseq_sparsemixer import criterions, models, tasks  # noqa: F401  (registration)
