"""What is installed, which devices there are, and which backends of the experts serve them."""

import importlib.metadata
import os
import platform
from typing import Dict, Iterator, List, Optional

import torch
from packaging.requirements import Requirement

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe.dispatch import BACKENDS, OBSTACLES, backend_for
from fairseq_sparsemixer.requirements import version_of
from fairseq_sparsemixer.version import __version__

DISTRIBUTION = "fairseq-sparsemixer"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lines() -> Iterator[str]:
    """The report, line by line.

    Raises:
        UserError: see :func:`installed`.
    """
    yield from _aligned("installed", installed())
    yield from _aligned("extras", extras())
    yield from _aligned("machine", machine())
    for device in devices():
        yield from _aligned(f"backends of the experts on {device}", backends(device))


def _aligned(title: str, rows: Dict[str, str]) -> Iterator[str]:
    yield title
    width = max(map(len, rows))
    for name, value in rows.items():
        yield f"  {name:<{width}}  {value}"


def installed() -> Dict[str, str]:
    """The version of the extension, of Python and of each package that it needs.

    Raises:
        UserError: the extension itself is not installed, only found on Python's path.
    """
    found = {DISTRIBUTION: __version__, "python": platform.python_version()}
    return {**found, **{each.name: _version(each) for each in requirements()}}


def unsuitable() -> List[str]:
    """Which of the packages that it needs are missing, or of another version than it needs."""
    return [f"{each.name} is {_version(each)}" for each in requirements() if not _suits(each)]


def extras() -> Dict[str, str]:
    """Of each extra but that for developers, whether all is there, or what is missing."""
    found = {}
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    for extra in sorted({*(metadata.get_all("Provides-Extra") or ())} - {"dev"}):
        needed = requirements(extra)
        found[extra] = ", ".join(f"{each.name} {_version(each)}" for each in needed)
        if any(version_of(each.name) is None for each in needed):
            found[extra] += f" (pip install '{DISTRIBUTION}[{extra}]')"
    return found


def requirements(extra: Optional[str] = None) -> List[Requirement]:
    """What the extension needs on this machine, or what an extra of it needs besides.

    Raises:
        UserError: see :func:`installed`.
    """
    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{DISTRIBUTION} is not installed, only found on Python's path: pip install -e ."
        ) from None
    found = [Requirement(text) for text in texts]
    return [each for each in found if _applies(each, extra)]


def _applies(requirement: Requirement, extra: Optional[str]) -> bool:
    marker = requirement.marker
    if marker is None:
        return extra is None
    always = marker.evaluate({"extra": ""})
    return always if extra is None else not always and marker.evaluate({"extra": extra})


def _suits(requirement: Requirement) -> bool:
    found = version_of(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _version(requirement: Requirement) -> str:
    """The same in words, with what is wrong with it."""
    found = version_of(requirement.name)
    if found is None:
        return "missing"
    return found if _suits(requirement) else f"{found}, which is not {requirement.specifier}"


def machine() -> Dict[str, str]:
    """Its system, cores and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": f"{cores} ({torch.get_num_threads()} threads of PyTorch)",
    }
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found[f"GPU {number}"] = (
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability "
            f"{about.major}.{about.minor}"
        )
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this PyTorch is built without CUDA"
        found["GPU"] = f"none{built}"
    return found


def devices() -> List[torch.device]:
    """The CPU and the first GPU, if any."""
    return [torch.device(name) for name in ["cpu", *torch.cuda.is_available() * ["cuda:0"]]]


def backends(device: torch.device) -> Dict[str, str]:
    """For each backend the types of numbers that it takes on a device, or why it takes none."""
    found = {}
    for name in BACKENDS:
        find = OBSTACLES.get(name, lambda *_: None)
        obstacles = {dtype: find(device, dtype) for dtype in DTYPES}
        served = [str(dtype)[6:] for dtype, obstacle in obstacles.items() if obstacle is None]
        found[name] = ", ".join(served) or f"no: it {obstacles[torch.float32]}"
    return {**found, "auto": backend_for(device, torch.float32)}
