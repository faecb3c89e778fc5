"""Before the clock runs: find a micro-batch that fits, compile every graph, and restore the weights."""

import time

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from trainer.datamodule import data_of
from trainer.device import release_memory, synchronize
from trainer.distributed import all_ranks_agree
from trainer.errors import UserError
from trainer.evaluation.metric import BitsPerByte
from trainer.files import atomic_write
from trainer.lightning_module import LanguageModel
from trainer.logging import logger
from trainer.run_folder import RunFolder
from trainer.step import clip_gradients, train_step


class CompileWarmup(pl.Callback):
    """A few steps with a temporary optimizer; `global_step` and the position in the data do not move."""

    def __init__(self, steps: int | None = 5) -> None:
        """Warm up on a GPU, or when the model is compiled.

        Args:
            steps: Training steps run before the clock starts, and undone (at least 1). null: no warm-up; graphs are
                compiled during training, inside the clock, and the micro-batch is a whole step.
        """
        if steps is not None and steps < 1:
            raise ValueError(f"warmup.steps must be at least 1, or null for no warm-up, not {steps}")
        self.steps = steps

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Run forward, backward, update and a validation batch, then restore the weights.

        Raises:
            UserError: If not even one sequence fits into the GPU's memory.
        """
        if self.steps is None or not (pl_module.is_compiled or pl_module.device.type == "cuda"):
            return
        started = time.monotonic()
        model = pl_module.model
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loader = trainer.train_dataloader
        assert loader is not None
        tokens = loader.dataset[trainer.global_step].to(pl_module.device)
        with trainer.precision_plugin.forward_context():
            # With the loop first: it needs more memory.
            loop = model.config.loop
            for is_looped in (True, False) if loop.repeats and loop.start_frac else (True,):
                model.is_looped = is_looped
                slices = self._train(trainer, pl_module, tokens, self.steps)
                if trainer.limit_val_batches != 0:
                    model.eval()
                    scorer = data_of(trainer).scorers(pl_module.device)[0]
                    batch = data_of(trainer).val_dataloader()[0].dataset[0]
                    scorer.add(BitsPerByte().to(pl_module.device), pl_module.nll, batch)
                    model.train()
        model.load_state_dict(saved)
        synchronize(pl_module.device)
        size = len(tokens) // slices * pl_module.sequence_length
        logger.info(
            f"compiled and warmed up in {time.monotonic() - started:.1f} s (outside the training clock); "
            f"{slices} micro-batch{'es' if slices > 1 else ''} of {size:,} tokens"
        )

    def _train(self, trainer: pl.Trainer, module: LanguageModel, tokens: Tensor, steps: int) -> int:
        """Make the steps with as few micro-batches as memory allows; returns their number."""
        auto = module.micro_batch_tokens == "auto"
        slices = self._fewest_slices(trainer, module, tokens) if auto else module.micro_batches(len(tokens))
        optimizer = module.configure_optimizers()

        def update() -> None:
            clip_gradients(module.model.parameters(), module.optimizer_config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(steps):
            train_step(module.nll, tokens, slices, _backward, update)
        return slices

    def _fewest_slices(self, trainer: pl.Trainer, module: LanguageModel, tokens: Tensor) -> int:
        """Try forward and backward; without an update, in which processes would wait for one without memory."""
        length, sequences = module.sequence_length, len(tokens)
        for slices in (count for count in range(1, sequences + 1) if sequences % count == 0):
            try:
                train_step(module.nll, tokens, slices, _backward, lambda: None)
                fits = True
            except torch.OutOfMemoryError:
                fits = False
            module.zero_grad()
            all_fit = all_ranks_agree(fits, module.device)
            if not all_fit:  # outside the handler, which holds the tensors of the failed step
                release_memory(module.device)
            if all_fit:
                module.micro_batch_tokens = sequences // slices * length
                run = RunFolder(str(trainer.log_dir))  # a collective: all processes must ask
                if trainer.is_global_zero:
                    _write_micro_batch(run, module.micro_batch_tokens)
                return slices
        raise UserError(
            f"{module.device}: not even one sequence of {length:,} tokens fits; lower --data.sequence_length or "
            "--model.model_dim"
        )


def _backward(loss: Tensor, last: bool) -> None:
    loss.backward()


def _write_micro_batch(run: RunFolder, tokens: int) -> None:
    """Write the micro-batch into the run's config, so that the run can be repeated as it was."""
    if run.config.is_file():
        with atomic_write(run.config) as file:
            text = run.config.read_text().replace("micro_batch_tokens: auto", f"micro_batch_tokens: {tokens}")
            file.write(text.encode())
