"""Ways of showing how far a run is: a bar in a terminal, plain lines elsewhere, JSON for programs, or nothing."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

Mode = Literal["auto", "bar", "lines", "json", "quiet"]


@dataclass(frozen=True)
class Facts:
    """Where a run is.

    Attributes:
        step: Steps done.
        seconds: Training time used.
        budget: Training time allowed, or None.
        left: Seconds of training that are left, as far as is known.
        loss: Nats a token of the newest step that the device has done.
        bpb: The same in bits per byte, by the validation text's tokens per byte.
        lr_multiplier: Share of the full learning rate.
        tokens_per_second: Since the last time.
        utilisation: Share of the card's peak arithmetic, where the peak is known.
        memory_gib: Most GPU memory used so far, on a GPU.
    """

    step: int
    seconds: float
    budget: float | None
    left: float | None
    loss: float
    bpb: float
    lr_multiplier: float
    tokens_per_second: float
    utilisation: float | None
    memory_gib: float | None

    @property
    def share(self) -> float:
        """Share of the training that is done, 0 to 1; 0 if it has no end."""
        return self.seconds / (self.seconds + self.left) if self.left is not None and self.seconds > 0 else 0.0

    def words(self) -> list[str]:
        """In words, for lines and for the bar."""
        words = [
            f"step {self.step:>6,}",
            f"{self.seconds:6.1f}{f'/{self.budget:,.0f}' if self.budget is not None else ''} s",
            f"loss {self.loss:.4f}",
            f"bpb {self.bpb:.4f}",
            f"rate x{self.lr_multiplier:.3f}",
            f"{self.tokens_per_second:>9,.0f} tokens/s",
        ]
        words += [f"{100 * self.utilisation:.0f} % of peak"] if self.utilisation is not None else []
        words += [f"{self.memory_gib:.1f} GiB"] if self.memory_gib is not None else []
        return words


class View(Protocol):
    """Shows facts and notes."""

    every_seconds: float

    def show(self, facts: Facts) -> None:
        """Show where the run is."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def part(self, name: str, done: int, total: int) -> None:
        """Show how far a part of the run beside training is, such as a validation."""

    def close(self) -> None:
        """Show no more."""


class Quiet:
    """Nothing but errors and the summary at the end."""

    every_seconds = float("inf")

    def show(self, facts: Facts) -> None:
        """See View."""

    def note(self, text: str) -> None:
        """See View."""

    def part(self, name: str, done: int, total: int) -> None:
        """See View."""

    def close(self) -> None:
        """See View."""


class Lines(Quiet):
    """A line every few seconds."""

    def __init__(self, every_seconds: float) -> None:
        self.every_seconds = every_seconds
        self._part = ""
        self._shown = 0.0

    def part(self, name: str, done: int, total: int) -> None:
        """See View; a line only where a part takes longer than the time between two lines."""
        now = time.monotonic()
        if name != self._part:
            self._part, self._shown = name, now
        if now - self._shown >= self.every_seconds:
            self._shown = now
            self._print_part(name, done, total)

    def _print_part(self, name: str, done: int, total: int) -> None:
        print(f"{name} {100 * done / total:.0f} %", flush=True)

    def show(self, facts: Facts) -> None:
        """See View."""
        print("  ".join(facts.words()), flush=True)

    def note(self, text: str) -> None:
        """See View."""
        print(text, flush=True)


class JsonLines(Lines):
    """The same as an object a line."""

    def show(self, facts: Facts) -> None:
        """See View."""
        print(json.dumps(asdict(facts)), flush=True)

    def note(self, text: str) -> None:
        """See View."""
        print(json.dumps({"note": text}), flush=True)

    def _print_part(self, name: str, done: int, total: int) -> None:
        print(json.dumps({"part": name, "done": done, "total": total}), flush=True)


class Bar(Quiet):
    """A bar at the foot of a terminal; notes scroll above it, and the run's log gets lines as without it."""

    def __init__(self, every_seconds: float, console: Console) -> None:
        self.every_seconds = min(every_seconds, 0.5)
        self._log_every = every_seconds
        self._logged = 0.0
        is_wide = console.width >= 120
        self._room = console.width - (24 if is_wide else 10) - 9  # for words
        columns = (
            BarColumn(24 if is_wide else 10),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=console, redirect_stdout=False, transient=True)
        self._task: TaskID | None = None
        self._parts: dict[str, TaskID] = {}
        self._bar.start()

    def show(self, facts: Facts) -> None:
        """See View."""
        step, seconds, loss, bpb, rate, speed, *others = facts.words()
        left = [f"{facts.left:,.0f} s left"] if facts.left is not None else []
        words = [
            step,
            *left,
            bpb,
            speed,
            loss,
            seconds,
            rate,
            *others,
        ]  # what matters most comes first: the rest may go
        while len(words) > 1 and len("  ".join(words)) > self._room:
            words.pop()
        text = "  ".join(words)
        if self._task is None:
            self._task = self._bar.add_task(text, total=1.0)
        self._bar.update(self._task, completed=facts.share, description=text)
        if facts.seconds - self._logged >= self._log_every:
            self._logged = facts.seconds
            _log_only("  ".join(facts.words()))

    def note(self, text: str) -> None:
        """See View."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        _log_only(text)

    def part(self, name: str, done: int, total: int) -> None:
        """See View."""
        if name not in self._parts:
            self._parts[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._parts[name], completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._parts.pop(name))

    def close(self) -> None:
        """See View."""
        self._bar.stop()


def make_view(mode: Mode, every_seconds: float) -> View:
    """The view of a mode; auto is the bar if standard output is a terminal."""
    terminal = getattr(sys.stdout, "terminal", sys.stdout)
    if mode == "bar" or (mode == "auto" and terminal.isatty()):
        return Bar(every_seconds, Console(file=terminal))
    if mode == "quiet":
        return Quiet()
    return JsonLines(every_seconds) if mode == "json" else Lines(every_seconds)


def _log_only(text: str) -> None:
    log = getattr(sys.stdout, "log", None)  # of trainer.run_log, while a run is logged
    if log is not None:
        log.write(text + "\n")
        log.flush()
