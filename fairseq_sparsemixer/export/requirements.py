"""What is installed only for export and import."""

import importlib
from typing import Any

from fairseq_sparsemixer.errors import UserError


def load(module: str) -> Any:
    """A module that needs what the extra ``export`` installs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {error.name}: run `pip install 'fairseq-sparsemixer[export]'`"
        ) from error
