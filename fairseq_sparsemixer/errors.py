"""The one exception for mistakes that the user can mend."""

import sys
import unicodedata
from types import TracebackType
from typing import Callable, Optional, Type


class UserError(ValueError):
    """A wrong flag, file or environment.

    The message is one sentence that names the flag, file or download and the cure. Command
    lines print it alone, without a traceback. It is one line, whatever it quotes: the line breaks
    of a name, of another error or of a program's output become spaces, and what would change how a
    terminal shows it (control characters, such as ESC, and signs that turn the direction of text)
    is written as escapes.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(line.strip() for line in message.splitlines())
        super().__init__("".join(map(_shown, line)))


def _shown(character: str) -> str:
    """The character, or its escape where it is none to be seen."""
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape").decode()


def end_with_one_line(
    reason: Callable[[BaseException], BaseException] = lambda error: error,
) -> None:
    """Print a :class:`UserError` that ends the program alone, and end with status 2.

    With Python's 1 in one of several processes that train together. Of an error that was raised
    while a UserError was handled, Python prints both.

    Args:
        reason: what is to be told of an error; that itself by default.
    """
    previous = sys.excepthook

    def hook(
        kind: Type[BaseException], error: BaseException, traceback: Optional[TracebackType]
    ) -> None:
        told = reason(error)
        if not isinstance(told, UserError):
            return previous(kind, error, traceback)
        print(f"error: {told}", file=sys.stderr)
        # At a prompt it ends nothing; and torch.distributed's hook prints when this one is done.
        if sys.excepthook is hook and not (hasattr(sys, "ps1") or sys.flags.interactive):
            sys.exit(2)

    sys.excepthook = hook
