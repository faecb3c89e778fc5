"""When a run saves a checkpoint: while it trains, when it ends, and when it is stopped; and Lightning's CheckpointIO.

Lightning's ModelCheckpoint is not used: on an error or Ctrl-C it would save in the middle of an update.
"""

import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from trainer.checkpoint import METADATA_KEY, load_checkpoint, save_checkpoint
from trainer.distributed import HostChannel, all_ranks_agree
from trainer.errors import UserError
from trainer.lightning_module import LanguageModel
from trainer.logging import logger
from trainer.run_folder import RunFolder

# Signals that end a run; the last one announces a time limit.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
BYTES_PER_PARAMETER = 8  # of a checkpoint, at least: a weight and a momentum


class Stopped(SIGTERMException):
    """Ends a run after a signal; Lightning then ends as after SIGTERM."""

    def __init__(self, number: int) -> None:
        """Remember the signal.

        Args:
            number: Its number.
        """
        super().__init__()
        self.number = number


class AtomicCheckpointIO(CheckpointIO):
    """Lightning stages in the system's temp folder and moves without a sync; a full disk left a damaged file there."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(path)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keeps the newest few as `step-N.ckpt`, and `last.ckpt` as another name of the newest."""

    def __init__(self, every: int = 1000, keep: int = 2) -> None:
        """Save while training.

        Args:
            every: Steps between two saves (at least 1); one more is made when training ends, fails or is stopped.
            keep: Number of checkpoints to keep (at least 1).
        """
        if every < 1 or keep < 1:
            raise ValueError(f"checkpoints.every and checkpoints.keep must be at least 1, not {every} and {keep}")
        self.every = every
        self.keep = keep
        self.saved_step: int | None = None
        self._handlers: dict[int, Any] = {}
        self._signal = 0  # the signal that asks this process to end
        self._trained = False
        self._channel: HostChannel | None = None
        self.resumed: str | None = None  # checksum of the checkpoint that the run resumes from
        self.problem: UserError | None = None  # why this process cannot resume

    @override
    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Find the run's folder, and refuse a disk that cannot hold one checkpoint.

        Raises:
            UserError: If it cannot, or the processes resume from different files.
        """
        self.run = RunFolder(str(trainer.log_dir))
        if trainer.is_global_zero and self.run.path.is_dir():
            needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in pl_module.model.parameters())
            free = shutil.disk_usage(self.run.path).free
            if free < needed:
                raise UserError(
                    f"{self.run}: has {free / 1e6:,.1f} MB free, but a checkpoint takes more than {needed / 1e6:,.1f} "
                    "MB; free some space, or choose another --trainer.default_root_dir"
                )
        self._channel = self._channel or HostChannel(trainer.world_size)
        if trainer.world_size > 1:
            self._agree_on_checkpoint(trainer)

    def _agree_on_checkpoint(self, trainer: pl.Trainer) -> None:
        """Refuse to resume unless all processes have the same file; nodes may have folders of their own.

        Raises:
            UserError: On each process whose file is missing or another one than that of rank 0.
            SystemExit: On the others.
        """
        first, problem = trainer.strategy.broadcast((self.resumed, self.problem is not None))
        if self.problem is None and not problem and self.resumed != first:
            names = [f"checkpoint {each[:12]}..." if each else "no checkpoint" for each in (self.resumed, first)]
            self.problem = UserError(
                f"process {trainer.global_rank} on {socket.gethostname()} has {names[0]} to resume from, but process 0 "
                f"has {names[1]}; share the folder of the runs between the nodes, or copy the file to all of them"
            )
        is_right = all_ranks_agree(self.problem is None, trainer.strategy.root_device)
        if self.problem is not None:
            raise self.problem
        if not is_right:
            raise SystemExit(1)

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(METADATA_KEY, {})["saved_at"] = time.time()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Let every signal that asks the run to end wait for the end of an update.

        Each of several processes waits for the end of the step, where all hear of the signal, save together and stop.
        Lightning would broadcast SIGTERM on the devices at every step: the host could not run ahead of them, and a
        signal in the middle of a step meets another collective. During validation and export, a signal ends the process
        that received it at once, and the others when they miss it. One that is ignored, as under nohup, stays so.
        """
        self.saved_step = trainer.global_step  # nothing was trained yet that the resumed checkpoint lacks
        is_distributed = trainer.world_size > 1
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

        def stop(number: int, frame: FrameType | None) -> None:
            all_will_hear = is_distributed and trainer.training and not self._trained
            if self._signal or not (pl_module.updating or all_will_hear):  # a second one does not wait
                raise _exception_of(number)
            self._signal = number

        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                with suppress(ValueError):  # not the main thread, which alone receives signals
                    self._handlers[number] = signal.signal(number, stop)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        """Save when it is time, and after the last step: before the export, which could fail.

        Lightning calls this callback last, so everything that belongs to the step is done.
        """
        pl_module.updating = False
        assert self._channel is not None
        if number := int(self._channel.largest(self._signal)):
            self._save(trainer)
            self._log_saved()
            raise _exception_of(number)
        step = trainer.global_step
        self._trained = trainer.should_stop or step == trainer.max_steps
        if self._trained or step % self.every == 0:
            self._save(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        """Save what was trained since the last save, unless an update was interrupted or the device failed."""
        if self.saved_step is None or trainer.global_step == self.saved_step:
            return
        if isinstance(exception, torch.AcceleratorError):
            return  # nothing can be read from the device any more
        if pl_module.updating:
            logger.warning(f"stopped in the middle of a step; the last saved step is {self.saved_step:,}")
        else:
            self._save(trainer, alone=True)  # Lightning ignores an impatient second Ctrl-C by now
            if isinstance(exception, KeyboardInterrupt | SIGTERMException):
                self._log_saved()

    def _log_saved(self) -> None:
        ckpt = self.run.last_checkpoint if self.run.path.name.isdecimal() else "last"  # a name stands in the config
        command = f"--config {quote(str(self.run.config))} --ckpt {quote(str(ckpt))}"
        logger.info(f"step {self.saved_step:,} is saved; resume with {command}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Save if a validation ended the run, and restore the signal handlers."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())
        self._save(trainer)

    def _save(self, trainer: pl.Trainer, alone: bool = False) -> None:
        """Save this step; `alone` if other processes may not do so, so that nothing waits for them."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        if not _is_finite(trainer.lightning_module):
            problem = f"step {step:,}: the weights are not finite; the last saved step is {self.saved_step:,}"
            if not alone:
                raise UserError(f"{problem}. Lower the learning rate")
            logger.warning(problem)
            return
        path = self.run.checkpoint(step)
        if alone:
            if trainer.is_global_zero:  # what Trainer.save_checkpoint does before its barrier
                state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(state, path)
        else:
            trainer.save_checkpoint(path, weights_only=False)
        self.saved_step = step
        if trainer.is_global_zero:
            _link(path, self.run.last_checkpoint)
            for old in self.run.step_checkpoints()[: -self.keep]:
                old.unlink()


def _is_finite(module: torch.nn.Module) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all())


def _exception_of(number: int) -> BaseException:
    """The exception that ends a run after a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, without a copy where the file system supports that."""
    link = name.with_name(f".{name.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    os.replace(link, name)
