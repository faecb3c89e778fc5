"""Option parsers that answer a mistake in one line, with the option that was probably meant."""

import argparse
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

UNKNOWN = "unrecognized arguments: "


class ShortErrors:
    """Mixed into a parser of argparse or of jsonargparse, which prints a hundred lines of usage first."""

    prog: str
    _option_string_actions: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, what may have been meant and where all options stand; exit code 2."""
        meant = ""
        if message.startswith(UNKNOWN):
            names = [word.partition("=")[0] for word in message.removeprefix(UNKNOWN).split() if word.startswith("-")]
            near = [match for name in names for match in get_close_matches(name, self._option_string_actions, n=1)]
            meant = f"; did you mean {' and '.join(near)}?" if near else ""
        print(f"{self.prog}: {message}{meant} ({self.prog} --help lists the options)", file=sys.stderr)
        raise SystemExit(2)


class Parser(ShortErrors, argparse.ArgumentParser):
    """A command's options."""

    def __init__(self, command: str, description: str, example: str) -> None:
        """Begin without options.

        Args:
            command: Name after `trainer`.
            description: What it does.
            example: Words after `trainer` that show it.
        """
        super().__init__(
            prog=f"trainer {command}",
            description=description,
            epilog=f"example:\n  trainer {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
