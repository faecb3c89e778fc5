"""Shows what the model writes while it is trained."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from trainer.data.tokenizer import load_tokenizer
from trainer.datamodule import data_of
from trainer.generation import SamplingConfig, continue_text
from trainer.lightning_module import LanguageModel
from trainer.logging import logger
from trainer.model.transformer import Transformer


class Samples(pl.Callback):
    """Logs a short text at each validation."""

    def __init__(self, tokens: int | None = None, prompt: str = "The") -> None:
        """Generate a sample.

        Args:
            tokens: Length of the sample that is logged at each validation, in tokens (at least 1). null: none.
            prompt: Text that the sample continues.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"samples.tokens must be at least 1, or null for no samples, not {tokens}")
        self.tokens = tokens
        self.prompt = prompt

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Generate with a copy of the weights: nothing of the training changes, and nothing is compiled."""
        if self.tokens is None or trainer.state.fn != "fit":
            return
        pl_module.clock.pause()  # the clock's own callback comes before this one
        with torch.random.fork_rng(devices=[]):  # making a model draws numbers
            model = Transformer(pl_module.model.config).to(pl_module.device).eval()
        model.load_state_dict(pl_module.model.state_dict())
        model.is_looped = pl_module.model.is_looped
        tokenizer = load_tokenizer(data_of(trainer).text.tokenizer)
        text = "".join(continue_text(model, tokenizer, self.prompt, SamplingConfig(self.tokens)))
        logger.info(f"step {trainer.global_step:>6,}  sample {' '.join((self.prompt + text).split())}")
        pl_module.clock.start()
