"""Learning-rate multiplier and Muon momentum, as pure functions of step and clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """When the learning rates fall.

    Args:
        warmdown_steps: Steps of the linear fall to zero at the end; under a time budget, that many mean steps.
        warmdown_frac: Fall over this fraction of the budget (seconds and steps) instead; right for short budgets,
            where a fixed number of steps may be the whole run.
        floor: Share of the full rates that the fall ends at.
        momentum_warmup_start: Muon's momentum at step 0.
        momentum_warmup_steps: Steps until it reaches its full value.
    """

    warmdown_steps: int = 3000
    warmdown_frac: float | None = None
    floor: float = 0.0
    momentum_warmup_start: float = 0.92
    momentum_warmup_steps: int = 1500

    def __post_init__(self) -> None:
        if self.warmdown_steps < 0 or self.momentum_warmup_steps < 0:
            raise ValueError("schedule: numbers of steps must not be negative")
        if self.warmdown_frac is not None and not 0 <= self.warmdown_frac <= 1:
            raise ValueError(f"schedule.warmdown_frac must lie between 0 and 1, not {self.warmdown_frac}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"schedule.floor must lie between 0 and 1, not {self.floor}")


def lr_multiplier(
    schedule: ScheduleConfig, step: int, max_steps: int | None, elapsed: float, budget: float | None
) -> float:
    """Share of the full learning rate for the next step.

    The smaller of what the step limit and the time budget ask for; the published schedule ignored the step limit
    whenever a budget was set, so a fast card ended undecayed.

    Args:
        schedule: Its settings.
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
    return schedule.floor + (1 - schedule.floor) * multiplier if schedule.floor else multiplier


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
