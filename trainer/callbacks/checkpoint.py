"""Checkpoints of a run: while it trains, when it ends, and when it is stopped.

Lightning's ModelCheckpoint is not used: on an error or Ctrl-C it would save in the middle of an update.
"""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from trainer.errors import UserError
from trainer.lightning_module import LanguageModel
from trainer.ranks import HostChannel

LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Keeps the newest few as `step-N.ckpt`, and `last.ckpt` as another name of the newest."""

    def __init__(self, every: int = 1000, keep: int = 2) -> None:
        """Save while training.

        Args:
            every: Steps between two saves; one more is made when training ends, fails or is stopped.
            keep: Checkpoints that stay.
        """
        if every < 1 or keep < 1:
            raise ValueError(f"checkpoints.every and checkpoints.keep must be at least 1, not {every} and {keep}")
        self.every = every
        self.keep = keep
        self.saved_step: int | None = None
        self._handlers: dict[int, Any] = {}
        self._asked = 0  # the signal that asks for the end
        self._trained = False
        self._channel: HostChannel | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the folder inside the run's."""
        self.folder = Path(str(trainer.log_dir)) / "checkpoints"
        self._channel = self._channel or HostChannel(trainer.world_size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let Ctrl-C wait for the end of an update; nothing was trained yet that is not in the file gone on from.

        Of several processes each waits for the end of the step, where all hear of it, save together and stop. That
        includes SIGTERM, which Lightning hands round on the devices, every step: then the host cannot run ahead of
        them, and a signal in the middle of a step meets another collective. While they validate or export, a signal
        ends the process that got it at once, and the others when they miss it.
        """
        assert isinstance(pl_module, LanguageModel)
        self.saved_step = trainer.global_step
        several = trainer.world_size > 1
        if several:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

        def stop(number: int, frame: FrameType | None) -> None:
            heard_of = several and trainer.training and not self._trained
            if self._asked or not (pl_module.updating or heard_of):  # a second one does not wait
                raise _ending(number)
            self._asked = number

        for number in (signal.SIGINT, signal.SIGTERM) if several else (signal.SIGINT,):
            self._handle(number, stop)

    def _handle(self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
        with suppress(ValueError):  # not the main thread: no signal comes here
            self._handlers[number] = signal.signal(number, handler)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save when it is time, and after the last step: before the export, which could fail.

        Lightning calls this callback last, so everything that belongs to the step is done.
        """
        assert isinstance(pl_module, LanguageModel)
        pl_module.updating = False
        assert self._channel is not None
        if asked := int(self._channel.largest(self._asked)):
            self._save(trainer)
            self._say_saved()
            raise _ending(asked)
        step = trainer.global_step
        self._trained = trainer.should_stop or step == trainer.max_steps
        if self._trained or step % self.every == 0:
            self._save(trainer)
        if self._trained and signal.SIGTERM not in self._handlers:  # Lightning only takes note of it, for a next step
            self._handle(signal.SIGTERM, _end)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was trained since the last time, unless an update was cut in the middle or the device is gone."""
        assert isinstance(pl_module, LanguageModel)
        if self.saved_step is None or trainer.global_step == self.saved_step:
            return
        if isinstance(exception, torch.AcceleratorError):
            return  # nothing can be read from the device any more
        if pl_module.updating:
            rank_zero_info(f"stopped in the middle of a step; step {self.saved_step:,} is the last one that is saved")
        else:
            self._save(trainer, alone=True)  # an impatient second Ctrl-C does not end this: Lightning ignores it by now
            if isinstance(exception, KeyboardInterrupt | SIGTERMException):
                self._say_saved()

    def _say_saved(self) -> None:
        rank_zero_info(f"step {self.saved_step:,} is saved; --ckpt last goes on from there")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a validation ended the run; signals mean what they did before."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())
        self._save(trainer)

    def _save(self, trainer: pl.Trainer, alone: bool = False) -> None:
        """Save this step; `alone` if other processes may not come along, so that nothing waits for them."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        if not _is_finite(trainer.lightning_module):
            said = f"step {step:,}: the weights are not finite; step {self.saved_step:,} is the last one that is saved"
            if not alone:
                raise UserError(f"{said}. Lower the learning rate")
            rank_zero_info(said)
            return
        path = self.folder / f"step-{step:09d}.ckpt"
        if alone:
            if trainer.is_global_zero:  # what Trainer.save_checkpoint does before its barrier
                state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(state, path)
        else:
            trainer.save_checkpoint(path, weights_only=False)
        self.saved_step = step
        if trainer.is_global_zero:
            _name_again(path, self.folder / LAST)
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()


def _end(number: int, frame: FrameType | None) -> None:
    raise _ending(number)


def _is_finite(module: torch.nn.Module) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all())


def _ending(number: int) -> BaseException:
    """What ends a run that got a signal."""
    return SIGTERMException() if number == signal.SIGTERM else KeyboardInterrupt()


def _name_again(path: Path, name: Path) -> None:
    """Let another name mean a file, without a second copy where the file system can do that."""
    link = name.with_name(f".{name.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    os.replace(link, name)
