"""The plan of an evaluation: its windows, and which of their targets are scored."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import UserError

MAX_RATE = 100  # the gradient is clipped to norm 1, so that this ruins any model


@dataclass(frozen=True)
class EvaluationConfig:
    """How validation text is scored.

    Args:
        window: Tokens that the model reads at once (at least 1).
        stride: New targets that each window after the first scores (sliding-window evaluation, at least 1, at most the
            window). null: every window is scored whole (plain evaluation).
        batch_windows: Windows per batch (at least 1).
        fit_tokens: Validation tokens that each validation during training scores, in plain evaluation (at least 1);
            null: all.
        every_seconds: Seconds of training between validations, in addition to trainer.val_check_interval (above 0).
            null: only by that.
        max_tokens: Validation tokens that `validate` and the end of a run score (at least 1); null: all.
        attention_window: Tokens that each position attends to, itself included (at least 1); null: its whole window. It
            allows windows longer than the training sequences, so that the text is read about once (streaming
            evaluation): with window 8192, stride 6144 and attention_window 2048, every token has at least the context
            of window 2048 with stride 64, for a 24th of the tokens that pass through the model.
        adapt_rate: Learning rate of score-first test-time training: in its last evaluation, `validate` trains between
            two batches of windows, on the targets that it has just scored (above 0, at most 100). null: no training.
        adapt_ema_decay: Score with an exponential moving average of the weights that adapt_rate trains, and take it
            after each step with this decay (0 to 1). null: with the weights of the last step.
        canonical: Give zero probability to tokens that the tokenizer never produces after the preceding token, in every
            score (Vieira et al. 2025, for BPE tokenizers).
    """

    window: int = 2048
    stride: int | None = 64
    batch_windows: int = 64
    fit_tokens: int | None = 1_048_576
    every_seconds: float | None = None
    max_tokens: int | None = None
    attention_window: int | None = None
    adapt_rate: float | None = None
    adapt_ema_decay: float | None = None
    canonical: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "stride", "batch_windows", "fit_tokens", "max_tokens", "attention_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                or_null = "" if name in ("window", "batch_windows") else ", or null"
                raise ValueError(f"eval.{name} must be at least 1{or_null}, not {value}")
        if self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"eval.stride must be at most eval.window {self.window}, or null (plain evaluation), not {self.stride}"
            )
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise ValueError(f"eval.every_seconds must be above 0, or null, not {self.every_seconds}")
        if self.adapt_rate is not None and not 0 < self.adapt_rate <= MAX_RATE:
            raise ValueError(
                f"eval.adapt_rate must be above 0 and at most {MAX_RATE}, or null for no training, not "
                f"{self.adapt_rate}"
            )
        if self.adapt_ema_decay is not None:
            if not 0 <= self.adapt_ema_decay < 1:
                raise ValueError(
                    f"eval.adapt_ema_decay must be in [0, 1), or null for no average, not {self.adapt_ema_decay}"
                )
            if self.adapt_rate is None:
                raise ValueError("eval.adapt_ema_decay averages the weights that eval.adapt_rate trains; give it too")
        if self.attention_window is not None and (
            self.stride is None or self.stride > self.window - self.attention_window
        ):
            raise ValueError(
                f"eval.attention_window {self.attention_window} and eval.stride {self.stride} together must not exceed "
                f"eval.window {self.window}"
            )

    @property
    def plain(self) -> "EvaluationConfig":
        """The same text in windows of the training length, each scored whole."""
        window = self.attention_window or self.window
        return replace(self, window=window, stride=None, attention_window=None, adapt_rate=None, adapt_ema_decay=None)

    @property
    def description(self) -> str:
        """What determines a score, in the names of the options."""
        names = ["window", "stride", "attention_window", "adapt_rate", "adapt_ema_decay", "canonical"]
        names += ["batch_windows"] if self.adapt_rate else []  # as often as that, it trains
        return ", ".join(f"{name} {value}" for name in names if (value := getattr(self, name)))

    @property
    def is_plain(self) -> bool:
        """Whether every window is scored whole, by the model as it is."""
        return (self.stride is None or self.stride >= self.window) and self.adapt_rate is None


class WindowPlan(NamedTuple):
    """Windows of equal length, from left to right.

    Attributes:
        starts: (n,) int64, first token of each window.
        scored_from: (n,) int64, first position of each window whose target is scored, as are all targets after it.
        window: Tokens of a window.
    """

    starts: Tensor
    scored_from: Tensor
    window: int


class WindowBatch(NamedTuple):
    """Some windows of a plan; logits are needed from position `start_pos` on."""

    starts: Tensor
    scored_from: Tensor
    start_pos: int


def plan_windows(n_targets: int, window: int, stride: int | None) -> WindowPlan:
    """Lay windows over the targets so that each is scored exactly once.

    The first window scores all its targets, each later one its last `stride`. The last window ends at the last
    target and scores what is left, so it is as long as the others. Source: openai/parameter-golf #124, without its
    repeated tail.

    Args:
        n_targets: Number of targets to score.
        window: Tokens of a window; fewer if there are fewer targets.
        stride: New targets of each later window; None or at least the window: the whole window.

    Raises:
        UserError: If there is nothing to score.
    """
    if n_targets < 1:
        raise UserError("there is no validation target to score; the split needs at least two tokens")
    window = min(window, n_targets)
    stride = min(stride or window, window)
    later = -(-(n_targets - window) // stride)  # rounded up
    ends = (window + stride * torch.arange(later + 1)).clamp(max=n_targets)
    scored = torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))  # first target each window scores
    starts = ends - window
    return WindowPlan(starts, scored - starts, window)


def batch_plan(plan: WindowPlan, batch_windows: int, rank: int = 0, world_size: int = 1) -> list[WindowBatch]:
    """Cut a process's contiguous share of a plan into batches of equal size, padded with windows that score nothing.

    Windows that score more than their successors (the first one) have batches of their own, so that all other batches
    compute logits at the last `stride` positions only.
    """
    count = len(plan.starts)
    low, high = rank * count // world_size, (rank + 1) * count // world_size
    starts, scored_from = plan.starts[low:high], plan.scored_from[low:high]
    usual = int(plan.scored_from[1]) if count > 1 else 0
    batch_windows = min(batch_windows, -(-count // world_size))  # no more than any process has
    batches: list[WindowBatch] = []
    for wide in (True, False):
        chosen = (scored_from < usual) == wide
        start_pos = 0 if wide else usual
        selected, scored = starts[chosen], scored_from[chosen]  # once: by batch, a long split takes minutes
        missing = -len(selected) % batch_windows
        selected = torch.cat((selected, selected[-1:].expand(missing))).view(-1, batch_windows)
        scored = torch.cat((scored, torch.full((missing,), plan.window))).view(-1, batch_windows)
        batches += [WindowBatch(*pair, start_pos) for pair in zip(selected, scored, strict=True)]
    return batches
