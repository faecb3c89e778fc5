"""The plan of an evaluation: which windows are read and which of their targets are scored."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import UserError


@dataclass(frozen=True)
class EvaluationConfig:
    """How validation text is scored.

    Args:
        window: Tokens the model sees at once.
        stride: Targets that each window after the first adds (sliding window); 0, or at least the window, scores every
            window whole (plain evaluation).
        batch_windows: Windows a batch.
        fit_tokens: Validation tokens scored (plain) at each check during training; 0 takes all.
        max_tokens: Validation tokens scored at the end and by `validate`; 0 takes all.
        band: Tokens that a position looks back at; 0: its whole window. With it a window can be longer than the
            training sequences, and a text is read about once (streaming evaluation): with window 8192, stride 6144 and
            band 2048 every token looks back at no fewer than with window 2048 and stride 64, for a 24th of the tokens
            that go through the model.
        adapt_rate: Of `validate`, in the last evaluation it makes: after each batch of windows is scored, learn the
            text of its targets with this learning rate (score-first test-time training); 0: learn nothing.
    """

    window: int = 2048
    stride: int = 64
    batch_windows: int = 64
    fit_tokens: int = 1_048_576
    max_tokens: int = 0
    band: int = 0
    adapt_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.batch_windows < 1 or min(self.stride, self.fit_tokens, self.max_tokens) < 0:
            raise ValueError("eval: window and batch_windows must be at least 1, the others at least 0")
        if self.adapt_rate < 0:
            raise ValueError(f"eval.adapt_rate must be at least 0, not {self.adapt_rate}")
        if self.band < 0 or (self.band and not 0 < self.stride <= self.window - self.band):
            raise ValueError(
                f"eval.band {self.band} and eval.stride {self.stride}, at least 1, must fit into eval.window "
                f"{self.window}"
            )

    @property
    def plain(self) -> "EvaluationConfig":
        """The same text in windows of the training length, each scored whole."""
        return replace(self, window=self.band or self.window, stride=0, band=0, adapt_rate=0.0)

    @property
    def is_plain(self) -> bool:
        """Whether every window is scored whole."""
        return self.stride == 0 or self.stride >= self.window


class WindowPlan(NamedTuple):
    """Windows of one length, read from left to right.

    Attributes:
        starts: (n,) int64, first token of each window.
        scored_from: (n,) int64, first position in it whose target is scored; all after it are too.
        window: Their length.
    """

    starts: Tensor
    scored_from: Tensor
    window: int


class WindowBatch(NamedTuple):
    """Some windows of a plan; logits are needed from position `first` on."""

    starts: Tensor
    scored_from: Tensor
    first: int


def plan_windows(n_targets: int, window: int, stride: int) -> WindowPlan:
    """Lay windows over the targets so that each is scored exactly once.

    The first window scores all its targets, each later one its last `stride`. The last window ends at the last
    target and scores what is left, so it is as long as the others. Source: openai/parameter-golf #124, without its
    repeated tail.

    Args:
        n_targets: Targets to score.
        window: Tokens a window; fewer if there are fewer targets.
        stride: Targets each later window adds; 0 or at least the window means the whole window.

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
    """Cut a rank's contiguous share of a plan into batches of one size, padded with windows that score nothing.

    Windows that score more than their successors (the first one) have batches of their own, so that all other batches
    compute logits at the last `stride` positions only.
    """
    count = len(plan.starts)
    low, high = rank * count // world_size, (rank + 1) * count // world_size
    starts, scored_from = plan.starts[low:high], plan.scored_from[low:high]
    usual = int(plan.scored_from[1]) if count > 1 else 0
    batch_windows = min(batch_windows, -(-count // world_size))  # not more than any rank has
    batches: list[WindowBatch] = []
    for wide in (True, False):
        chosen = (scored_from < usual) == wide
        first = 0 if wide else usual
        some, scored = starts[chosen], scored_from[chosen]  # once: by batch, a long split takes minutes
        missing = -len(some) % batch_windows
        some = torch.cat((some, some[-1:].expand(missing))).view(-1, batch_windows)
        scored = torch.cat((scored, torch.full((missing,), plan.window))).view(-1, batch_windows)
        batches += [WindowBatch(*pair, first) for pair in zip(some, scored, strict=True)]
    return batches
