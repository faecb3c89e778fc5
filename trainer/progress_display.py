"""One progress display, for training and for preparing text: a bar in a terminal, lines elsewhere, JSON, or nothing.

While a display is open, it also decides how messages of the logger reach the console.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from typing_extensions import override

from trainer.logging import WARNING, console, logger

Mode = Literal["auto", "bar", "lines", "json", "quiet"]


@dataclass(frozen=True)
class TrainingStatus:
    """How far a run is.

    Attributes:
        step: Steps done.
        seconds: Training time used.
        budget: Training time allowed, or None.
        left: Seconds of training left, as far as is known.
        loss: Nats per token of the newest step that the device has finished.
        bpb: The same in bits per byte, by the tokens per byte of the validation text.
        lr_multiplier: Share of the full learning rate.
        tokens_per_second: Speed since the last status.
        mfu: Model FLOPs utilization, where the peak of the device is known.
        memory_gib: Peak GPU memory so far.
    """

    step: int
    seconds: float
    budget: float | None
    left: float | None
    loss: float
    bpb: float
    lr_multiplier: float
    tokens_per_second: float
    mfu: float | None
    memory_gib: float | None

    @property
    def fraction(self) -> float:
        """Share of the training that is done, 0 to 1; 0 if it has no end."""
        return self.seconds / (self.seconds + self.left) if self.left is not None and self.seconds > 0 else 0.0

    def fields(self) -> list[str]:
        """The status as text, one field each."""
        fields = [
            f"step {self.step:>6,}",
            f"{self.seconds:6.1f}{f'/{self.budget:,.0f}' if self.budget is not None else ''} s",
            f"loss {self.loss:.4f}",
            f"bpb {self.bpb:.4f}",
            f"lr x{self.lr_multiplier:.3f}",
            f"{self.tokens_per_second:>9,.0f} tok/s",
        ]
        fields += [f"MFU {100 * self.mfu:.0f} %"] if self.mfu is not None else []
        fields += [f"{self.memory_gib:.1f} GiB"] if self.memory_gib is not None else []
        return fields


class ProgressDisplay:
    """Shows nothing but warnings: the mode `quiet`, and the base of the other modes."""

    every_seconds = float("inf")

    def open(self) -> None:
        """Start to show; messages of the logger now go through `write`."""
        console.write = self.write

    def write(self, text: str, level: int) -> None:
        """Show a message of the logger: here only warnings."""
        if level >= WARNING:
            console.print(text)

    def show(self, status: TrainingStatus) -> None:
        """Show how far the training is."""

    def update_task(self, name: str, done: float, total: float) -> None:
        """Show how far some other work is, such as a validation or the export."""

    def close(self) -> None:
        """Show nothing more; messages are printed as they come."""
        console.write = console.print


class Lines(ProgressDisplay):
    """A line every few seconds."""

    def __init__(self, every_seconds: float) -> None:
        self.every_seconds = every_seconds
        self._task = ""
        self._shown = 0.0

    @override
    def write(self, text: str, level: int) -> None:
        console.print(text)

    @override
    def show(self, status: TrainingStatus) -> None:
        logger.info("  ".join(status.fields()))

    @override
    def update_task(self, name: str, done: float, total: float) -> None:
        """Show a line only where the task takes longer than the time between two lines."""
        now = time.monotonic()
        if name != self._task:
            self._task, self._shown = name, now
        if now - self._shown >= self.every_seconds:
            self._shown = now
            self._show_task(name, done, total)
        if done >= total:  # the next one of this name has a time of its own
            self._task = ""

    def _show_task(self, name: str, done: float, total: float) -> None:
        logger.info(f"{name} {100 * done / total:.0f} %")


class JsonLines(Lines):
    """An object per line, for programs."""

    @override
    def write(self, text: str, level: int) -> None:
        console.print(text if text.startswith("{") else json.dumps({"note": text}))

    @override
    def show(self, status: TrainingStatus) -> None:
        logger.info(json.dumps(asdict(status)))

    @override
    def _show_task(self, name: str, done: float, total: float) -> None:
        logger.info(json.dumps({"task": name, "done": done, "total": total}))


class Bar(ProgressDisplay):
    """A bar at the foot of a terminal; messages scroll above it."""

    def __init__(self, every_seconds: float) -> None:
        self.every_seconds = min(every_seconds, 0.5)
        terminal = Console()
        self._bar_column = BarColumn(10)
        columns = (
            self._bar_column,
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=terminal, transient=True)
        self._training: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._log_every, self._logged = every_seconds, 0.0

    @override
    def open(self) -> None:
        super().open()
        self._bar.start()

    @override
    def write(self, text: str, level: int) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @override
    def show(self, status: TrainingStatus) -> None:
        step, seconds, loss, bpb, lr, speed, *others = status.fields()
        left = [f"{status.left:,.0f} s left"] if status.left is not None else []
        fields = [step, *left, loss, bpb, speed, seconds, lr, *others]  # the last ones go if there is no room
        width = self._bar.console.width  # of the terminal as it is now
        self._bar_column.bar_width = 24 if width >= 120 else 10
        while len(fields) > 1 and len("  ".join(fields)) > width - self._bar_column.bar_width - 9:
            fields.pop()
        text = "  ".join(fields)
        if self._training is None:
            self._training = self._bar.add_task(text, total=1.0)
        self._bar.update(self._training, completed=status.fraction, description=text)
        if status.seconds - self._logged >= self._log_every:
            self._logged = status.seconds
            logger.info("  ".join(status.fields()), extra={"only_file": True})

    @override
    def update_task(self, name: str, done: float, total: float) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(name))

    @override
    def close(self) -> None:
        self._bar.stop()
        super().close()


def open_display(mode: Mode, every_seconds: float) -> ProgressDisplay:
    """Open the display of a mode; auto is the bar if standard output is a terminal, and lines elsewhere.

    While the console shows only warnings, every display is quiet.
    """
    display: ProgressDisplay
    if mode == "quiet" or console.level >= WARNING:
        display = ProgressDisplay()
    elif mode == "bar" or (mode == "auto" and sys.stdout.isatty()):
        display = Bar(every_seconds)
    else:
        display = JsonLines(every_seconds) if mode == "json" else Lines(every_seconds)
    display.open()
    return display
