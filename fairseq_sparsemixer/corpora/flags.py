"""What the doors of the corpora share in reading flags."""

import argparse
from typing import Sequence

from fairseq_sparsemixer.errors import UserError


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise a :class:`UserError` where a flag is given that would have no effect."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: such flags {why}; leave it out")
