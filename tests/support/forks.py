"""What commands that run in a fork of a test's process have in common."""

import sys


def status_of(call, hook=None):
    """The exit status of a program that is this call; what it raises is printed.

    Args:
        call: returns its status, or None for 0.
        hook: prints an exception, in place of sys.excepthook.
    """
    try:
        try:
            return call() or 0
        except SystemExit:
            raise
        except BaseException as error:
            (hook or sys.excepthook)(type(error), error, error.__traceback__)
            return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def stream(number):
    """stdin, stdout or stderr of a fork that has new ones."""
    errors = "backslashreplace" if number == 2 else "strict"
    return open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)
