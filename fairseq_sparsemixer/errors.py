"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A wrong flag, file or environment.

    The message is one sentence that names the flag, file or download and the cure. Command
    lines print it alone, without a traceback. It is one line, whatever it quotes: the line breaks
    of a name, of another error or of a program's output become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
