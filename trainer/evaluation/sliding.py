"""Scores windows of validation tokens that stay on the device; fit, validate and export all use it."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.data.tokenizer import ByteTable
from trainer.evaluation.metric import BitsPerByte, Score
from trainer.evaluation.per_document import DocumentScores
from trainer.evaluation.windows import EvaluationConfig, WindowBatch, batch_plan, plan_windows
from trainer.step import StepFence

NllFn = Callable[..., Tensor]  # the arguments of `Transformer.nll`


class WindowScorer:
    """Holds validation tokens on a device and scores batches of windows of them."""

    def __init__(self, tokens: Tensor, table: ByteTable, window: int, excluded: Tensor | None = None) -> None:
        """Hold the tokens.

        Args:
            tokens: (n + 1,) int32 on the device that scores: n targets and the token before the first.
            table: UTF-8 bytes of each token.
            window: Tokens of every window.
            excluded: (V, V) bool of `excluded_pairs`, which get no probability.
        """
        self.tokens = tokens
        self.excluded = None if excluded is None else excluded.to(tokens.device)
        self.table = table.to(tokens.device)
        self.offsets = torch.arange(min(window, len(tokens) - 1), device=tokens.device)

    def scored(self, batch: WindowBatch) -> Tensor:
        """The token before the first target that a batch scores, and its targets."""
        counts = len(self.offsets) - batch.scored_from
        first = int(batch.starts[0] + batch.scored_from[0])
        return self.tokens[first : first + int(counts.sum()) + 1]

    @torch.no_grad()
    def add(
        self, metric: BitsPerByte, nll_fn: NllFn, batch: WindowBatch, documents: DocumentScores | None = None
    ) -> None:
        """Score a batch into a metric; nothing waits for the device.

        Args:
            metric: Accumulates the sums.
            nll_fn: Losses of (B, T) inputs and targets from a first position on, without excluded pairs, as
                `Transformer.nll`.
            batch: Windows to score.
            documents: Accumulates the sums of each document, too.
        """
        device = self.tokens.device
        starts = batch.starts.to(device, non_blocking=True)
        scored_from = batch.scored_from.to(device, non_blocking=True)
        positions = starts[:, None] + self.offsets  # (B, T)
        inputs, targets = self.tokens[positions], self.tokens[positions + 1]
        nll = nll_fn(inputs, targets, batch.start_pos, self.excluded)
        num_bytes = self.table.count(inputs[:, batch.start_pos :], targets[:, batch.start_pos :])
        scored = self.offsets[batch.start_pos :] >= scored_from[:, None]
        metric.update(nll, num_bytes, scored)
        if documents is not None:
            documents.update(positions[:, batch.start_pos :], nll, num_bytes, scored)


def score(
    nll_fn: NllFn,
    tokens: Tensor,
    table: ByteTable,
    evaluation: EvaluationConfig,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    excluded: Tensor | None = None,
) -> Score:
    """Score tokens; several processes share the windows.

    Args:
        nll_fn: As `Transformer.nll`.
        tokens: (n + 1,) int32 on the device that scores.
        table: UTF-8 bytes of each token.
        evaluation: Window, stride and batch; `max_tokens` limits the targets.
        rank: Number of this process.
        world_size: Number of processes, all of which call this.
        progress: Called with the number of batches that the device has completed, and the number of all batches.
        excluded: (V, V) bool of `excluded_pairs`, which get no probability.
    """
    tokens = tokens[: evaluation.max_tokens + 1] if evaluation.max_tokens else tokens
    plan = plan_windows(len(tokens) - 1, evaluation.window, evaluation.stride)
    scorer = WindowScorer(tokens, table, plan.window, excluded)
    metric = BitsPerByte().to(tokens.device)
    batches = batch_plan(plan, evaluation.batch_windows, rank, world_size)
    fence = StepFence(tokens.device)
    for index, batch in enumerate(batches):
        scorer.add(metric, nll_fn, batch)
        for done, _ in fence.record(index + 1, metric.tokens):
            progress(done, len(batches))
    for done, _ in fence.drain():
        progress(done, len(batches))
    return metric.score()
