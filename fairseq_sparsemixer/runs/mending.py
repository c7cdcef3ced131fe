"""What a killed run leaves of its checkpoints, and how it is mended.

With this extension a checkpoint is whole or missing under every name (:mod:`.restarts`). fairseq
alone, or an earlier version, copied it to ``checkpoint_last.pt``, from which a run resumes, in
place: half a file, with which it does not start. And a disk may damage a file later.
"""

import shutil
from pathlib import Path
from typing import Optional

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.locks import remove_if_free
from fairseq_sparsemixer.runs.archives import Refusal, verify
from fairseq_sparsemixer.runs.checkpoints import BEST_PATTERN, EPOCH_PATTERN, UPDATE_PATTERN

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is whole, by its checksums; False for whatever cannot be read."""
    try:
        with open(path, "rb") as file:
            verify(file)
    except (Refusal, OSError):
        return False
    return True


def mend_last(folder: Path) -> Optional[Path]:
    """Put the newest whole checkpoint where ``checkpoint_last.pt`` is damaged or missing.

    Returns:
        The checkpoint that was copied; None where there was nothing to mend, or no checkpoint.

    Raises:
        UserError: ``checkpoint_last.pt`` is damaged, and there is no other.
    """
    for left_over in folder.glob("checkpoint*.pt.tmp"):  # of fairseq alone
        left_over.unlink()
    for left_over in folder.glob(".checkpoint*.pt.partial"):
        remove_if_free(left_over)
    last = folder / LAST
    if last.is_file() and is_intact(last):
        return None
    written = [path for path in folder.glob("checkpoint*.pt") if is_fairseqs(path.name)]
    for path in sorted(written, key=lambda path: path.stat().st_mtime, reverse=True):
        if is_intact(path):
            with atomic_path(last) as partial:
                shutil.copyfile(path, partial)
            return path
    if last.is_file():
        raise UserError(f"{last} is damaged, and so is every other: remove it to begin anew")
    return None


def is_fairseqs(name: str) -> bool:
    """Whether fairseq wrote it in training: an average, for one, has no state of the optimiser."""
    patterns = (EPOCH_PATTERN, UPDATE_PATTERN, BEST_PATTERN)
    return name == BEST or any(pattern.fullmatch(name) for pattern in patterns)
