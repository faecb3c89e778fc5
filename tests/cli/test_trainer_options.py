"""Every option of Lightning's Trainer: it has its effect on a run of two steps, or it is refused in one line."""

import inspect
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.helpers import RUNS, small, trainer_here
from trainer.checkpoint import load_checkpoint
from trainer.cli.trainer_options import REPLACED_CALLBACKS, SETTLED, agree_with_launcher, check_callback
from trainer.errors import UserError

PROBED: dict[str, Any] = {}  # what the probe saw in the last run


class Probe(pl.Callback):
    """Notes the state of a run after its last step."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        PROBED.update(
            steps=trainer.global_step,
            world=trainer.world_size,
            device=str(module.device),
            precision=trainer.precision,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            benchmark=torch.backends.cudnn.benchmark,
            anomaly=torch.is_anomaly_enabled(),
            environment=type(trainer._accelerator_connector.cluster_environment).__name__,
            dtype=next(module.parameters()).dtype,
        )


# For a refusal: a value that Lightning would accept.
REFUSED = {
    "accumulate_grad_batches": "2",
    "barebones": "true",
    "check_val_every_n_epoch": "1",
    "enable_autolog_hparams": "false",
    "enable_checkpointing": "false",
    "enable_progress_bar": "true",
    "fast_dev_run": "true",
    "gradient_clip_algorithm": "norm",
    "gradient_clip_val": "1.0",
    "inference_mode": "true",
    "limit_predict_batches": "3",
    "limit_test_batches": "3",
    "limit_train_batches": "2",
    "limit_val_batches": "0.5",
    "max_epochs": "1",
    "max_time": "00:00:01:00",
    "min_epochs": "1",
    "min_steps": "5",
    "model_registry": "somewhere",
    "num_sanity_val_steps": "2",
    "overfit_batches": "2",
    "reload_dataloaders_every_n_epochs": "1",
    "strategy": "fsdp",
    "sync_batchnorm": "true",
    "use_distributed_sampler": "true",
}


def columns(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


# For an effect: the arguments, and what the run folder, the probe and the output show of it.
EFFECTS: dict[str, tuple[list[str], Callable[[Path, str], bool]]] = {
    "accelerator": (["cpu"], lambda folder, out: PROBED["device"] == "cpu"),
    "devices": (["1"], lambda folder, out: PROBED["world"] == 1),
    "num_nodes": (["1"], lambda folder, out: PROBED["world"] == 1),
    "precision": (["64-true"], lambda folder, out: PROBED["dtype"] == torch.float64),
    "logger": (["CSVLogger"], lambda folder, out: bool(list(folder.parents[2].glob("other/**/metrics.csv")))),
    "callbacks": ([], lambda folder, out: PROBED["steps"] == 2),
    "max_steps": (["2"], lambda folder, out: load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 2),
    "val_check_interval": (["1"], lambda folder, out: "step      1  validation" in out),
    "log_every_n_steps": (["1"], lambda folder, out: sum("train/loss" not in row for row in columns(folder)) >= 2),
    "enable_model_summary": (["true"], lambda folder, out: "Total params" in out),
    "deterministic": (["true"], lambda folder, out: PROBED["deterministic"]),
    "benchmark": (["true"], lambda folder, out: PROBED["benchmark"]),
    "profiler": (["simple"], lambda folder, out: "FIT Profiler Report" in out),
    "detect_anomaly": (["true"], lambda folder, out: PROBED["anomaly"]),
    "plugins": (["LightningEnvironment"], lambda folder, out: PROBED["environment"] == "LightningEnvironment"),
    "default_root_dir": ([], lambda folder, out: folder.is_dir()),
}


def test_every_option_is_decided():
    options = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert options == {*SETTLED, *EFFECTS}
    assert set(REFUSED) == set(SETTLED)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_its_effect_is_refused(name: str, tmp_path: Path):
    result = trainer_here("fit", f"--trainer.{name}={REFUSED[name]}", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert f"trainer.{name} " in result.stderr
    assert "is not supported: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--trainer.val_check_interval=0.5"],
            "trainer.val_check_interval must be a whole number of at least 1, not 0.5",
        ),
        (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps must be a whole number of at least 1, not 0"),
        (["--trainer.max_steps=-2"], "trainer.max_steps must not be -2"),
        (["--trainer.logger=false"], "metrics.csv is a part of every run"),
        (["--trainer.precision=bf16-true"], "the weights stay in float32; set --precision"),
        (["--trainer.default_root_dir=s3://bucket/runs"], "must be a folder, not an address"),
        (["--trainer.val_check_interval=1.0"], "must be a whole number of at least 1, not 1.0"),
        (["--trainer.precision=64", "--precision=32-true"], "trainer.precision 64 is not --precision 32-true; set"),
        (["--trainer.logger=MLFlowLogger"], "trainer: MLFlowLogger: Requirement 'mlflow>=1.0.0' not met."),
        (["--trainer.max_steps=1" + 400 * "0"], "--trainer.max_steps: a number of 401 digits is out of range"),
        (
            ["--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.Timer}]"],
            "Timer is not supported: set",
        ),
        (["--trainer.callbacks+=WeightAveraging"], "trainer.callbacks WeightAveraging is not supported: set --averag"),
        (["--trainer.callbacks=lightning.pytorch.callbacks.Timer"], "Timer is not supported: set --wallclock.seconds"),
        (
            ["--trainer.callbacks=[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]"],
            "--averaging.method",
        ),
        (["--model.optimizer.matrix_lr=1e39"], "--model.optimizer.matrix_lr 1e+39 is out of range"),
        (["--trainer.max_steps=99999999999999999999999"], "--trainer.max_steps: a number of 23 digits is out of range"),
        (
            ["--model.bigram.buckets=99999999999999999999"],
            "--model.bigram.buckets: a number of 20 digits is",
        ),
        (
            ["--stability.history_steps=99999999999999999999"],
            "--stability.history_steps: a number of 20 digits",
        ),
    ],
)
def test_a_value_without_its_effect_is_refused(args: list[str], message: str, tmp_path: Path):
    result = trainer_here("fit", *args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU says")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path):
    result = trainer_here("fit", "--trainer.accelerator=gpu", cwd=tmp_path)
    assert result.stderr == "trainer: trainer.accelerator gpu: no GPU was found; leave it out to use the CPU\n"
    result = trainer_here("fit", "--trainer.num_nodes=2", cwd=tmp_path)
    assert "trainer.num_nodes 2: nothing has started the other nodes" in result.stderr
    assert trainer_here("fit", "--trainer.num_nodes=2", "--dry_run", cwd=tmp_path).returncode == 0
    result = trainer_here("fit", "--trainer.devices=abc", cwd=tmp_path)
    assert result.stderr.startswith("trainer: trainer.devices abc: `devices` selected with `CPUAccelerator` should be")


@pytest.mark.parametrize("name", REPLACED_CALLBACKS)
def test_a_callback_of_the_same_name_may_be_the_users_own(name: str):
    assert hasattr(pl.callbacks, name)
    check_callback(f"mine.{name}")
    for prefix in ("", "lightning.pytorch.callbacks.", "pytorch_lightning."):
        with pytest.raises(UserError, match=f"trainer.callbacks {name} is not supported: "):
            check_callback(f"{prefix}{name}")


@pytest.fixture
def clean_torch():
    """What a run sets in this process is set back."""
    python, torchs = random.getstate(), torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(False)
    random.setstate(python)
    torch.set_rng_state(torchs)


@pytest.mark.usefixtures("clean_torch")
@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_has_its_effect(name: str, tmp_path: Path, shard_folder: Path, caplog: pytest.LogCaptureFixture):
    value, shows = EFFECTS[name]
    PROBED.clear()
    args = [f"--trainer.{name}={each}" for each in value]
    args += [f"--trainer.logger.save_dir={tmp_path}/other"] if name == "logger" else []
    args += ["--trainer.max_steps=2", "--trainer.callbacks=tests.cli.test_trainer_options.Probe"]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        result = trainer_here(*small(shard_folder, "--export.enabled=false", *args), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert shows(tmp_path / RUNS / "1", result.stdout + caplog.text)
    config = yaml.safe_load((tmp_path / RUNS / "1/config.yaml").read_text())
    assert name in config["trainer"]


@pytest.mark.parametrize(
    ("launcher", "devices", "nodes", "expected"),
    [
        ({}, "auto", 1, ("auto", 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "auto", 1, (2, 2)),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "2", 1, ("2", 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, [0, 1], 1, ([0, 1], 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1, 1, "torchrun has started 2"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, 2, "on each of 2"),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, "auto", 1, (2, 2)),
        ({"SLURM_NTASKS": "4"}, 2, 1, "SLURM has started 4 processes on each of 1 nodes"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, 2, 1, (2, 1)),
    ],
)
def test_devices_agree_with_the_launcher(
    launcher: dict[str, str], devices: Any, nodes: int, expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for key in [key for key in os.environ if key.startswith(("SLURM", "TORCHELASTIC", "WORLD", "LOCAL_WORLD"))]:
        monkeypatch.delenv(key)
    for key, value in launcher.items():
        monkeypatch.setenv(key, value)
    if isinstance(expected, tuple):
        assert agree_with_launcher(devices, nodes) == expected
        return
    result = trainer_here("fit", f"--trainer.devices={devices}", f"--trainer.num_nodes={nodes}", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []
