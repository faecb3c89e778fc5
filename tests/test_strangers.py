"""What strangers' habits and files do to a run: nothing false is printed, nothing is lost, nothing foreign is run."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import make_documents
from tests.helpers import RUNS, environment, run_faulty, score_of, small, trainer, trainer_here
from trainer.callbacks.wallclock import WallclockCutoff
from trainer.checkpoint import METADATA_KEY, append_checksum, load_checkpoint, stored_average
from trainer.cli.resume import newest_checkpoint
from trainer.comparison import why_incomparable
from trainer.data.documents import find_files
from trainer.data.shards import open_shard, write_shard
from trainer.data.sources import LocalText
from trainer.errors import UserError
from trainer.files import PARTIAL, copy_file, remove_partials
from trainer.recipes import load_recipe
from trainer.run_folder import RunFolder

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    result = trainer(*small(shard_folder, "--checkpoints.every=3"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def lines(output: str, name: str) -> list[str]:
    """The numbers of the lines that begin with a name."""
    return [line.removeprefix(name).strip() for line in output.splitlines() if line.startswith(f"{name} ")]


def last_line(*args: str, cwd: Path) -> str:
    """The last line that a command prints."""
    result = trainer_here(*args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def resave(path: Path, **metadata: object) -> None:
    """Write a checkpoint again with other metadata."""
    checkpoint = load_checkpoint(path)
    checkpoint[METADATA_KEY] |= metadata
    path.unlink()
    torch.save(checkpoint, path)
    with path.open("r+b") as file:
        append_checksum(file)


# --- Lightning under SLURM


def test_a_signal_under_slurm_saves_a_whole_step_and_nothing_else(tmp_path: Path, shard_folder: Path):
    args = [*small(shard_folder, "--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000")]
    args += ["--wallclock.seconds=100", "--progress.every_seconds=0.5"]
    command = [sys.executable, "-m", "trainer", *args]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(**SLURM), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("step") for line in process.stdout)
        process.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGUSR1
    assert f"is saved; resume with --config {RUNS}/1/config.yaml --ckpt {RUNS}/1/checkpoints/last.ckpt" in rest
    assert not list(tmp_path.rglob("hpc_ckpt_*"))


def test_no_command_loads_a_checkpoint_that_nobody_named(
    copied: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    shutil.copy(copied / RUNS / "1/checkpoints/last.ckpt", copied / "runs/hpc_ckpt_1.ckpt")
    result = trainer_here(*small(shard_folder, "--export.enabled=false"), cwd=copied)
    assert result.returncode == 0, result.stderr
    rows = (copied / RUNS / "2/metrics.csv").read_text().splitlines()
    assert ",0," in rows[1]  # from the first step on
    (copied / "runs/hpc_ckpt_2.ckpt").write_bytes(b"damaged")
    scored = score_of(trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", cwd=copied).stdout)
    assert scored["val_bpb"] == pytest.approx(json.loads((copied / RUNS / "1/summary.json").read_text())["val_bpb"])


# --- State that outlives its meaning


def test_an_extended_run_averages_its_own_end_alone(finished: Path, copied: Path, shard_folder: Path):
    before = load_checkpoint(copied / RUNS / "1/checkpoints/last.ckpt")
    assert before["callbacks"]["WeightAveraging"]["count"] >= 2
    longer = ["--trainer.max_steps=24", f"--ckpt={RUNS}/1/checkpoints/last.ckpt", "--export.enabled=false"]
    result = trainer_here(*small(shard_folder, *longer), cwd=copied)
    assert result.returncode == 0, result.stderr
    average = load_checkpoint(copied / RUNS / "2/checkpoints/last.ckpt")["callbacks"]["WeightAveraging"]
    assert average["count"] == 2  # of steps 22 and 24: the multiplier is below 0.6 after step 20.4


@pytest.mark.parametrize("weights", ["average", "live", "better"])
def test_the_weights_that_are_exported_can_be_chosen(weights: str, tmp_path: Path, shard_folder: Path):
    args = [
        f"--export.weights={weights}",
        "--data.held_out_tokens=500",
        "--eval.max_tokens=60",
        "--report.enabled=false",
    ]
    result = trainer_here(*small(shard_folder, *args), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    checkpoint = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert stored_average(checkpoint) is not None
    expected = {"average": "averaged", "live": "live"}.get(weights, summary["weights"])
    assert summary["weights"] == expected
    if weights == "better":
        line = next(line for line in result.stdout.splitlines() if "held-out training tokens" in line)
        assert line.startswith("on 499 held-out training tokens: live ")
        live, average = (float(word) for word in line.replace(",", "").split() if word[0].isdigit() and "." in word)
        assert summary["weights"] == ("live" if live < average else "averaged")
        of_both = ["validate", f"--ckpt={RUNS}/1/checkpoints/last.ckpt", "--split=held_out", "--eval.stride=null"]
        for name, expected_bpb in (("live", live), ("averaged", average)):  # of all 499, not of eval.max_tokens
            scored = score_of(trainer_here(*of_both, f"--weights={name}", cwd=tmp_path).stdout)
            assert (scored["tokens"], round(scored["val_bpb"], 5)) == (499, expected_bpb)


def test_without_an_artifact_the_score_is_that_of_the_chosen_weights(tmp_path: Path, shard_folder: Path):
    args = ["--export.weights=live", "--export.enabled=false", "--report.enabled=false"]
    result = trainer_here(*small(shard_folder, *args), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    assert summary["stages"]["averaged_plain"]["bpb"] != summary["stages"]["live_plain"]["bpb"]
    assert summary["val_bpb"] == summary["stages"]["live_plain"]["bpb"]


def test_shards_that_were_replaced_since_the_run_are_named(tmp_path: Path, shard_folder: Path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(400, 3)))
    text = ["--data.source=LocalText", "--data.source.train_files=t.jsonl"]
    text.append(f"--data.source.tokenizer={shard_folder}/tokenizer.model")
    options = [arg for arg in small(shard_folder, *text, "--report.enabled=false") if "source.folder" not in arg]
    assert trainer_here(*options, cwd=tmp_path).returncode == 0
    files = [f"--ckpt={RUNS}/1/{name}" for name in ("artifact.zst", "checkpoints/last.ckpt")]
    for file in files:
        assert "warning" not in trainer_here("validate", file, cwd=tmp_path).stdout
    with (tmp_path / "t.jsonl").open("a") as more:
        more.writelines(json.dumps({"text": text}) + "\n" for text in make_documents(400, 4))
    assert trainer_here("prepare", *text, cwd=tmp_path).returncode == 0
    for file in files:
        result = trainer_here("validate", file, cwd=tmp_path)
        assert "warning: data/t: some of its shards are not those of this run any more" in result.stdout, result.stderr
        assert "warning" not in trainer_here("validate", file, "--text=t.jsonl", cwd=tmp_path).stdout


def test_a_resumed_run_whose_time_is_over_counts_no_more():
    for spent, is_running in ((0.4, True), (1.5, False)):
        cutoff, loop = WallclockCutoff(1.0), SimpleNamespace(should_stop=False)
        cutoff.clock.load_state_dict({"elapsed": spent})
        cutoff.on_train_start(cast(Any, loop), cast(Any, None))
        before = cutoff.clock.elapsed
        time.sleep(0.01)
        assert (cutoff.clock.elapsed > before, loop.should_stop) == (is_running, not is_running)


def test_held_out_text_can_be_scored_by_itself(tmp_path: Path, shard_folder: Path):
    shutil.copytree(shard_folder, tmp_path / "data")
    result = trainer_here(*small(Path("data"), "--data.held_out_tokens=100", "--eval.max_tokens=null"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ckpt, split = f"--ckpt={RUNS}/1/artifact.zst", "--split=held_out"
    score = last_line("validate", ckpt, split, cwd=tmp_path)
    assert " tokens=99 " in score
    assert last_line("validate", ckpt, split, "--data.held_out_tokens=null", cwd=tmp_path) == score
    train = last_line("validate", ckpt, "--split=train", "--eval.max_tokens=1000000", cwd=tmp_path)
    tokens = [open_shard(tmp_path / f"data/words_train_00000{n}.bin") for n in (0, 1)]
    assert f" tokens={sum(map(len, tokens)) - 100 - 1} " in train
    # The same tokens as a validation split of their own.
    val = tmp_path / "data/words_val_000000.bin"
    before = val.read_bytes()
    write_shard(val, np.array(tokens[1][-100:]))
    assert last_line("validate", ckpt, cwd=tmp_path) == score
    val.write_bytes(before)
    checkpoint = f"--ckpt={RUNS}/1/checkpoints/last.ckpt"
    assert " tokens=99 " in last_line("validate", checkpoint, split, cwd=tmp_path)
    write_shard(tmp_path / "data/words_train_000001.bin", np.array(tokens[1][:-1]))
    for file in (ckpt, checkpoint):
        result = trainer_here("validate", file, split, cwd=tmp_path)
        assert (result.returncode, "data does not hold the text of this run" in result.stderr) == (1, True)
        result = trainer_here("validate", file, split, "--data.held_out_tokens=101", cwd=tmp_path)
        assert (result.returncode, "this run held out 100 tokens, not 101" in result.stderr) == (1, True)
    (tmp_path / RUNS / "1/summary.json").unlink()
    assert "is not beside it" in trainer_here("validate", ckpt, split, cwd=tmp_path).stderr


def test_a_rate_that_does_nothing_or_too_much_is_said(copied: Path):
    args = ["validate", f"--ckpt={RUNS}/1/artifact.zst", "--eval.stride=null"]
    quiet = trainer_here(*args, "--eval.batch_windows=1", "--eval.adapt_rate=0.01", cwd=copied)
    loud = trainer_here(*args, "--eval.adapt_rate=0.01", "--eval.max_tokens=64", cwd=copied)
    assert (quiet.returncode, loud.returncode) == (0, 0)
    assert "eval.adapt_rate had no effect" not in quiet.stdout + quiet.stderr
    plain = trainer_here(*args, "--eval.batch_windows=1", cwd=copied).stdout  # that of the model as it is has this name
    assert lines(quiet.stdout, "plain") == lines(plain, "plain")
    assert lines(quiet.stdout, "adapted") != lines(plain, "plain")
    assert "this text has too few; lower eval.batch_windows" in loud.stdout + loud.stderr
    whole = trainer_here(*args, "--eval.adapt_rate=0.01", "--eval.window=9999", "--eval.batch_windows=1", cwd=copied)
    assert "lower eval.window" in whole.stdout + whole.stderr


def test_what_no_run_held_out_is_not_scored_as_held_out(copied: Path):
    for options in ([], ["--data.held_out_tokens=50"]):
        result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", "--split=held_out", *options, cwd=copied)
        assert result.returncode == 1
        assert "--split held_out: this run trained on all of its text" in result.stderr


def test_better_needs_held_out_text_and_it_is_never_trained_on(tmp_path: Path, shard_folder: Path):
    result = trainer_here(*small(shard_folder, "--export.weights=better"), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "export.weights better needs data.held_out_tokens" in result.stderr
    result = trainer_here("fit", "--data.held_out_tokens=1", cwd=tmp_path)
    assert "data.held_out_tokens must be at least 2, or null for none, not 1" in result.stderr


# --- Identity of the text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("one less", "the train shards differ: words_train_000001.bin is missing"),
        ("one more", "the train shards differ: words_train_000002.bin is new"),
        ("other content", "the train shard words_train_000000.bin has another content"),
        ("validation as training", "is the validation shard"),
    ],
)
def test_resuming_on_another_text_is_refused(
    change: str, message: str, copied: Path, tmp_path: Path, shard_folder: Path
):
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    first, second, val = (shards / f"words_{name}.bin" for name in ("train_000000", "train_000001", "val_000000"))
    if change == "one less":
        second.unlink()
    elif change == "one more":
        write_shard(shards / "words_train_000002.bin", np.ones(100, dtype=np.uint16))
    elif change == "other content":
        content = bytearray(first.read_bytes())
        content[1030:1032] = content[1040:1042]
        first.write_bytes(content[:1024] + content[-2:] + content[1026:])
    else:
        shutil.copy(val, second)
    args = small(shards, f"--ckpt={RUNS}/1/checkpoints/step-000000006.ckpt")
    result = trainer_here(*args, cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr
    assert not (copied / RUNS / "2").exists()


def test_scores_of_other_texts_do_not_compare(copied: Path, capsys: pytest.CaptureFixture[str]):
    def run(**changes: object) -> Path:
        folder = copied / RUNS / str(len(list((copied / RUNS).iterdir())) + 1)
        shutil.copytree(copied / RUNS / "1", folder)
        summary = json.loads((folder / "summary.json").read_text()) | changes
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    def why(one: Path, two: Path) -> str | None:
        return why_incomparable(RunFolder(one).read(), RunFolder(two).read())

    first, same = run(), run(val_bpb=1.0)
    assert why(first, same) is None  # shards without a manifest, but the same ones
    assert why(first, run(shards_fingerprint="0")) == "other text"
    assert why(first, run(tokenizer_sha256="0", shards_fingerprint="0")) == "text unknown"
    prepared = run(text_fingerprint="a")
    assert why(prepared, run(text_fingerprint="a", tokenizer_sha256="0", shards_fingerprint="0")) is None
    other = run(text_fingerprint="b")
    assert why(prepared, other) == "other text"
    assert why(first, run(val_bytes=3)) == "another part of the text"
    result = trainer_here("report", str(prepared), str(other), cwd=copied)
    assert result.returncode == 0, result.stderr
    assert "do not compare" in result.stdout
    page = (prepared / "report.html").read_text()
    assert "(other text)" in page
    assert "(+0.00000)" not in page


# --- Seeds, empty values, recipes


def test_the_seed_of_the_order_follows_seed_everything(tmp_path: Path, shard_folder: Path):
    seeds = {}
    for number, args in enumerate((["--seed_everything=5"], ["--seed_everything=5", "--data.seed=9"]), 1):
        short = ["--trainer.max_steps=1", "--export.enabled=false", "--data.order=shuffled"]
        result = trainer_here(*small(shard_folder, *short, *args), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / RUNS / str(number)
        seeds[number] = load_checkpoint(folder / "checkpoints/last.ckpt")[METADATA_KEY]["seed"]
    assert seeds == {1: 5, 2: 9}
    assert yaml.safe_load((tmp_path / RUNS / "1/config.yaml").read_text())["data"]["seed"] is None  # as it was given


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--ckpt", ""],
        ["fit", "--config", ""],
        ["fit", "--run_name", ""],
        ["fit", "--data.source", "Shards", "--data.source.folder", ""],
        ["fit", "--data.source", "Shards", "--data.source.folder", "x", "--data.source.tokenizer="],
        ["fit", "--data.source", "LocalText", "--data.source.folder", "x", "--data.source.train_files", '[""]'],
        ["fit", "--trainer.default_root_dir", ""],
        ["validate", "--ckpt="],
        ["prepare", "--config", ""],
        ["prepare", "--data.source", "LocalText", "--data.source.folder", "", "--data.source.train_files", "[x]"],
        ["export", "--ckpt", ""],
        ["export", "--ckpt", "x", "--out", ""],
        ["generate", "--artifact", ""],
        ["generate", "--artifact", "x", "--tokenizer", ""],
        ["report", ""],
        ["inspect", ""],
        ["submit", "", "--name=a", "--author=a", "--github_id=a", "--track=a", "--data=a"],
        ["submit", "x", "--name=a", "--author=", "--github_id=a", "--track=a", "--data=a"],
    ],
)
def test_an_empty_value_is_refused(args: list[str], tmp_path: Path):
    result = trainer_here(*args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "its value is empty (an unset variable?); give one, or leave the option out" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path):
    for text, message in (
        ("model:\n  num_layers: 3\nmodel:\n  model_dim: 96\n", "line 3: the key 'model' is on line 1, too"),
        ("model:\n  num_layers: 3\n  num_layers: 4\n", "line 3: the key 'num_layers' is on line 2, too"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        for command in ("fit", "prepare"):
            result = trainer_here(command, "--config=mine.yaml", cwd=tmp_path)
            assert (result.returncode, result.stderr.count("\n")) == (1, 1)
            assert f"--config mine.yaml: {message}" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--seed_everything=4294967296"], "seed_everything must be between 0 and 4294967295"),
        (["fit", "--seed_everything=-1"], "seed_everything must be between 0 and 4294967295, not -1"),
        (["fit", "--eval.window=128", "--eval.stride=129"], "eval.stride must be at most eval.window 128"),
        (["fit", f"--ckpt={RUNS}/1/artifact.zst"], "is an artifact, which only holds rounded weights"),
        (["export", f"--ckpt={RUNS}/1/artifact.zst"], "is an artifact, which only holds rounded weights"),
        (["fit", f"--ckpt={RUNS}/1"], "is a folder; give a file in it, such as checkpoints/last.ckpt"),
        (["validate", f"--ckpt={RUNS}/1"], "is a folder; give a file in it, such as artifact.zst"),
    ],
)
def test_the_message_says_what_is_wrong(args: list[str], message: str, finished: Path):
    result = trainer_here(*args, cwd=finished)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


# --- Output that cannot be written


def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path, shard_folder: Path):
    command = [sys.executable, "-m", "trainer", *small(shard_folder)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
    assert (tmp_path / RUNS / "1/summary.json").is_file()
    assert "Run finished" in (tmp_path / RUNS / "1/train.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_outlives_a_full_disk_under_its_output(tmp_path: Path, shard_folder: Path):
    command = [sys.executable, "-m", "trainer", *small(shard_folder)]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=full, stderr=full, timeout=120, check=False
        )
    assert ended.returncode == 0
    assert (tmp_path / RUNS / "1/summary.json").is_file()


def test_output_that_is_not_utf8_shows_escapes(finished: Path):
    args = ["-m", "trainer", "generate", f"--artifact={RUNS}/1/artifact.zst", "--prompt=the 猫", "--tokens=1"]
    variables = environment(PYTHONIOENCODING="latin-1")
    result = subprocess.run(
        [sys.executable, *args], cwd=finished, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the \\u732b")


# --- Files of a run


def test_what_a_killed_save_left_is_removed_by_the_next_run(tmp_path: Path, shard_folder: Path):
    folder = tmp_path / RUNS / "1/checkpoints"
    folder.mkdir(parents=True)
    old, young = folder / f".step-000000003.ckpt.77{PARTIAL}", folder / f".step-000000004.ckpt.78{PARTIAL}"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 1000, time.time() - 1000))
    result = trainer_here(*small(shard_folder, "--trainer.max_steps=1", "--export.enabled=false"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not old.exists()
    assert young.exists()  # perhaps it is just being written


def test_a_partial_file_that_is_being_written_stays(tmp_path: Path):
    path = tmp_path / f".a.1{PARTIAL}"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (0, 0))
        remove_partials(tmp_path)
        assert path.exists()
    remove_partials(tmp_path)
    assert not path.exists()


def test_the_newest_checkpoint_is_known_by_its_content(copied: Path, capsys: pytest.CaptureFixture[str]):
    """A plain copy gives the files new times, in any order."""
    folder = copied / RUNS / "1/checkpoints"
    (folder / "last.ckpt").unlink()
    os.utime(folder / "step-000000006.ckpt", (time.time() + 100, time.time() + 100))
    assert newest_checkpoint(copied / RUNS) == folder / "step-000000008.ckpt"
    os.rename(folder / "step-000000008.ckpt", folder / "step-000000001.ckpt")  # its name does not count either
    assert newest_checkpoint(copied / RUNS) == folder / "step-000000001.ckpt"
    assert capsys.readouterr().out == ""
    later = copied / RUNS / "2/checkpoints"
    later.mkdir(parents=True)
    shutil.copy(folder / "step-000000006.ckpt", later / "step-000000006.ckpt")
    resave(later / "step-000000006.ckpt", saved_at=time.time() + 50)
    assert newest_checkpoint(copied / RUNS) == later / "step-000000006.ckpt"  # of the run that saved last
    message = capsys.readouterr().out
    assert "takes" in message
    assert f"there are {folder}/step-000000001.ckpt (step 8), too" in message


def test_a_file_that_is_copied_is_whole_and_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_bytes(b"content")
    with pytest.raises(UserError, match="a: is not the file that the run was made with"):
        copy_file(tmp_path / "a", tmp_path / "b", "0" * 64)
    with pytest.raises(UserError, match="none: cannot be read"):
        copy_file(tmp_path / "none", tmp_path / "b")

    for number, reason in ((28, "free some space"), (13, "check the permissions"), (30, "choose another place")):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, "no way")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=rf"b: cannot be written \(no way\); {reason}"):
            copy_file(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_export_refuses_a_tokenizer_that_was_cut(copied: Path):
    tokenizer = copied / RUNS / "1/tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes()[:1000])
    result = trainer_here("export", f"--ckpt={RUNS}/1/checkpoints/last.ckpt", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "tokenizer.model: is not the file that the run was made with" in result.stderr
    assert not (copied / RUNS / "1/export/tokenizer.model").exists()


def test_a_last_row_that_was_cut_is_left_out(copied: Path):
    (copied / RUNS / "1/artifact.zst").unlink()  # its pages take long
    metrics = copied / RUNS / "1/metrics.csv"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, lines[-1][:5]]))
    result = trainer_here("report", f"{RUNS}/1", cwd=copied)
    assert result.returncode == 0, result.stderr
    assert "metrics.csv: its last row is truncated, and left out" in result.stdout
    metrics.write_text("\n".join([lines[0], "x,y", *lines[1:]]))
    result = trainer_here("report", f"{RUNS}/1", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "metrics.csv: row 1 is not whole" in result.stderr


# --- Results that are no numbers


def test_no_command_succeeds_with_a_score_that_is_not_a_number(copied: Path, shard_folder: Path):
    folder = copied / RUNS / "1"
    checkpoint = load_checkpoint(folder / "checkpoints/last.ckpt")
    checkpoint["state_dict"]["model.blocks.1.mlp.up.weight"][0, 0] = float("nan")
    (folder / "checkpoints/last.ckpt").unlink()
    torch.save(checkpoint, folder / "checkpoints/last.ckpt")
    with (folder / "checkpoints/last.ckpt").open("r+b") as file:
        append_checksum(file)
    scored = trainer_here("validate", f"--ckpt={folder}/checkpoints/last.ckpt", cwd=copied)
    assert (scored.returncode, scored.stderr.count("\n")) == (1, 1), scored.stderr
    assert "the score is not a number" in scored.stderr
    assert "val_bpb=" not in scored.stdout
    summary = (folder / "summary.json").read_text()
    score = json.loads(summary)["val_bpb"]
    (folder / "summary.json").write_text(summary.replace(str(score), "NaN"))
    for command in (["report", str(folder)], ["submit", str(folder), "--name=a", "--author=a", "--github_id=a"]):
        args = ["--track=a", f"--data={shard_folder}"] if command[0] == "submit" else []
        result = trainer_here(*command, *args, cwd=copied)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "it holds NaN, which is not a number" in result.stderr
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(folder).write_summary({"val_bpb": float("nan")})


def test_weights_that_overflow_when_stored_end_the_run(tmp_path: Path, shard_folder: Path):
    """Finite in float32, but not as float16: the scale of a control tensor."""
    result = run_faulty("at_step", {"step": 7, "fault": "huge_weight"}, *small(shard_folder), cwd=tmp_path)
    assert result.returncode == 1
    assert "cannot store (not finite, or too large)" in result.stderr
    assert not (tmp_path / RUNS / "1/summary.json").exists()


# --- Trust


class Planted:
    """A class that tells when it is made."""

    def __init__(self, folder: str) -> None:
        Path(folder).write_text("ran")


FOREIGN = {"class_path": "tests.test_strangers.Planted", "init_args": {"folder": "planted"}}


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"source": FOREIGN}},
        {"data": {"source": "tests.test_strangers.Planted"}},
        {"data": {"source.class_path": "tests.test_strangers.Planted", "source.init_args.folder": "planted"}},
        {"data": {"source": {"class_path": "trainer.data.sources.Shards", "init_args": "other.yaml"}}},
        {"data": {"source": {**FOREIGN, "class_path": "trainer.data.sources.Source"}}},
        {"data": {"evaluation": FOREIGN}},
        {"data": {"order": FOREIGN}},
        {"data": {"seed": "other.yaml"}},
        {"data": json.dumps({"source": FOREIGN})},
        {"data": "other.yaml"},
        {"eval": "other.yaml"},
        {"eval": {"stride": FOREIGN}},
        {"precision": FOREIGN},
    ],
)
def test_a_config_beside_an_artifact_runs_nothing(
    change: dict[str, Any], copied: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    path = copied / RUNS / "1/config.yaml"
    config = yaml.safe_load(path.read_text())
    for room, values in change.items():
        config[room] = config[room] | values if isinstance(values, dict) and room != "precision" else values
    path.write_text(yaml.safe_dump(config))
    (copied / "other.yaml").write_text(yaml.safe_dump({"source": FOREIGN, "stride": None}))
    result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    is_text = any(isinstance(values, str) for values in change.values())
    assert ("is a group of options, not" if is_text else "which nobody named on the command line") in result.stderr
    assert not (copied / "planted").exists()


@pytest.mark.parametrize("room", ["trainer", "model", "averaging", "report"])
def test_other_settings_beside_an_artifact_are_not_taken(room: str, copied: Path, shard_folder: Path):
    path = copied / RUNS / "1/config.yaml"
    config = yaml.safe_load(path.read_text())
    config[room] |= {"callbacks": [FOREIGN], "logger": FOREIGN, "evil": 3}
    path.write_text(yaml.safe_dump(config))
    result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", cwd=copied)
    assert result.returncode == 0, result.stderr
    assert not (copied / "planted").exists()
    config["data"]["source"] = FOREIGN  # replaced on the command line
    path.write_text(yaml.safe_dump(config))
    source = ["--data.source=Shards", f"--data.source.folder={shard_folder}"]
    result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", *source, cwd=copied)
    assert result.returncode == 0, result.stderr
    assert not (copied / "planted").exists()


def test_validate_makes_no_text(copied: Path, tmp_path: Path):
    missing = tmp_path / "gone"
    path = copied / RUNS / "1/config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["source"] = {
        "class_path": "trainer.data.sources.PythonDocumentation",
        "init_args": {"folder": str(missing)},
    }
    path.write_text(yaml.safe_dump(config))
    result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert f"{missing}: is not a folder; prepare it" in result.stderr
    assert not missing.exists()


def test_shards_of_another_tokenizer_are_not_scored(copied: Path, tmp_path: Path, shard_folder: Path):
    texts = [" ".join(random.Random(seed).choices("other words in this text".split(), k=30)) for seed in range(60)]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    LocalText([str(tmp_path / "u.jsonl")], str(tmp_path / "u"), val_every=4, vocab_size=300).prepare()
    args = [
        "--data.source=Shards",
        f"--data.source.folder={tmp_path}/u",
        f"--data.source.tokenizer={RUNS}/1/tokenizer.model",
    ]
    result = trainer_here("validate", f"--ckpt={RUNS}/1/artifact.zst", *args, cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "is not the tokenizer that made the shards" in result.stderr


def test_the_folder_of_another_source_is_not_replaced(tmp_path: Path):
    texts = [" ".join(random.Random(seed).choices("some words of a text to keep".split(), k=30)) for seed in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    LocalText(
        [str(tmp_path / "t.jsonl")], str(tmp_path / "data/python-documentation"), val_every=4, vocab_size=300
    ).prepare()
    before = (tmp_path / "data/python-documentation/manifest.json").read_bytes()
    for args in (["fit"], ["prepare"], ["prepare", "--config=quickstart"]):
        result = trainer_here(*args, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "holds the shards of the source LocalText, not PythonDocumentation; to read them, use" in result.stderr
        assert (tmp_path / "data/python-documentation/manifest.json").read_bytes() == before


@pytest.mark.parametrize("spelling", ["--data.source=LocalText", "--data.source.class_path=LocalText", "two recipes"])
def test_another_source_never_inherits_the_folder(spelling: str, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    if spelling == "two recipes":
        source = {"class_path": "LocalText", "init_args": {"train_files": ["t.jsonl"]}}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"source": source}}))
        commands = [["fit", "--config=quickstart", "--config=mine.yaml"]]
    else:
        commands = [
            [name, "--config=quickstart", spelling, "--data.source.train_files=[t.jsonl]"]
            for name in ("fit", "prepare")
        ]
    for command in commands:
        result = trainer_here(*command, cwd=tmp_path)
        assert result.returncode == 1, result.stderr
        assert "too short to train a tokenizer" in result.stderr
        assert not (tmp_path / "data/python-documentation").exists()  # data/t would hold its shards


def test_export_stores_the_weights_that_the_run_would_and_never_over_a_run(tmp_path: Path, shard_folder: Path):
    args = ["--export.weights=live", "--averaging.start_frac=1.0", "--averaging.every=1", "--report.enabled=false"]
    assert trainer_here(*small(shard_folder, *args), cwd=tmp_path).returncode == 0
    folder = tmp_path / RUNS / "1"
    before = (folder / "artifact.zst").read_bytes()
    result = trainer_here("export", f"--ckpt={folder}/checkpoints/last.ckpt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "stored the live weights of step 8" in result.stdout
    assert (folder / "export/artifact.zst").read_bytes() == before
    result = trainer_here("export", f"--ckpt={folder}/checkpoints/last.ckpt", f"--out={folder}", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "is the folder of a run, whose artifact would be replaced" in result.stderr
    result = trainer_here("report", str(folder), f"--out={folder}/artifact.zst", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "a report is an HTML file" in result.stderr
    assert (folder / "artifact.zst").read_bytes() == before
    (tmp_path / "best.ckpt").symlink_to(folder / "checkpoints/last.ckpt")
    for ckpt, cwd in (("best.ckpt", tmp_path), ("last.ckpt", folder / "checkpoints")):
        result = trainer_here("validate", f"--ckpt={ckpt}", cwd=cwd)
        assert result.returncode == 0, result.stderr
    result = trainer_here("export", "--ckpt=last.ckpt", f"--out={tmp_path}/e", cwd=folder / "checkpoints")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "e").iterdir()} >= {"artifact.zst", "tokenizer.model", "config.yaml"}


def test_no_command_replaces_a_file_of_something_else(tmp_path: Path, shard_folder: Path):
    assert trainer_here(*small(shard_folder), cwd=tmp_path).returncode == 0
    run = f"{RUNS}/1"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train_gpt.py").write_text("mine")
    (tmp_path / "page.html").write_text("<html>mine</html>")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "tokenizer.model").write_bytes(b"another one")
    export = ["export", f"--ckpt={run}/checkpoints/last.ckpt"]
    documents = ["validate", f"--ckpt={run}/artifact.zst"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, message in (
        ([*export, "--out=mine"], "--out mine: its train_gpt.py was not written by an export and would be overwritten"),
        ([*export, f"--out={shards}"], "its tokenizer.model was not written by an export"),
        ([*documents, f"--per_document={run}/metrics.csv"], "metrics.csv: holds something else, which would be lost"),
        (["runs", f"--csv={run}/metrics.csv"], "metrics.csv: holds something else, which would be lost"),
        (["report", run, "--out=page.html"], "page.html: holds something else, which would be lost"),
    ):
        result = trainer_here(*words, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert message in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "e").mkdir()
    shutil.copy(tmp_path / run / "config.yaml", tmp_path / "e")  # an export that was stopped
    (tmp_path / "e/.DS_Store").touch()
    (tmp_path / "d.csv").write_text("document,source,tokens\n")  # of an earlier version
    for words in ([*export, "--out=e"], [*documents, "--per_document=d.csv"], ["runs", "--csv=r.csv"], ["report", run]):
        for _ in range(2):  # its own file is replaced
            result = trainer_here(*words, cwd=tmp_path)
            assert result.returncode == 0, result.stderr


def test_validate_names_the_options_that_change_no_score(copied: Path):
    ckpt = f"--ckpt={RUNS}/1/artifact.zst"
    plain = trainer_here("validate", ckpt, "--model.compile=off", "--eval.stride=null", cwd=copied)
    assert "no effect" not in plain.stdout
    words = ["--model.num_layers=5", "--trainer.max_steps", "1", "--wallclock.seconds=5", "--run_name=x"]
    result = trainer_here("validate", ckpt, "--eval.stride=null", *words, cwd=copied)
    named = "--model.num_layers, --run_name, --trainer.max_steps, --wallclock.seconds"
    assert f"warning: {named}: no effect on trainer validate" in result.stdout
    assert score_of(result.stdout) == score_of(plain.stdout)


def test_a_file_may_have_the_letters_of_a_pattern_in_its_name(tmp_path: Path):
    (tmp_path / "a [b]").mkdir()
    (tmp_path / "a [b]/c*.txt").write_text("text")
    assert find_files([str(tmp_path / "a [b]/c*.txt")]) == [tmp_path / "a [b]/c*.txt"]


def test_the_weights_given_last_are_scored(copied: Path):
    ckpt = f"--ckpt={RUNS}/1/checkpoints/last.ckpt"
    live, averaged, last = (
        score_of(trainer_here("validate", ckpt, *(f"--weights={name}" for name in names), cwd=copied).stdout)
        for names in (["live"], ["averaged"], ["averaged", "live"])
    )
    assert last == live != averaged
    (copied / "w.yaml").write_text("weights: averaged\n")
    result = trainer_here("validate", ckpt, f"--config={RUNS}/1/config.yaml", "--config=w.yaml", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "in a config has no effect; give --weights averaged" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--wallclock.seconds=.nan"], "--wallclock.seconds: must be a finite number, not nan"),
        (["--model.optimizer.matrix_lr=.inf"], "--model.optimizer.matrix_lr: must be a finite number, not inf"),
        (["--data.source.vocab_size=-5"], "data.source.vocab_size must be between 261 and 65,536, not -5"),
        (["--data.source.folder=."], "is the current folder, or holds it; choose another data.source.folder"),
        (["--config=merge.yaml"], "--config merge.yaml: line 1: the key ['a', 'b'] is not a name"),
        (["--config=date.yaml"], "--config date.yaml: is not a recipe (month must be in 1..12)"),
        (["--config=loop.yaml"], "--config loop.yaml: "),
    ],
)
def test_numbers_and_recipes_that_are_none_are_refused(args: list[str], message: str, tmp_path: Path):
    (tmp_path / "merge.yaml").write_text("? [a, b]\n: 1\n")
    (tmp_path / "date.yaml").write_text("run_name: 2026-13-45\n")
    (tmp_path / "loop.yaml").write_text("data:\n" + "[" * 3000)
    result = trainer_here("fit", *args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


def test_merge_keys_and_null_work(tmp_path: Path, shard_folder: Path):
    text = "a: &a\n  num_layers: 3\nmodel:\n  <<: *a\n  model_dim: 64\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_recipe(tmp_path / "a.yaml")["model"] == {"num_layers": 3, "model_dim": 64}
    short = ["--trainer.max_steps=1", "--export.enabled=false", "--ckpt=null", "--run_name=\u00b2"]
    for args in (short, short[:2]):  # a name that looks like a number does not end the next run
        result = trainer_here(*small(shard_folder, *args), cwd=tmp_path)
        assert result.returncode == 0, result.stderr


def test_validation_text_without_a_byte_is_refused_before_training(tmp_path: Path, shard_folder: Path):
    shutil.copytree(shard_folder, tmp_path / "shards")
    write_shard(tmp_path / "shards/words_val_000000.bin", np.ones(400, dtype=np.uint16))
    result = trainer_here(*small(tmp_path / "shards"), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "the text to score has no bytes" in result.stderr
    assert not (tmp_path / RUNS / "1").exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_closed_output_is_no_traceback(command: str, copied: Path, shard_folder: Path):
    args = (
        small(shard_folder, "--export.enabled=false")
        if command == "fit"
        else ["validate", f"--ckpt={RUNS}/1/artifact.zst"]
    )
    line = " ".join([sys.executable, "-m", "trainer", *args, ">&-"])
    ended = subprocess.run(
        ["/bin/sh", "-c", line], cwd=copied, env=environment(), stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_score_that_cannot_be_printed_is_no_success(finished: Path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "trainer", "validate", f"--ckpt={RUNS}/1/artifact.zst"]
        ended = subprocess.run(
            command, cwd=finished, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode != 0
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"val_bpb": None},
        {"val_bpb": "1.0"},
        {"stages": []},
        {"stages": {"a": {"bpb": 1}}},
        {"versions": 3},
        {"steps": None},
    ],
)
def test_a_changed_summary_is_refused(changes: dict[str, Any], copied: Path):
    path = copied / RUNS / "1/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    result = trainer_here("report", f"{RUNS}/1", cwd=copied)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert f"summary.json: {next(iter(changes))} is missing or invalid" in result.stderr


@pytest.mark.parametrize(
    "metadata",
    [{"model": None}, {"model": {"zzz": 1}}, {"model": {"num_layers": "2"}}, {"quantization": {"zzz": 1}}, "none"],
)
def test_a_checkpoint_of_another_version_is_refused(metadata: dict[str, Any] | str, copied: Path, shard_folder: Path):
    ckpt = copied / RUNS / "1/checkpoints/last.ckpt"
    checkpoint = load_checkpoint(ckpt)
    checkpoint[METADATA_KEY] = {} if isinstance(metadata, str) else checkpoint[METADATA_KEY] | metadata
    ckpt.unlink()
    torch.save(checkpoint, ckpt)
    with ckpt.open("r+b") as file:
        append_checksum(file)
    commands = [small(shard_folder, f"--ckpt={ckpt}"), ["export", f"--ckpt={ckpt}"]]
    if metadata != {"quantization": {"zzz": 1}}:
        commands += [["validate", f"--ckpt={ckpt}"], ["generate", f"--artifact={ckpt}", "--tokens=1"]]
    for command in commands:
        result = trainer_here(*command, cwd=copied)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "was written by another version of this trainer" in result.stderr


# --- Launchers and code


def test_torchrun_on_cpus_makes_one_run(tmp_path: Path, shard_folder: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer"]
    args = small(shard_folder, "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--export.enabled=false")
    result = subprocess.run(
        [*command, *args], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Run finished") == 1
    assert [path.name for path in (tmp_path / RUNS).iterdir()] == ["1"]


def test_the_script_that_ships_compiles_and_starts_several_processes(
    finished: Path, tmp_path: Path, shard_folder: Path
):
    script = finished / RUNS / "1/train_gpt.py"
    compile(script.read_bytes(), "train_gpt.py", "exec")
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=2", "--export.enabled=false"]
    variables = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-P", str(script), *small(shard_folder, *two)], cwd=tmp_path, env=variables,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Run finished") == 1


def test_the_code_that_ships_is_that_of_the_start(tmp_path: Path, shard_folder: Path):
    """The sources change while the run trains."""
    result = run_faulty("at_step", {"step": 5, "fault": "change_sources"}, *small(shard_folder), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / RUNS / "1"
    metadata = load_checkpoint(folder / "checkpoints/last.ckpt")[METADATA_KEY]
    summary = json.loads((folder / "summary.json").read_text())
    shipped = hashlib.sha256((folder / "train_gpt.py").read_bytes()).hexdigest()
    assert shipped == metadata["code_sha256"] == summary["code_sha256"]
    resave(folder / "checkpoints/last.ckpt", code_sha256="0" * 64)
    result = trainer_here("export", f"--ckpt={folder}/checkpoints/last.ckpt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the code has changed since the run" in result.stdout
