"""Lightning's own options: those that would be without effect, or break what a run promises, are refused in one line.

A test goes through the signature of Lightning's Trainer: every option is listed here, or is shown to have its effect.
"""

import os
from collections.abc import Mapping
from typing import Any

from trainer.device import default_device
from trainer.errors import UserError

# Option: the values that it may have, and what to use instead.
SETTLED: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": ((1,), "set --model.micro_batch_tokens, which splits a step"),
    "barebones": ((False,), "it would switch off checkpoints and metrics"),
    "check_val_every_n_epoch": ((None,), "set --trainer.val_check_interval, in steps"),
    "enable_autolog_hparams": ((True,), "config.yaml always holds every setting"),
    "enable_checkpointing": ((None, True), "set --checkpoints.every"),
    "enable_progress_bar": ((False,), "set --progress.mode"),
    "fast_dev_run": ((False,), "it makes no run folder; set --trainer.max_steps 1"),
    "gradient_clip_algorithm": ((None,), "set --model.optimizer.grad_clip_norm"),
    "gradient_clip_val": ((None,), "set --model.optimizer.grad_clip_norm"),
    "inference_mode": ((False,), "validation and training share their compiled graphs"),
    "limit_predict_batches": ((None, 1.0), "no command predicts"),
    "limit_test_batches": ((None, 1.0), "no command tests; set --eval.max_tokens"),
    "limit_train_batches": ((None, 1.0), "set --trainer.max_steps"),
    "limit_val_batches": ((None, 0, 1.0), "set --eval.fit_tokens or --eval.max_tokens; 0 makes no validation"),
    "max_epochs": ((None, -1), "the text is read as often as needed; set --trainer.max_steps or --wallclock.seconds"),
    "max_time": ((None,), "set --wallclock.seconds, which the schedule knows"),
    "min_epochs": ((None,), "set --trainer.max_steps or --wallclock.seconds"),
    "min_steps": ((None,), "set --trainer.max_steps or --wallclock.seconds"),
    "model_registry": ((None,), "checkpoints stay in the run folder"),
    "num_sanity_val_steps": ((0,), "every validation scores its whole part of the split"),
    "overfit_batches": ((0.0,), "set --data.source to a small text"),
    "reload_dataloaders_every_n_epochs": ((0,), "the data of a step depends on its number alone"),
    "strategy": (("auto", "ddp"), "the optimizer is written for one device or DDP"),
    "sync_batchnorm": ((False,), "the model has no batch normalization"),
    "use_distributed_sampler": ((False,), "its padding would score windows twice"),
}
# Lightning's callbacks that would change nothing here, or what is stored.
REPLACED_CALLBACKS = {
    "BackboneFinetuning": "the model has no backbone",
    "BatchSizeFinder": "set --model.micro_batch_tokens, whose auto finds what fits",
    "EMAWeightAveraging": "set --averaging.method ema",
    "GradientAccumulationScheduler": "set --model.micro_batch_tokens, which splits a step",
    "LearningRateFinder": "compare rates with trainer sprint",
    "RichProgressBar": "set --progress.mode",
    "StochasticWeightAveraging": "set --averaging.method late_swa",
    "TQDMProgressBar": "set --progress.mode",
    "Timer": "set --wallclock.seconds, which the schedule knows",
    "WeightAveraging": "set --averaging.method",
}
ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
POSITIVE = ("log_every_n_steps", "val_check_interval", "num_nodes")
TRUE_PRECISIONS = (None, "16-mixed", "bf16-mixed", "32-true", "64-true", 16, 32, 64, "16", "32", "64", "bf16")


def check_callback(name: str) -> None:
    """Refuse a callback of Lightning that does not fit.

    Args:
        name: Its class, with or without its module.

    Raises:
        UserError: With what to use instead.
    """
    module, _, name = name.rpartition(".")
    if name in REPLACED_CALLBACKS and module.split(".")[0] in ("", "lightning", "pytorch_lightning"):
        raise UserError(f"trainer.callbacks {name} is not supported: {REPLACED_CALLBACKS[name]}")


def check_trainer_options(options: Any) -> None:
    """Refuse values that Lightning's Trainer would take, but not with their effect.

    Args:
        options: Settings of the Trainer, by attribute.

    Raises:
        UserError: At the first such value.
    """
    for name, (allowed, instead) in SETTLED.items():
        value = getattr(options, name)
        # 1 == True == 1.0: compare the types of truth values, too.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise UserError(f"trainer.{name} {value} is not supported: {instead}")
    if options.accelerator not in ACCELERATORS:
        raise UserError(
            f"trainer.accelerator {options.accelerator} is not supported: use cpu, or cuda for the GPUs of NVIDIA and "
            "AMD; Apple's have no float64, which exact sums need"
        )
    if options.accelerator in ("cuda", "gpu") and default_device().type == "cpu":
        raise UserError(f"trainer.accelerator {options.accelerator}: no GPU was found; leave it out to use the CPU")
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not (type(value) is int and value >= 1):
            raise UserError(f"trainer.{name} must be a whole number of at least 1, not {value}")
    if options.max_steps == 0 or options.max_steps < -1:
        raise UserError(f"trainer.max_steps must not be {options.max_steps}: at least 1, or -1 for no limit")
    if options.logger is False:
        raise UserError("trainer.logger false is not supported: metrics.csv is a part of every run")
    if options.precision not in TRUE_PRECISIONS:
        raise UserError(
            f"trainer.precision {options.precision} is not supported: the weights stay in float32; set --precision"
        )
    if "://" in str(options.default_root_dir):
        raise UserError(f"trainer.default_root_dir {options.default_root_dir}: must be a folder, not an address")


def devices_of_launcher(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """How many processes a launcher has started.

    Returns:
        Its name, the processes of this node and the nodes; None without a launcher.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        local = int(environment["LOCAL_WORLD_SIZE"])
        return "torchrun", local, int(environment["WORLD_SIZE"]) // local
    # As Lightning decides: in an interactive job, its steps are started by hand.
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
        return "SLURM", tasks // nodes, nodes
    return None


def agree_with_launcher(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """Devices and nodes as a launcher has started them.

    Args:
        devices: `trainer.devices`; auto takes the launcher's number.
        num_nodes: `trainer.num_nodes`; 1 takes the launcher's number.

    Returns:
        Devices of this node, and nodes.

    Raises:
        UserError: If they contradict the launcher.
    """
    launched = devices_of_launcher(os.environ)
    if launched is None:
        return devices, num_nodes
    name, local, nodes = launched
    wanted = local if devices in ("auto", -1) else _count(devices)
    num_nodes = nodes if num_nodes == 1 else num_nodes
    if wanted != local or num_nodes != nodes:
        start = "srun --ntasks-per-node" if name == "SLURM" else "torchrun --nproc_per_node"
        raise UserError(
            f"{name} has started {local} processes on each of {nodes} nodes, but trainer.devices {devices} and "
            f"trainer.num_nodes {num_nodes} ask for {wanted} on each of {num_nodes}; leave both out, or start as many "
            f"({start})"
        )
    return (local if devices in ("auto", -1) else devices), num_nodes


def _count(devices: Any) -> int:
    """Number of devices: a number, a list of them, or either as text."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return len([each for each in text.split(",") if each.strip()]) if "," in text else int(text)
