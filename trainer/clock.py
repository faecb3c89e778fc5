"""The training clock: seconds spent training, without compile warm-up, validation or export."""

import time
from collections.abc import Callable


class TrainingClock:
    """A stopwatch that can be paused and saved; tests drive it by hand."""

    def __init__(self, budget: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """Make a stopped clock at zero.

        Args:
            budget: Seconds of training allowed, or None.
            now: Returns the time in seconds; must never go back.
        """
        self.budget = budget
        self._now = now
        self._total = 0.0
        self._started: float | None = None
        self.reading = 0.0  # rank 0's time at the end of the last step, the same on all ranks

    @property
    def elapsed(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._started is None else self._now() - self._started
        return self._total + running

    def start(self) -> None:
        """Start counting; no effect on a running clock."""
        if self._started is None:
            self._started = self._now()

    def pause(self) -> None:
        """Stop counting; no effect on a stopped clock."""
        self._total = self.elapsed
        self._started = None

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a saved reading; the clock is stopped."""
        self._total = self.reading = state["elapsed"]
        self._started = None
