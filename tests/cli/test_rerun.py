"""A run is repeated from its folder: the same losses, or a line that says what has changed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY_OPTIONS, make_documents
from tests.helpers import trainer, trainer_here
from trainer.cli.rerun import _changed_files
from trainer.run_folder import RunFolder
from trainer.source_bundle import script_of, source_bundle, sources_of

RUN = "runs/int5mlp_10l_parity/first"


@pytest.fixture(scope="module")
def place(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rerun")
    shutil.copytree(shard_folder, folder / "shards")
    options = [*TINY_OPTIONS, "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
    source = ["--data.source=Shards", "--data.source.folder=shards", "--data.order=shuffled", "--seed_everything=7"]
    result = trainer("fit", "--config=int5mlp_10l_parity", *options, *source, "--run_name=first", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_on_a_cpu_has_the_same_losses_again(place: Path):
    before = (place / RUN / "summary.json").read_bytes()
    result = trainer("rerun", RUN, MATRIX_LR="0.5", cwd=place)  # a variable of the published script has no effect
    assert result.returncode == 0, result.stderr
    assert "int5mlp_10l_parity/1 has the losses of int5mlp_10l_parity/first at all 4 logged steps" in result.stdout
    assert "warning" not in result.stdout + result.stderr
    copy = place / "runs/int5mlp_10l_parity/copy"
    shutil.copytree(place / RUN, copy)
    last = f"--ckpt={copy}/checkpoints/last.ckpt"
    refused = trainer(
        "fit", f"--config={copy}/config.yaml", last, "--trainer.max_steps=3", "--run_name=less", cwd=place
    )
    assert refused.stderr.endswith("the checkpoint has 4 steps already; give at least as many, or an earlier --ckpt\n")
    (copy / "metrics.csv").unlink()
    nothing = trainer("rerun", str(copy), "--run_name=2", cwd=place)
    assert nothing.returncode == 1
    assert "no step was logged by both int5mlp_10l_parity/copy and" in nothing.stderr
    losses = [RunFolder(place / name).read().curves["train/loss"] for name in (RUN, "runs/int5mlp_10l_parity/1")]
    assert losses[0] == losses[1]
    assert (place / RUN / "summary.json").read_bytes() == before


def test_what_has_changed_is_said_before_the_losses_are_compared(place: Path, tmp_path: Path):
    old = tmp_path / RUN
    shutil.copytree(place / RUN, old)
    sources = sources_of(source_bundle())
    sources["trainer/step.py"] += b"# older\n"
    (old / "train_gpt.py").write_bytes(script_of(sources))
    summary = json.loads((old / "summary.json").read_text())
    summary["code_sha256"], summary["versions"]["torch"] = "0" * 64, "2.10.0"
    (old / "summary.json").write_text(json.dumps(summary))
    rows = (old / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    last = rows[-1].split(",")
    if not last[column]:
        rows, last = rows[:-1], rows[-2].split(",")
    last[column] = "1.5"
    (old / "metrics.csv").write_text("\n".join([*rows[:-1], ",".join(last)]) + "\n")
    for code in (b"print('hello')", b"no Python", b"x = '1234'"):
        (old / "train_gpt.py").write_bytes(code)
        assert "which files differ is not known" in _changed_files(RunFolder(old), source_bundle())
    (old / "train_gpt.py").write_bytes(script_of(sources))
    result = trainer("rerun", str(old), "--data", str(place / "shards"), "--run_name=again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "the trainer's code is not that of int5mlp_10l_parity/first: 1 file changed: trainer/step.py" in said
    assert "torch 2.10.0 is " in said
    assert "differ from those of int5mlp_10l_parity/first from step" in said


def test_a_text_that_would_be_made_anew_stays_as_it_is(tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, document in enumerate(make_documents(300, 3)):
        (texts / f"{number}.txt").write_text(document)
    options = [*TINY_OPTIONS, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    source = ["--data.source=LocalText", "--data.source.train_files=texts", "--data.source.folder=mine"]
    result = trainer("fit", "--config=int5mlp_10l_parity", *options, *source, "--run_name=first", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shards = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    (texts / "0.txt").write_text("another text")
    result = trainer("rerun", RUN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "has the losses of int5mlp_10l_parity/first at all 2 logged steps" in result.stdout
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == shards
    (shard,) = (tmp_path / "mine").glob("*_train_*.bin")  # changed in place, which its manifest does not know
    shard.write_bytes(shards[shard][:-2] + shards[shard][-4:-2])
    assert "is not the text of that run" in trainer_here("rerun", RUN, cwd=tmp_path).stderr
    assert (
        "--data nothing: there is no such folder" in trainer_here("rerun", RUN, "--data=nothing", cwd=tmp_path).stderr
    )
    (tmp_path / RUN / "summary.json").unlink()
    assert "has not ended; resume it with trainer fit" in trainer_here("rerun", RUN, cwd=tmp_path).stderr


def test_another_text_is_refused_and_leaves_nothing(place: Path, tmp_path: Path):
    shutil.copytree(place / "shards", tmp_path / "shards")
    shard = tmp_path / "shards/words_train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[-2:] = content[-4:-2]
    shard.write_bytes(content)
    result = trainer_here("rerun", str(place / RUN), "--run_name=other", cwd=tmp_path)
    assert result.returncode == 1
    assert "shards: is not the text of that run (fingerprint " in result.stderr
    assert not list((tmp_path / "runs").iterdir())
    assert "there is no such run folder" in trainer_here("rerun", "nowhere", cwd=tmp_path).stderr


def test_two_processes_repeat_a_run_together(place: Path, tmp_path: Path):
    old = tmp_path / RUN
    shutil.copytree(place / RUN, old)
    shutil.copytree(place / "shards", tmp_path / "shards")
    config = (old / "config.yaml").read_text()
    assert "  devices: auto\n" in config
    two = config.replace("  devices: auto\n", "  devices: 2\n").replace("accelerator: auto", "accelerator: cpu")
    (old / "config.yaml").write_text(two + "dry_run: true\n")  # no setting of a run
    result = trainer("rerun", str(old), "--run_name=two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no such run folder" not in result.stderr
    assert "int5mlp_10l_parity/two" in result.stdout.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["int5mlp_10l_parity"]
