"""One logger for a run: what it says goes to the console and to `train.log`; what libraries repeat does not."""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from trainer.rank import rank

# Advertisements, device tables and advice that does not apply here; the progress display shows what runs where.
LIBRARY_MESSAGES = re.compile(
    r"💡|GPU available|TPU available|HPU available|`Trainer|`weights_only` was not set|Using bfloat16 Auto|"
    r"Using 16bit Auto|You are using a CUDA device|LOCAL_RANK|An \w+ was raised with message|"
    r"(\[rank: \d+\] )?Seed set to"
)
LIBRARY_WARNINGS = (
    # One loader without workers is right here: a batch of windows is a few numbers.
    r"The '\w+_dataloader' does not have many workers",
    # The position in the data is a function of the step, so a checkpoint in mid-epoch is exact.
    r"You're resuming from a checkpoint that ended before the epoch ended",
    # Lightning calls a torch function that was renamed.
    r".*isinstance\(treespec, LeafSpec\)",
    # A run of a few steps has no rows of metrics.csv; the report says so.
    r"The number of training batches",
    # The folder is the run's own and holds nothing but its log.
    r"Experiment logs directory",
    # Validation scores the whole split, so there is no batch size to infer.
    r"Trying to infer the `batch_size`",
    # The metric has summed over all processes before it is logged.
    r"It is recommended to use `self.log\(.*sync_dist=True",
    # Lightning sets up DDP on a stream of its own.
    r"The AccumulateGrad node's stream does not match",
    # On a login node: how to run under SLURM is in docs/multi-gpu.md.
    r"The `srun` command is available on your system",
    # flash-attn-4 passes itself an argument that its compiler dislikes.
    r"Argument \w+ \(position \d+\) cannot be converted to a JitArgument",
)


class Console(logging.Handler):
    """Writes messages to standard output, or wherever the progress display that is active wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Callable[[str, int], None] = self.print
        self.addFilter(lambda record: rank() == 0 and not getattr(record, "only_file", False))
        self.setFormatter(_Formatter())

    @staticmethod
    def print(text: str, level: int = logging.INFO) -> None:
        """Print a line at once, whatever its level."""
        print(text, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        self.write(self.format(record), record.levelno)


class _Lossy(io.TextIOBase):
    """A stream of text that writes nowhere once its own reader or its disk is gone, instead of ending the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except OSError:
            # The text that is left in the stream's buffer must go somewhere, too, when Python ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return None


@contextlib.contextmanager
def running_without_output() -> Iterator[None]:
    """Let output that cannot be written be lost: a closed terminal, a full disk, `trainer fit | head`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lossy(sys.stdout), _Lossy(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _LogFile(logging.FileHandler):
    """The file that messages are copied to; where it cannot be written, the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the message."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 shard, 2 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


WARNING = logging.WARNING
logger = logging.getLogger("trainer")
logger.setLevel(logging.INFO)
logger.propagate = False
console = Console()
logger.addHandler(console)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not LIBRARY_MESSAGES.match(record.getMessage())


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; each filter is as narrow as its message."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for each in (name, f"{name}.utilities.rank_zero", f"{name}.utilities.seed", f"{name}.accelerators.cuda"):
            logging.getLogger(each).addFilter(_is_of_use)
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not sys.warnoptions:
        # Lightning itself uses calls that torch and jsonargparse announce to remove.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning|jsonargparse|torch")


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Keep the console free of all messages but warnings while the block runs; files have them all."""
    level = console.level
    console.setLevel(WARNING)
    try:
        yield
    finally:
        console.setLevel(level)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append every message of this project and of Lightning to a file while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_Formatter())
    loggers = [logging.getLogger(name) for name in ("trainer", "lightning.pytorch")]
    for each in loggers:
        each.addHandler(handler)
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(handler)
        handler.close()
