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
    """Trains the model on segments of text.

    With a decay, the parameters between two steps are an exponential moving average of the trained ones (Polyak
    averaging): it takes the noise of single segments out of the scores, so that a higher rate pays.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        nll_fn: NllFn,
        rate: float,
        length: int,
        sequences: int,
        ema_decay: float | None = None,
    ) -> None:
        """Take the parameters.

        Args:
            parameters: Parameters of the model.
            nll_fn: Losses of the model, as `Transformer.nll`.
            rate: Learning rate of SGD.
            length: Tokens of a sequence; a segment is cut into sequences.
            sequences: Sequences of a step. Of a longer segment the last ones are trained on, and of a shorter one none,
                so that the tensors of all steps have one shape, which is compiled once.
            ema_decay: Share of the average that each step keeps; None: no average.
        """
        self.parameters = list(parameters)
        self.nll_fn = nll_fn
        self.length = length
        self.sequences = sequences
        needed = micro_batch_count(sequences, length, MICRO_BATCH_TOKENS)
        self.micro_batches = next(count for count in range(needed, sequences + 1) if sequences % count == 0)
        self.steps = 0
        self.optimizer = torch.optim.SGD(self.parameters, lr=rate)
        self.ema_decay = ema_decay
        copies = [] if ema_decay is None else self.parameters
        self.trained = [parameter.detach().clone() for parameter in copies]
        self.average = [parameter.detach().clone() for parameter in copies]

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
        if self.ema_decay is not None:
            self._set_parameters(self.trained)

        def update() -> None:
            clip_gradients(self.parameters, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

        with torch.enable_grad():
            train_step(self.nll_fn, sequences, self.micro_batches, lambda loss, last: loss.backward(), update)
        if self.ema_decay is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.parameters)
                torch._foreach_lerp_(self.average, self.trained, 1 - self.ema_decay)
            self._set_parameters(self.average)

    @torch.no_grad()
    def _set_parameters(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self.parameters, values)
