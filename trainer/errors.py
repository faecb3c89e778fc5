"""The one exception for a user's mistake: printed as a single line, without a traceback."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, the value, and how to mend it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


class OptionError(UserError):
    """An option that cannot be parsed; the message begins with the command.

    Attributes:
        reason: The message without the command.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"{command}: {reason} ({command} --help lists the options)")
        self.reason = reason
