"""Learning-rate multiplier and Muon momentum, as pure functions of step and clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """When the learning rates fall and the momentum rises.

    Args:
        warmdown_steps: Steps of the linear warmdown to zero at the end (at least 0); under a time budget, the time that
            this many average steps take.
        warmdown_frac: Length of the warmdown as a fraction of the budget, in seconds or steps (0 to 1). Right for short
            budgets, where a fixed number of steps may be the whole run. null: warmdown_steps counts.
        momentum_warmup_start: Muon's momentum at step 0 (0 to 1).
        momentum_warmup_steps: Steps until the momentum reaches its full value (at least 0).
    """

    warmdown_steps: int = 3000
    warmdown_frac: float | None = None
    momentum_warmup_start: float = 0.92
    momentum_warmup_steps: int = 1500

    def __post_init__(self) -> None:
        if self.warmdown_steps < 0 or self.momentum_warmup_steps < 0:
            raise ValueError(
                "model.schedule.warmdown_steps and model.schedule.momentum_warmup_steps must be at least 0, not "
                f"{self.warmdown_steps} and {self.momentum_warmup_steps}"
            )
        if self.warmdown_frac is not None and not 0 <= self.warmdown_frac <= 1:
            raise ValueError(f"model.schedule.warmdown_frac must be between 0 and 1, not {self.warmdown_frac}")
        if not 0 <= self.momentum_warmup_start < 1:
            raise ValueError(
                f"model.schedule.momentum_warmup_start must be in [0, 1), not {self.momentum_warmup_start}"
            )


def lr_multiplier(
    schedule: ScheduleConfig, step: int, max_steps: int | None, elapsed: float, budget: float | None
) -> float:
    """Share of the full learning rate for the next step.

    The smaller of what the step limit and the time budget ask for; the published schedule ignored the step limit
    whenever a budget was set, so a fast card ended undecayed.

    Args:
        schedule: Lengths of warmdown and warm-up.
        step: Steps done.
        max_steps: Step limit, or None.
        elapsed: Seconds of training done.
        budget: Seconds of training allowed, or None.

    Returns:
        0 to 1.
    """
    multiplier = 1.0
    if max_steps is not None:
        warmdown = schedule.warmdown_steps if schedule.warmdown_frac is None else schedule.warmdown_frac * max_steps
        multiplier = min(multiplier, _linear(max_steps - step, warmdown))
    if budget is not None and step > 0:
        seconds = elapsed / step * schedule.warmdown_steps
        warmdown = seconds if schedule.warmdown_frac is None else schedule.warmdown_frac * budget
        multiplier = min(multiplier, _linear(budget - elapsed, warmdown))
    return multiplier


def warmdown_warning(warmdown_steps: int, warmdown_frac: float | None, steps: int) -> str | None:
    """Say that a run of so many steps never has its full learning rate; None if it has."""
    if warmdown_frac is not None or warmdown_steps <= steps:
        return None
    return (
        f"the learning rate falls from the first of {steps:,} steps on, since model.schedule.warmdown_steps is "
        f"{warmdown_steps:,}; model.schedule.warmdown_frac 0.5 would be half the run"
    )


def _linear(remaining: float, warmdown: float) -> float:
    if remaining >= warmdown:
        return 1.0
    return max(remaining, 0.0) / warmdown


def muon_momentum(schedule: ScheduleConfig, step: int, momentum: float) -> float:
    """Momentum for the next step: a linear rise to `momentum`."""
    if step >= schedule.momentum_warmup_steps:
        return momentum
    share = step / schedule.momentum_warmup_steps
    return (1 - share) * schedule.momentum_warmup_start + share * momentum
