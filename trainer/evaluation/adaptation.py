"""Score-first test-time training: the model trains on a segment of text only after all of its targets were scored.

Every target is still predicted from the text before it, in one pass, by a distribution that sums to one (as in
openai/parameter-golf #461).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.evaluation.sliding import NllFn
from trainer.step import clip_gradients, micro_batch_count, train_step

MAX_NORM = 1.0
MICRO_BATCH_TOKENS = 8192  # whose gradients are computed at once, to bound memory


class Adapter:
    """Trains the model on segments of text."""

    def __init__(self, parameters: Iterable[Tensor], nll_fn: NllFn, rate: float, length: int, sequences: int) -> None:
        """Take the parameters.

        Args:
            parameters: Parameters of the model.
            nll_fn: Losses of the model, as `Transformer.nll`.
            rate: Learning rate of SGD.
            length: Tokens of a sequence; a segment is cut into sequences.
            sequences: Sequences of a step. Of a longer segment the last ones are trained on, and of a shorter one none,
                so that the tensors of all steps have one shape, which is compiled once.
        """
        self.parameters = list(parameters)
        self.nll_fn = nll_fn
        self.length = length
        self.sequences = sequences
        needed = micro_batch_count(sequences, length, MICRO_BATCH_TOKENS)
        self.micro_batches = next(count for count in range(needed, sequences + 1) if sequences % count == 0)
        self.steps = 0
        self.optimizer = torch.optim.SGD(self.parameters, lr=rate)

    def learn(self, tokens: Tensor) -> None:
        """Take one step on a segment, unless it is too short.

        Args:
            tokens: (n + 1,), the token before the first target and all targets. An incomplete last sequence is left
                out.
        """
        if (len(tokens) - 1) // self.length < self.sequences:
            return
        sequences = tokens.unfold(0, self.length + 1, self.length)[-self.sequences :]
        self.steps += 1

        def update() -> None:
            clip_gradients(self.parameters, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

        with torch.enable_grad():
            train_step(self.nll_fn, sequences, self.micro_batches, lambda loss, last: loss.backward(), update)
