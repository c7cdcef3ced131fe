"""What is installed for export and import alone."""

import importlib
from typing import Any

from fairseq_sparsemixer.errors import UserError


def load(module: str, extra: str = "export") -> Any:
    """A module that needs what an extra of this package installs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {error.name}: run `pip install 'fairseq-sparsemixer[{extra}]'`"
        ) from error
