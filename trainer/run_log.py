"""A run's log: what it prints, also in `train.log` of its folder."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class _Both:
    """Writes to the terminal and to a file; everything else is the terminal's."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.terminal = terminal
        self.log = file

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        return self.terminal.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.terminal, name)


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Copy what is printed and logged to a file while the block runs; on rank 0 of a run only.

    Args:
        path: The file; appended to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "py.warnings")]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(_Both(sys.stdout, file)):  # type: ignore[type-var]
                yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
