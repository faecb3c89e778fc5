"""Before the clock runs: find a micro-batch that fits, compile every graph, and put the weights back."""

import time
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from trainer.errors import UserError
from trainer.evaluation.metric import BitsPerByte
from trainer.files import atomic_write
from trainer.lightning_module import LanguageModel
from trainer.step import clip_gradients, train_step


class CompileWarmup(pl.Callback):
    """A few steps on a throw-away optimizer; `global_step` and the data position never move."""

    def __init__(self, steps: int = 5) -> None:
        """Warm up on a GPU, or when the model is compiled.

        Args:
            steps: Training steps that are made and undone; 0 compiles during training, inside the clock, and takes a
                whole step as micro-batch.
        """
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run forward, backward, update and a validation batch, then restore the weights.

        Raises:
            UserError: If not even one sequence fits into the GPU's memory.
        """
        assert isinstance(pl_module, LanguageModel)
        if self.steps < 1 or not (pl_module.is_compiled or pl_module.device.type == "cuda"):
            return
        started = time.monotonic()
        saved = {name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()}
        loader = trainer.train_dataloader
        assert loader is not None
        tokens = loader.dataset[trainer.global_step].to(pl_module.device)
        model = pl_module.model
        with trainer.precision_plugin.forward_context():
            # With the loop first: it needs more memory.
            for looped in (True, False) if model.config.loop.start_frac else (True,):
                model.is_looped = looped
                slices = self._train(trainer, pl_module, tokens)
                if trainer.limit_val_batches != 0:
                    model.eval()
                    scorer = trainer.datamodule.scorers(pl_module.device)[0]  # type: ignore[attr-defined]
                    batch = trainer.datamodule.val_dataloader()[0].dataset[0]  # type: ignore[attr-defined]
                    scorer.add(BitsPerByte().to(pl_module.device), pl_module.nll, batch)
                    model.train()
        pl_module.model.load_state_dict(saved)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        size = len(tokens) // slices * pl_module.sequence_length
        rank_zero_info(
            f"compiled and warmed up in {time.monotonic() - started:.1f} s (outside the training clock); "
            f"{slices} micro-batch{'es' if slices > 1 else ''} of {size:,} tokens"
        )

    def _train(self, trainer: pl.Trainer, module: LanguageModel, tokens: Tensor) -> int:
        """Make the steps with as few slices as memory allows; returns their number."""
        auto = module.micro_batch_tokens == "auto"
        slices = self._fewest_slices(trainer, module, tokens) if auto else module.micro_batches(len(tokens))
        optimizer = module.configure_optimizers()

        def update() -> None:
            clip_gradients(module.model.parameters(), module.optimizer_config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(self.steps):
            train_step(module.nll, tokens, slices, _backward, update)
        return slices

    def _fewest_slices(self, trainer: pl.Trainer, module: LanguageModel, tokens: Tensor) -> int:
        """Try forward and backward; without an update, in which processes would wait for one that has no memory."""
        length, sequences = module.sequence_length, len(tokens)
        for slices in (count for count in range(1, sequences + 1) if sequences % count == 0):
            try:
                train_step(module.nll, tokens, slices, _backward, lambda: None)
                fits = True
            except torch.cuda.OutOfMemoryError:
                fits = False
            module.zero_grad()
            if not fits:  # outside the handler, which holds on to the tensors of the failed step
                torch.cuda.empty_cache()
            if _on_all_ranks(fits, module.device):
                module.micro_batch_tokens = sequences // slices * length
                folder = Path(str(trainer.log_dir))  # ranks agree on it, so all of them have to ask
                if trainer.is_global_zero:
                    _remember(folder / "config.yaml", module.micro_batch_tokens)
                return slices
        raise UserError(f"{module.device}: not even one sequence of {length:,} tokens fits; shorten it or the model")


def _backward(loss: Tensor, last: bool) -> None:
    loss.backward()


def _on_all_ranks(fits: bool, device: torch.device) -> bool:
    answer = torch.tensor(int(fits), device=device)
    if dist.is_initialized():
        dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def _remember(config: Path, tokens: int) -> None:
    """Write what was found into the run's config, so that the run can be repeated as it was."""
    if config.is_file():
        with atomic_write(config) as file:
            file.write(config.read_text().replace("micro_batch_tokens: auto", f"micro_batch_tokens: {tokens}").encode())
