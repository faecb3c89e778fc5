"""Compile every graph before the clock runs, on weights that are put back afterwards."""

import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from trainer.evaluation.metric import BitsPerByte
from trainer.lightning_module import LanguageModel
from trainer.step import clip_gradients, train_step


class CompileWarmup(pl.Callback):
    """A few steps on a throw-away optimizer; `global_step` and the data position never move."""

    def __init__(self, steps: int = 5) -> None:
        """Warm up when the model is compiled.

        Args:
            steps: Training steps that are made and undone; 0 compiles during training, inside the clock.
        """
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run forward, backward, update and a validation batch, then restore the weights."""
        assert isinstance(pl_module, LanguageModel)
        if not pl_module.is_compiled or self.steps < 1:
            return
        started = time.monotonic()
        model = pl_module.model
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = pl_module.configure_optimizers()
        loader = trainer.train_dataloader
        assert loader is not None
        tokens = loader.dataset[trainer.global_step].to(pl_module.device)
        length = pl_module.sequence_length
        slices = pl_module.micro_batches((len(tokens) - 1) // length, length)

        def backward(loss: Tensor, last: bool) -> None:
            loss.backward()

        def update() -> None:
            clip_gradients(model.parameters(), pl_module.optimizer_config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()

        with trainer.precision_plugin.forward_context():
            for _ in range(self.steps):
                train_step(pl_module.nll, tokens, length, slices, backward, update)
            if trainer.limit_val_batches != 0:
                model.eval()
                scorer = trainer.datamodule.scorers(pl_module.device)[0]  # type: ignore[attr-defined]
                batch = trainer.datamodule.val_dataloader()[0].dataset[0]  # type: ignore[attr-defined]
                scorer.add(BitsPerByte().to(pl_module.device), pl_module.nll, batch)
                model.train()
        model.load_state_dict(saved)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        rank_zero_info(f"compiled and warmed up in {time.monotonic() - started:.1f} s (outside the training clock)")
