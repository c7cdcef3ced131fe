"""The one way in which a checkpoint is read: no code of it runs, and nothing damaged is taken.

``--trust-checkpoints`` of our commands, or :data:`TRUST` for those of fairseq, is for a file whose
configuration is refused although it is known to be harmless; code in its pickle is never run.
"""

import contextlib
import os
import pickle
import re
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, ContextManager, Dict, Iterator, List, Optional, Union

import numpy as np
import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs import allocations, archives, tensors, vetting
from fairseq_sparsemixer.runs.allocations import Allowance
from fairseq_sparsemixer.runs.archives import Damaged, NumpyArray, Refusal, Untrusted

TRUST = "SPARSEMIXER_TRUST_CHECKPOINTS"
"""The environment variable: 1 for checkpoints that may ask for any model and any task."""

_last = threading.local()


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or must not be.

    Args:
        path: the file.
        refusal: why.
        cure: what the user may do besides what follows from the reason.
    """

    def __init__(self, path: Any, refusal: Refusal, cure: Optional[str] = None) -> None:
        self.refusal = refusal
        cures = {
            Damaged: "copy it again",
            Untrusted: f"if you trust it, give --trust-checkpoints (fairseq's commands: {TRUST}=1)",
        }
        own = cures.get(type(refusal), "")
        ending = " or ".join(filter(None, (own, cure))) or "give another"
        super().__init__(f"cannot read the checkpoint {path}: it {refusal}; {ending}")


def trusted() -> bool:
    """Whether the user vouches for the configuration in checkpoints."""
    return os.environ.get(TRUST) == "1"


def read(source: Union[str, Path, BinaryIO], to_build: bool = True) -> Any:
    """What a checkpoint holds, its tensors on the CPU and numpy's numbers as Python's.

    Args:
        source: its path, or the open file.
        to_build: whether anything is built from it (:func:`.vetting.check`).

    Raises:
        CheckpointError: it is damaged, no checkpoint, holds code or asks for what may run some.
        OSError: it is missing, or cannot be read.
    """
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return read(file, to_build)
    _last.allowance = None
    try:
        if not trusted():
            contents = archives.contents(source)
            vetting.check(contents, to_build)
            _last.name = source.name
            _last.allowance = allocations.allowance(contents["model"].values())
            return tensors.fill(source, contents)
        if zipfile.is_zipfile(source):
            archives.verify(source)
        return plain(_load(source))
    except Refusal as refusal:
        raise CheckpointError(source.name, refusal) from refusal


def _load(file: BinaryIO) -> Any:
    file.seek(0)
    stand_ins: List[Any] = [(stand_in, name) for name, stand_in in archives.NUMPY.items()]
    torch.serialization.add_safe_globals(stand_ins)
    try:
        # Said although it is the default: a variable of torch's can turn that round.
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # torch's advice is to switch its protection off
        found = re.search(r"GLOBAL (\S+)", str(error))
        name = f" ({found[1]})" if found else ""
        raise Refusal(f"holds code{name}, which is never run") from error
    except Exception as error:  # whatever its bytes lead to
        raise Damaged(f"is damaged ({archives.reason(error)})") from error


def plain(value: Any) -> Any:
    """``value`` with Python's numbers and lists in place of numpy's; the same where it has none.

    And without what others keep at a tensor, as fairscale does: torch would write it as code.
    """
    return _plain(value, {})


def _plain(value: Any, done: Dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # what holds itself ends here
    result = value
    if isinstance(value, NumpyArray):
        result = value.values
    elif isinstance(value, (np.generic, np.ndarray)):
        result = value.tolist()
    elif isinstance(value, torch.Tensor):
        result = value.detach() if vars(value) else value
    elif isinstance(value, dict):
        inner = {key: _plain(each, done) for key, each in value.items()}
        if any(inner[key] is not value[key] for key in inner):
            result = type(value)(inner)
    elif type(value) in (list, tuple):
        members = [_plain(each, done) for each in value]
        if any(new is not old for new, old in zip(members, value)):
            result = type(value)(members)
    done[id(value)] = result
    return result


def bounded() -> ContextManager[Any]:
    """A context in which the model of the checkpoint that this thread read last can be built.

    Raises:
        CheckpointError: inside, where that model is larger than what the file holds.
    """
    allowed = getattr(_last, "allowance", None)
    return contextlib.nullcontext() if allowed is None else _bounded(allowed, _last.name)


@contextlib.contextmanager
def _bounded(allowed: Allowance, name: str) -> Iterator[None]:
    try:
        with allocations.Bounded(allowed):
            yield
    except Refusal as refusal:
        raise CheckpointError(name, refusal) from refusal
