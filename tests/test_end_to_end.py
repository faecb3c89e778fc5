"""The commands as a user runs them, on small data: train, export, read back, score, resume, two processes."""

import csv
import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, TINY
from tests.helpers import RECIPE, RUNS, digest, environment, run_faulty, score_of, small, trainer, trainer_here
from trainer.checkpoint import append_checksum, load_checkpoint
from trainer.cli.env_aliases import PLAIN, SPECIAL, ZERO_IS_NULL, alias_options
from trainer.cli.lightning_cli import resolve_precision
from trainer.data.shards import open_shard
from trainer.errors import UserError
from trainer.evaluation.windows import plan_windows
from trainer.loading import load_artifact
from trainer.model.flops import forward_flops
from trainer.quantize.artifact import read_artifact
from trainer.recipes import recipe_folder, recipe_names
from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    result = trainer(*small(shard_folder, "--report.enabled=true"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_run_folder_holds_everything(finished, shard_folder: Path):
    folder, output = finished
    run = folder / RUNS / "1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["calibration_seconds"] == 0  # nothing to measure
    assert "warning" not in output
    assert summary["train_tokens"] == 8 * 256
    assert summary["bytes_model"] == (run / "artifact.zst").stat().st_size
    assert summary["bytes_code"] == (run / "train_gpt.py").stat().st_size
    assert summary["bytes_total"] == summary["bytes_model"] + summary["bytes_code"]
    assert summary["averaged_steps"] == 2  # after steps 6 and 8, whose multipliers were 3/6 and 1/6
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["val_tokens"] == 300
    assert summary["val_bpb"] == pytest.approx(score_of(output)["val_bpb"], abs=1e-7)
    assert list(summary["stages"]) == ["live_plain", "averaged_plain", "artifact_plain", "artifact_sliding"]
    assert f"this file, sliding windows | {summary['val_bpb']:.4f} |" in (run / "README.md").read_text()
    _, _, written = (run / "report.html").read_text().partition("What it writes")
    samples = re.findall("<pre>(.*?)</pre>", written.partition("Repeat it")[0], re.DOTALL)
    assert len(set(samples)) == len(samples) == 3
    assert (run / "config.yaml").exists()
    assert "train/loss" in (run / "metrics.csv").read_text()
    with (run / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))[-1]
    assert float(logged["artifact/bytes"]) == summary["bytes_total"]
    assert float(logged["artifact/bpb"]) == pytest.approx(summary["val_bpb"])
    assert read_artifact(run / "artifact.zst").model.num_layers == 4


def test_the_config_of_a_run_repeats_it_among_the_runs_of_its_recipe(finished):
    folder, output = finished
    again = trainer("fit", f"--config={RUNS}/1/config.yaml", "--run_name=again", "--report.enabled=false", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert score_of(again.stdout) == score_of(output)
    assert (folder / RUNS / "again/artifact.zst").is_file()


def test_validate_scores_artifact_and_checkpoint_without_another_flag_and_writes_nothing(finished):
    folder, output = finished
    run = folder / RUNS / "1"
    before = sorted(path for path in folder.rglob("*"))
    # What a run leaves out of its validations must not be missing in a score.
    result = trainer("validate", "--ckpt", str(run / "artifact.zst"), "--trainer.limit_val_batches=1", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert score_of(result.stdout) == score_of(output)
    assert "plain" in result.stdout
    assert "sliding" in result.stdout
    live = trainer("validate", "--ckpt", str(run / "checkpoints/last.ckpt"), "--eval.stride", "null", cwd=folder)
    summary = json.loads((run / "summary.json").read_text())
    assert score_of(live.stdout)["val_bpb"] == pytest.approx(summary["stages"]["live_plain"]["bpb"], abs=1e-7)
    assert "sliding" not in live.stdout
    stream = ["--eval.window=128", "--eval.stride=96", "--eval.attention_window=32"]
    streamed = score_of(trainer("validate", "--ckpt", str(run / "artifact.zst"), *stream, cwd=folder).stdout)
    assert streamed["tokens"] == score_of(output)["tokens"]
    assert streamed["bytes"] == score_of(output)["bytes"]
    assert streamed["val_bpb"] == pytest.approx(score_of(output)["val_bpb"], abs=0.02)
    refused = trainer("validate", "--ckpt", str(run / "artifact.zst"), *stream, "--eval.stride=97", cwd=folder)
    assert "eval.attention_window 32 and eval.stride 97" in refused.stderr
    mean = trainer("validate", "--ckpt", str(run / "checkpoints/last.ckpt"), "--weights=averaged", cwd=folder)
    assert score_of(mean.stdout) != score_of(live.stdout)
    assert sorted(path for path in folder.rglob("*")) == before


def test_export_makes_the_same_artifact_from_the_checkpoint(finished):
    folder, _ = finished
    run = folder / RUNS / "1"
    result = trainer("export", "--ckpt", str(run / "checkpoints/last.ckpt"), "--out", "again", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "again/artifact.zst").read_bytes() == (run / "artifact.zst").read_bytes()
    over = trainer("export", "--ckpt", str(run / "checkpoints/last.ckpt"), "--cap", "1000", cwd=folder)
    assert over.returncode == 1
    assert "over the cap of 1,000" in over.stderr


def test_a_loop_begins_in_the_middle_of_the_training_and_stays(tmp_path: Path, shard_folder: Path):
    """Depth recurrence is on in the second half of the steps only, and each step counts its own FLOPs."""
    loop = [f"--model.loop.{option}" for option in ("first=1", "last=2", "repeats=1", "start_frac=0.5")]
    args = small(shard_folder, *loop, "--trainer.log_every_n_steps=3")
    result = run_faulty("print_loop", {}, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seen = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("looped ")]
    assert seen == ["False"] * 4 + ["True"] * 4
    run = RunFolder(tmp_path / RUNS / "1")
    with run.metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["perf/mfu"]]
    model, _ = load_artifact(run.artifact)
    length = int(run.read().config["data.sequence_length"])
    before, after = (3 * forward_flops(model.config, length, is_looped) for is_looped in (False, True))
    flops_per_token = [float(row["perf/mfu"]) * 1e12 / float(row["perf/tokens_per_second"]) for row in rows]
    assert flops_per_token == pytest.approx([before, (before + 2 * after) / 3], rel=1e-5)
    scored = trainer("validate", "--ckpt", f"{RUNS}/1/artifact.zst", cwd=tmp_path)
    assert score_of(scored.stdout) == score_of(result.stdout)


def test_an_interrupted_validation_says_so_and_writes_nothing(finished):
    folder, _ = finished
    args = ["validate", f"--ckpt={RUNS}/1/artifact.zst", "--per_document=interrupted.csv"]
    result = run_faulty("interrupt_a_validation", {}, *args, cwd=folder)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "trainer: interrupted")
    assert not (folder / "interrupted.csv").exists()


def test_loss_aware_rounding_shrinks_to_the_cap_and_can_be_exported_again(tmp_path: Path, shard_folder: Path):
    options = ["rounding=loss_aware", "codec=ans", "calibration_sequences=20"]
    args = [*(f"--export.quantization.{option}" for option in options), "--export.shrink_to_cap=true"]
    args += ["--averaging.method=ema", "--averaging.horizon=0.2", "--wallclock.reserve=5"]
    args += ["--data.order=shuffled", "--data.seed=3"]
    result = trainer(*small(shard_folder, *args), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "quant_step 2.000e-05" in result.stdout  # the model is far below the cap
    run = tmp_path / RUNS / "1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["calibration_seconds"] > 0
    assert summary["averaged_steps"] == 8
    assert summary["stages"]["artifact_plain"]["bpb"] == pytest.approx(
        summary["stages"]["averaged_plain"]["bpb"], abs=0.001
    )
    for args, message in (([], "--data is missing"), (["--data=nowhere"], "--data nowhere: there is no such folder")):
        again = trainer("export", "--ckpt", str(run / "checkpoints/last.ckpt"), "--shrink_to_cap", *args, cwd=tmp_path)
        assert again.returncode == 1
        assert message in again.stderr
    again = trainer(
        "export",
        "--ckpt",
        str(run / "checkpoints/last.ckpt"),
        "--shrink_to_cap",
        f"--data={shard_folder}",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert (run / "export/artifact.zst").read_bytes() == (run / "artifact.zst").read_bytes()


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_resumed_run_ends_with_the_same_weights_bit_by_bit(
    precision: str, finished, tmp_path: Path, shard_folder: Path
):
    """Five of eight steps, an error in the sixth, and the rest; SWA's snapshot of step 6 comes after the resume."""
    args = small(shard_folder, f"--precision={precision}")
    whole, _ = finished
    if precision != "32-true":
        whole = tmp_path / "whole"
        whole.mkdir()
        assert trainer(*args, "--export.enabled=false", cwd=whole).returncode == 0
    broken = run_faulty("end_a_process", {"how": "error", "step": 5}, *args, cwd=tmp_path)
    assert "planted" in broken.stderr
    resumed = trainer(*args, "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    one = whole / RUNS / "1/checkpoints/last.ckpt"
    two = tmp_path / RUNS / "2/checkpoints/last.ckpt"
    assert digest(one) == digest(two)
    clocks = [load_checkpoint(path)["callbacks"]["WallclockCutoff"]["elapsed"] for path in (two,)]
    first = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert clocks[0] > first["callbacks"]["WallclockCutoff"]["elapsed"] > 0


def test_a_run_that_stores_no_artifact_has_the_score_of_its_weights(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, "--export.enabled=false", "--report.enabled=true"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / RUNS / "1"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == ["live_plain", "averaged_plain"]
    assert summary["val_bpb"] == summary["stages"]["averaged_plain"]["bpb"]
    assert "bytes_total" not in summary
    assert not (run / "artifact.zst").exists()
    assert "bits per byte of the averaged weights" in (run / "report.html").read_text()
    later = trainer("export", "--ckpt", str(run / "checkpoints/last.ckpt"), cwd=tmp_path)
    assert later.returncode == 0, later.stderr


def test_two_processes_train_the_weights_of_one(tmp_path: Path, shard_folder: Path):
    runs = []
    for devices in (1, 2):
        args = small(shard_folder, f"--trainer.devices={devices}", "--precision=64-true", "--run_name", f"d{devices}")
        result = trainer(*args, "--trainer.accelerator=cpu", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        run = tmp_path / RUNS / f"d{devices}"
        with (run / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        summary = json.loads((run / "summary.json").read_text())
        runs.append((load_checkpoint(run / "checkpoints/last.ckpt"), summary, losses))
    (one, summary_one, losses_one), (two, summary_two, losses_two) = runs
    assert len(losses_one) == summary_one["steps"]
    assert losses_two == pytest.approx(losses_one, abs=1e-5)
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(tensor, two["state_dict"][name], atol=1e-5), name
    for key in ("val_tokens", "val_bytes"):
        assert summary_one[key] == summary_two[key]
    assert summary_one["val_bpb"] == pytest.approx(summary_two["val_bpb"], abs=1e-6)


CUT_DOWN = [
    "--data.source=trainer.data.sources.Shards",
    "--model.vocab_size=300",
    "--trainer.devices=1",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--data.batch_tokens=512",
    "--data.sequence_length=256",
    "--eval.window=256",
    "--eval.batch_windows=4",
    "--eval.fit_tokens=256",
    "--eval.max_tokens=512",
    "--export.quantization.calibration_sequences=1",
    "--export.shrink_to_cap=false",
    "--export.cap=40000000",  # an untrained reference model does not compress under the challenge's
    "--report.enabled=false",
]


def longer_follow_up() -> list[str]:
    """The published 3,900 s run, as docs/runs.md shows it."""
    text = (ROOT / "docs/runs.md").read_text()
    command = next(line for line in text.splitlines() if "--wallclock.seconds 3900" in line)
    return command.split("#")[0].split()[2:]


@pytest.mark.parametrize("args", [*(["--config", name] for name in recipe_names()), longer_follow_up()])
def test_every_recipe_runs_cut_down(args: list[str], tmp_path: Path, shard_folder: Path):
    """Two steps, at most 4,096 tokens and 16 windows; the reference's own model, three small blocks of the others'."""
    fewer = [] if args[1] == RECIPE else ["--model.num_layers=3", "--model.model_dim=128"]
    if args[1] in ("frontier", "t4"):
        fewer += ["--model.loop.first=1", "--model.loop.last=1", "--model.attention.rope_dims=16"]
    result = trainer("fit", *args, *CUT_DOWN, *fewer, f"--data.source.folder={shard_folder}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / args[1] / "1"
    assert (run / "artifact.zst").exists()
    assert (run / "checkpoints/last.ckpt").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["eval"]["stride"] == (32 if "3900" in args or args[1] == "quickstart" else 64)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["fit", "--config", "nothing"], 1, "neither a file nor one of the recipes"),
        (["fit", "--config", "int5mlp_10l"], 1, "is not a folder"),
        (["fit", "--model.num_layer", "3"], 2, "num_layer"),
        (["fit", "--wallclock.seconds", "-1"], 1, "wallclock.seconds must be positive"),
        (["fit", "--model.micro_batch_tokens", "0"], 1, "micro_batch_tokens must be at least 1 or auto"),
        (["fit", "--trainer.devices", "0"], 1, "is not a valid input"),
        (["fit", "--trainer.max_steps", "0"], 1, "trainer.max_steps must not be 0"),
        (["fit", "--trainer.fast_dev_run", "true"], 1, "makes no run folder"),
        (["fit", "--run_name", "a/b"], 1, "--run_name a/b: must be the name of a folder"),
        (["fit", "--run_name", "..", "--ckpt", "last"], 1, "--run_name ..: must be the name of a folder"),
        (["inspect", "x" * 300], 1, "File name too long"),
        (["fit", "--model.optimizer.eps", "0"], 1, "optimizer.eps must be positive"),
        (
            ["fit", "--averaging.method", "sma"],
            2,
            "--averaging.method: must be one of 'late_swa', 'ema' or null, not sma",
        ),
        (["fit", "--progress.mode", "bars"], 2, "must be one of 'auto', 'bar', 'lines', 'json', 'quiet', not bars"),
        (["fit", "--export.cap", "0"], 1, "export.cap must be at least 1, not 0"),
        (["fit", "--model.optimizer.momentum", "95"], 1, "optimizer.momentum must be in [0, 1)"),
        (["fit", "--config", sys.executable], 1, "is not a text; give a recipe in YAML"),
        (["prepare", "--config", sys.executable], 1, "is not a text; give a recipe in YAML"),
        (["prepare", "--config", "tests"], 1, "neither a file nor one of the recipes"),
        (["validate"], 2, "trainer validate: needs --ckpt"),
        (["validate", "--ckpt", "none.ckpt"], 1, "no such file"),
        (["validate", "--ckpt", "https://example.org/a.ckpt"], 1, "addresses are not opened"),
        (["fit", "--config", "int5mlp_10l", "--ckpt", "last"], 1, "holds no checkpoint"),
        (["export", "--ckpt", "none.ckpt"], 1, "no such checkpoint"),
        (["train"], 2, "no command 'train'"),
        (["generate"], 2, "required: --artifact (trainer generate --help"),
        (["sprint"], 2, "required: --config, --data (trainer"),
        (["rerun"], 2, "required: run (trainer rerun --help"),
    ],
)
def test_a_users_mistake_is_one_line_without_traceback(tmp_path: Path, args: list[str], code: int, message: str):
    result = trainer_here(*args, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert not list(tmp_path.glob("runs/*"))  # nor a run that never was


def test_a_wrong_vocabulary_is_refused_before_the_first_step(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, "--model.vocab_size=400"), cwd=tmp_path)
    assert result.returncode == 1
    assert "its vocabulary size is 300, but the model's 400" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_logger_stands_beside_the_runs_own(tmp_path: Path, shard_folder: Path):
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/other", "--report.enabled=false"]
    result = trainer(*small(shard_folder, *logger), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    own = tmp_path / RUNS / "1/metrics.csv"
    other = next((tmp_path / "other").rglob("metrics.csv"))
    assert own.read_text() == other.read_text()
    assert (tmp_path / RUNS / "1/summary.json").is_file()


def test_tensorboard_gets_the_same_numbers_with_one_flag(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, "--tensorboard=true"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    events = next((tmp_path / RUNS / "1").glob("events.out.tfevents.*")).read_bytes()
    for name in ("train/loss", "train/gradient_norm", "train/lr_multiplier", "val/bpb", "perf/tokens_per_second"):
        assert name.encode() in events
    assert not (tmp_path / RUNS / "1/report.html").exists()
    assert yaml.safe_load((tmp_path / RUNS / "1/hparams.yaml").read_text())["model.num_layers"] == 4


def test_wandb_gets_the_same_numbers_with_one_flag_or_says_what_it_needs(tmp_path: Path, shard_folder: Path):
    args = small(shard_folder, "--wandb=golf", "--export.enabled=false")
    result = trainer(*args, cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    if importlib.util.find_spec("wandb") is None:
        assert (result.returncode, result.stderr) == (
            1,
            "trainer: --wandb needs the package wandb; pip install wandb\n",
        )
        assert not (tmp_path / RUNS).exists()
        return
    assert result.returncode == 0, result.stderr
    (log,) = (tmp_path / "runs").glob("wandb/offline-run-*/run-*.wandb")
    for name in (b"train/loss", b"val/bpb", b"model.num_layers"):
        assert name in log.read_bytes()


def test_a_metric_that_is_not_there_is_one_line(tmp_path: Path, shard_folder: Path):
    watch = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/perplexity"]
    result = trainer_here(*small(shard_folder, *watch), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "val/perplexity" in result.stderr
    assert "docs/metrics.md lists the metrics" in result.stderr


def test_an_unknown_option_is_one_line_with_the_near_one(tmp_path: Path):
    result = trainer_here("fit", "--trainer.max_stepz", "5", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "trainer fit: unrecognized arguments: --trainer.max_stepz 5; did you mean --trainer.max_steps? "
        "(trainer fit --help lists the options)\n"
    )
    for slip, near in (
        ("--train_files", "--data.source.train_files"),
        ("--matrix_lr", "--model.optimizer.matrix_lr"),
    ):
        assert f"; did you mean {near}?" in trainer_here("fit", slip, "5", cwd=tmp_path).stderr
    for command, near in (("runs", "--csv"), ("report", "--out"), ("inspect", "--documents"), ("submit", "--data")):
        slip = near[:-1] + "q"
        result = trainer_here(command, slip, "a.csv", cwd=tmp_path)  # no file of that name is looked for
        start = f"trainer {command}: unrecognized arguments: {slip}; did you mean {near}? "
        assert (result.returncode, result.stderr.count("\n"), result.stderr[: len(start)]) == (2, 1, start)
    for words in (
        ["inspect", "--", "--a"],
        ["generate", "--ckpt=--a", "--prompt", "-- the end"],
    ):  # values
        result = trainer_here(*words, cwd=tmp_path)
        assert (result.returncode, result.stderr[:13]) == (1, "trainer: --a:"), result.stderr
    for command in ("validate", "export", "generate", "report", "submit", "prepare", "inspect", "recipes"):
        assert re.search(r"[Ee]xample:\s+trainer", trainer_here(command, "--help", cwd=tmp_path).stdout), command


def test_a_second_run_in_the_same_folder_is_refused(finished, shard_folder: Path):
    folder, _ = finished
    before = (folder / RUNS / "1/summary.json").read_bytes()
    result = trainer(*small(shard_folder, "--run_name=1"), cwd=folder)
    assert result.returncode == 1
    assert (
        "this run exists already; choose another --run_name, or let fit continue it with --ckpt last" in result.stderr
    )
    assert (folder / RUNS / "1/summary.json").read_bytes() == before


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    own = {"golf_trainer": {"model": TINY.to_dict()}, "state_dict": {}}
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({**own, "bomb": Bomb()}))
    torch.save({**own, "bomb": Bomb()}, tmp_path / "unsealed.ckpt")
    torch.save({**own, "bomb": Bomb()}, tmp_path / "sealed.ckpt")
    torch.save({**own, "hyper_parameters": {"_instantiator": Bomb()}}, tmp_path / "instantiator.ckpt")
    for name in ("sealed.ckpt", "instantiator.ckpt"):
        with (tmp_path / name).open("r+b") as file:
            append_checksum(file)
    unsafe = "cannot be read safely"
    for name, said in {"plain": "damaged", "unsealed": "damaged", "sealed": unsafe, "instantiator": unsafe}.items():
        result = trainer_here("export", "--ckpt", f"{name}.ckpt", cwd=tmp_path)
        assert result.returncode == 1
        assert said in result.stderr
    assert not (tmp_path / "ran").exists()


def test_environment_aliases_rank_between_recipe_and_command_line(tmp_path: Path, shard_folder: Path):
    variables = {"ITERATIONS": "3", "SEED": "7", "MAX_WALLCLOCK_SECONDS": "0", "DATA_PATH": str(shard_folder)}
    args = [word for word in small(shard_folder) if "max_steps" not in word and "folder" not in word]
    result = trainer(*args, "--seed_everything=9", cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert "ITERATIONS=3: --trainer.max_steps=3" in result.stdout
    config = yaml.safe_load((tmp_path / RUNS / "1/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 3  # the recipe says 1,500
    assert config["seed_everything"] == 9  # the command line wins
    assert config["wallclock"]["seconds"] is None


def test_every_alias_of_the_published_port_is_known():
    published = (
        "DATA_PATH TOKENIZER_PATH RUN_ID LOAD_MODEL_PATH SEED ITERATIONS WARMDOWN_ITERS WARMUP_STEPS "
        "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MAX_WALLCLOCK_SECONDS VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY "
        "EVAL_STRIDE EVAL_BATCH_SEQS VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT "
        "TIE_EMBEDDINGS ROPE_BASE LOGIT_SOFTCAP QK_GAIN_INIT BIGRAM_VOCAB_SIZE BIGRAM_DIM TIED_EMBED_LR "
        "TIED_EMBED_INIT_STD EMBED_LR HEAD_LR MATRIX_LR SCALAR_LR MUON_MOMENTUM MUON_BACKEND_STEPS "
        "MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM "
        "WEIGHT_DECAY SWA_ENABLED SWA_START_FRAC SWA_EVERY "
    ).split()
    assert set(published) == {*PLAIN, *SPECIAL}
    with pytest.raises(UserError, match="MAX_WALLCLOCK_SECONDS=600s is not a number"):
        alias_options({"MAX_WALLCLOCK_SECONDS": "600s"}, "fit")
    with pytest.raises(UserError, match="TIE_EMBEDDINGS=true is not a number"):  # it would untie them
        alias_options({"TIE_EMBEDDINGS": "true"}, "fit")
    options, lines = alias_options({"SWA_ENABLED": "0", "LOAD_MODEL_PATH": "m.ckpt", "VAL_LOSS_EVERY": "0"}, "fit")
    assert options == ["--trainer.limit_val_batches=0", "--averaging.method=null"]
    assert any("no effect on fit" in line for line in lines)
    assert alias_options({"SWA_START_FRAC": "0"}, "fit")[0] == ["--averaging.method=null"]
    for name in ZERO_IS_NULL:  # the published script's 0 is our null
        assert alias_options({name: "0"}, "fit")[0] == [f"--{key}=null" for key in PLAIN[name]]
        assert alias_options({name: "7"}, "fit")[0] == [f"--{key}=7" for key in PLAIN[name]]


def test_precision_is_chosen_by_what_the_device_has():
    assert resolve_precision("auto", on_gpu=True, has_bf16=True) == "bf16-mixed"
    assert resolve_precision("auto", on_gpu=True, has_bf16=False) == "16-mixed"
    assert resolve_precision("auto", on_gpu=False, has_bf16=False) == "32-true"
    assert resolve_precision("16-mixed", on_gpu=True, has_bf16=True) == "16-mixed"
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        resolve_precision("16-mixed", on_gpu=False, has_bf16=False)


def test_the_source_bundle_runs_alone(finished, tmp_path: Path):
    folder, _ = finished
    bundle = folder / RUNS / "1/train_gpt.py"
    (tmp_path / "train_gpt.py").write_bytes(bundle.read_bytes())
    result = subprocess.run(
        [sys.executable, "train_gpt.py", "fit", "--print_config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    shown, recipe = yaml.safe_load(result.stdout), yaml.safe_load((recipe_folder() / "quickstart.yaml").read_text())
    assert shown["model"]["num_layers"] == recipe["model"]["num_layers"]
    assert shown["data"]["source"]["init_args"]["folder"] == "data/python-documentation"


def test_the_shards_of_the_tests_hold_enough(shard_folder: Path):
    tokens = open_shard(shard_folder / "words_val_000000.bin")
    assert len(plan_windows(len(tokens) - 1, 256, 64).starts) > 2


STOPPING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize(("number", "code"), STOPPING)
def test_a_stopped_run_saves_and_exits_with_the_documented_code(number, code: int, tmp_path: Path, shard_folder: Path):
    args = small(
        shard_folder,
        "--trainer.max_steps=1000000",
        "--trainer.val_check_interval=1000000",
        "--wallclock.seconds=100",
        "--progress.every_seconds=0.5",
    )
    command = [sys.executable, "-m", "trainer", *args]
    heed = partial(signal.signal, number, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and hand that on
    pipe = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heed}
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipe) as process:
        assert process.stdout is not None
        assert any(line.startswith("step") for line in process.stdout)
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(60) == code
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] > 0
