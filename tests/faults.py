"""Faults to plant into the trainer: `python -m tests.faults NAME PARAMETERS fit ...`, with the parameters in JSON."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import __main__, checkpoint, files, lightning_module
from trainer.callbacks import export as export_callback
from trainer.callbacks.stability import StabilityMonitor
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.cli.lightning_cli import EpochLoop
from trainer.clock import TrainingClock
from trainer.lightning_module import LanguageModel
from trainer.optim.muon_adamw import MuonAdamW
from trainer.quantize import container
from trainer.step import StepFence

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Call an action with the same arguments before each call of a function."""
    original = getattr(owner, name)

    def replacement(*args: Any, **options: Any) -> Any:
        action(*args, **options)
        return original(*args, **options)

    setattr(owner, name, replacement)


def slow(step: float, validation: float = 0.0) -> None:
    """Every step and every validation takes so many seconds more."""
    before(StepFence, "record", lambda *_: time.sleep(step))
    before(LanguageModel, "on_validation_epoch_start", lambda *_: time.sleep(validation))


def signal_once(moment: str, step: int) -> None:
    """SIGUSR1 in the update of a step, at its end, in its validation, or before the next step."""

    def notify(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    if moment == "update":
        before(StepFence, "record", lambda _, now, *__: notify(now))
    elif moment == "validation":
        before(LanguageModel, "validation_step", lambda module, *_: notify(module.trainer.global_step))
    else:
        name = {"end": "on_advance_end", "next": "advance"}[moment]
        before(EpochLoop, name, lambda loop, *_: notify(loop.global_step))


def interrupt_an_update(call: int) -> None:
    """Ctrl-C between two halves of an optimizer step, which calls AdamW twice."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)

    before(MuonAdamW, "_adamw", count)


def kill_a_save(moment: str) -> None:
    """SIGKILL in the third save of a checkpoint: before its checksum is written, or before it is renamed."""
    saves: list[int] = []

    def count(*args: Any) -> None:
        if moment == "checksum" or "step-" in str(args[-1]):
            saves.append(1)
        if len(saves) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    before(*((checkpoint, "append_checksum") if moment == "checksum" else (files.os, "replace")), count)


def full_disk(size: int) -> None:
    """The third checkpoint meets a limit of its size, as on a disk that others have filled meanwhile."""
    saves: list[int] = []

    def count(*_: Any) -> None:
        saves.append(1)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    before(checkpoint, "atomic_write", count)


def full_disk_in_export(size: int) -> None:
    """The artifact meets a limit of its size."""
    before(container, "atomic_write", lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def bad_gradient(steps: list[int]) -> None:
    """One gradient becomes nan at some steps, counted from 1, as a bad batch would make it."""

    def poison(module: LanguageModel, _: Any) -> None:
        if module.steps_done + 1 in steps:
            module.model.blocks[2].mlp.down.weight.grad[0, 0] = float("nan")

    before(LanguageModel, "on_before_optimizer_step", poison)


def bad_loss(step: int, rank: int) -> None:
    """The loss of one process becomes nan after so many steps."""

    def poison(module: LanguageModel, *_: Any) -> None:
        if module.steps_done == step and rank == RANK:
            nll = module.nll
            module.nll = lambda *args: nll(*args) * float("nan")

    before(LanguageModel, "training_step", poison)


def cut_shard(trainer: Any, _: Any) -> None:
    """The first training shard is cut."""
    os.truncate(trainer.datamodule.text.train[0], 4000)


def remove_shard(trainer: Any, _: Any) -> None:
    """The first training shard is removed."""
    Path(trainer.datamodule.text.train[0]).unlink()


def break_reader(trainer: Any, _: Any) -> None:
    """The thread that reads ahead dies."""
    trainer.train_dataloader.dataset.files.read = lambda *_: os.stat("/nowhere/shard")


def block_checkpoints(trainer: Any, _: Any) -> None:
    """The folder of the checkpoints becomes a file."""
    folder = Path(trainer.log_dir) / "checkpoints"
    shutil.rmtree(folder)
    folder.touch()


def fail_device(_: Any, module: LanguageModel) -> None:
    """The device fails, and nothing can be read from it any more."""
    module.model.state_dict = None
    raise torch.AcceleratorError("CUDA error: it fell\nmore")


def raise_error(*_: Any) -> None:
    """An error that no part of the trainer expects."""
    raise RuntimeError("planted")


def spoil_weights(_: Any, module: LanguageModel) -> None:
    """A weight becomes infinite although every gradient is finite, and the stability monitor misses it."""
    StabilityMonitor._check = lambda *_, **__: None
    module.model.blocks[1].mlp.up.weight.data[0, 0] = float("inf")


def huge_weight(_: Any, module: LanguageModel) -> None:
    """A weight that float16 cannot store."""
    module.model.blocks[1].mlp.up.weight.data[0, 0] = 1e9
    StabilityMonitor._check = lambda *_, **__: None


def change_sources(*_: Any) -> None:
    """Somebody edits the trainer's sources meanwhile."""
    export_callback.source_bundle = lambda: b"changed"


def at_step(step: int, fault: str) -> None:
    """Another fault of this module, after so many steps."""

    def strike(_: Any, trainer: Any, module: LanguageModel, *__: Any) -> None:
        if trainer.global_step == step:
            globals()[fault](trainer, module)

    before(StabilityMonitor, "on_train_batch_start", strike)


def sigterm_in_the_export() -> None:
    """SIGTERM while the artifact is made."""
    export_callback.export = lambda *_: os.kill(os.getpid(), signal.SIGTERM)


def end_a_process(how: str, step: int, rank: int | None = None, where: str = "training_step") -> None:
    """One process, or all of them, end after so many steps: killed, by a signal, or by an error."""

    def end(module: LanguageModel, *_: Any) -> None:
        if rank in (None, RANK) and module.trainer.global_step == step:
            if how == "error":
                raise RuntimeError("planted")
            os.kill(os.getpid(), signal.Signals[how])

    before(LanguageModel, where, end)


def skewed_clocks() -> None:
    """Rank 1 believes that three times as much time has passed; each process writes its rates and its weights."""
    steps, rates = [0], []
    TrainingClock.elapsed = property(lambda self: steps[0] * (0.1 if RANK == 0 else 0.3))
    original = WeightAveraging.on_train_batch_end

    def record(self: WeightAveraging, trainer: Any, module: LanguageModel, *rest: Any) -> None:
        original(self, trainer, module, *rest)
        steps[0] = trainer.global_step
        rates.append(module.lr_multiplier)
        weights = b"".join(tensor.numpy().tobytes() for tensor in module.model.state_dict().values())
        content = {"rates": rates, "weights": hashlib.sha256(weights).hexdigest()}
        Path(f"rank{RANK}.json").write_text(json.dumps(content))

    WeightAveraging.on_train_batch_end = record


def interrupt_a_validation() -> None:
    """Ctrl-C while text is scored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before(LanguageModel, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))


def print_loop() -> None:
    """Not a fault: print of every step whether the depth recurrence was on, on a device with a peak of 1 TFLOP/s."""
    lightning_module.peak_flops = lambda device: 1e12
    original = LanguageModel.training_step

    def step(module: LanguageModel, *args: Any) -> None:
        original(module, *args)
        print("looped", module.model.is_looped, file=sys.stderr)

    LanguageModel.training_step = step


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    raise SystemExit(__main__.main(sys.argv[3:]))
