"""SparseMixer for fairseq: a Switch Transformer whose router learns from its discrete choice.

Importing the package (which is what fairseq's ``--user-dir`` does) registers the model, its
architectures, the criterion and the task: at once where fairseq is imported already, else as soon
as it is. ``fairseq_sparsemixer.moe`` is plain PyTorch and also works where fairseq is not
installed. Versions of Python, PyTorch and fairseq that do not work are refused.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any, Optional

from fairseq_sparsemixer import requirements
from fairseq_sparsemixer.version import __version__  # noqa: F401

requirements.check()

_REGISTERED = ("compat", "models", "criterions", "tasks", "optim")
_WHOLE = ("bits_per_byte", "expert_parallelism", "restarts", "watchdogs", "workers")
"""What compat calls when it is imported."""


def _register() -> None:
    for name in _REGISTERED:
        importlib.import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    """The parts that register, where they are asked for before fairseq is imported."""
    if name in _REGISTERED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _WhenFairseqIsImported(importlib.abc.MetaPathFinder):
    """Registers behind fairseq's import, so that a command's help need not wait for fairseq."""

    _asking_others = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        """See importlib, which may also ask without importing; None for all but fairseq."""
        if name != "fairseq" or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking_others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                requirements.check_fairseq()
                execute(module)
                # What asked for fairseq may be one of these, of which there is half yet: that is
                # left behind, and its importer gets the one that is there at the end.
                for part in _WHOLE:
                    sys.modules.pop(f"{__name__}.{part}", None)
                _register()
                sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if sys.modules.get("fairseq") is not None:
    requirements.check_fairseq()
    _register()
else:
    sys.meta_path.insert(0, _WhenFairseqIsImported())
