"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A wrong flag, file or environment.

    The message is one sentence that names the flag, file or download and the cure. Command
    lines print it alone, without a traceback.
    """
