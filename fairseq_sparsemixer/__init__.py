"""SparseMixer for fairseq: a Switch Transformer whose router learns from its discrete choice.

Importing the package (which is what fairseq's ``--user-dir`` does) registers the model, its
architectures, the criterion and the task: at once where fairseq is imported already, else as soon
as it is. ``fairseq_sparsemixer.moe`` is plain PyTorch and also works where fairseq is not
installed.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any, Optional

from fairseq_sparsemixer.version import __version__  # noqa: F401


def _register() -> None:
    from fairseq_sparsemixer import compat

    compat.apply()

    from fairseq_sparsemixer import criterions, models, tasks  # noqa: F401


class _WhenFairseqIsImported(importlib.abc.MetaPathFinder):
    """Registers behind fairseq's import, so that a command's help need not wait for fairseq."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        """See importlib; None for all modules but fairseq."""
        if name != "fairseq":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if sys.modules.get("fairseq") is not None:
    _register()
else:
    sys.meta_path.insert(0, _WhenFairseqIsImported())
