"""Test-time training that scores first: the model learns a piece of text only after all of its targets were scored.

So every target is still predicted from what comes before it, in one pass, by a distribution that sums to one (as in
openai/parameter-golf #461).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.evaluation.sliding import NllFn
from trainer.step import clip_gradients, train_step

MOMENTUM = 0.9
LARGEST_NORM = 1.0


class Adapter:
    """Learns stretches of the text it is given; changes the model."""

    def __init__(self, parameters: Iterable[Tensor], nll_fn: NllFn, rate: float, length: int) -> None:
        """Begin without momentum.

        Args:
            parameters: Of the model.
            nll_fn: Its losses, as `Transformer.nll`.
            rate: Learning rate of SGD with momentum 0.9.
            length: Tokens of a sequence to learn; a stretch is cut into such.
        """
        self.parameters = list(parameters)
        self.nll_fn = nll_fn
        self.length = length
        self.optimizer = torch.optim.SGD(self.parameters, lr=rate, momentum=MOMENTUM)

    def learn(self, tokens: Tensor) -> None:
        """One step on a stretch.

        Args:
            tokens: (n + 1,), the token before the first target and all targets; what does not fill a sequence is left
                out, unless it is all there is.
        """
        length = min(self.length, len(tokens) - 1)
        sequences = tokens.unfold(0, length + 1, length)

        def update() -> None:
            clip_gradients(self.parameters, LARGEST_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

        with torch.enable_grad():
            train_step(self.nll_fn, sequences, len(sequences), lambda loss, last: loss.backward(), update)
