"""A run that starts from another's weights: what it takes, what it says, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_OPTIONS
from tests.helpers import RUNS, small, trainer_here
from trainer.checkpoint import METADATA_KEY, load_checkpoint
from trainer.files import sha256_of
from trainer.loading import stored_weights
from trainer.run_folder import RunFolder
from trainer.submission.folder import Entry, make_folder

OTHER_WORDS = "zebra quagga okapi giraffe gnu impala kudu oryx eland dikdik"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("parent")
    result = trainer_here(*small(shard_folder), cwd=folder)
    assert result.returncode == 0, result.stderr
    return RunFolder(folder / RUNS / "1")


def other_text(folder: Path) -> list[str]:
    """Text that the parent never saw, and the options that name it."""
    words = OTHER_WORDS.split()
    lines = [" ".join(words[(7 * line + place * place) % 10] for place in range(40)) for line in range(400)]
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(lines))
    source = ["--data.source=LocalText", f"--data.source.train_files={folder}"]
    return ["fit", "--config=int5mlp_10l_parity", *source, *TINY_OPTIONS]


def test_training_on_other_text_begins_with_the_parents_weights_and_lowers_its_score(parent: RunFolder, tmp_path: Path):
    more = [f"--init_from={parent.artifact}", "--trainer.max_steps=30", "--model.optimizer.matrix_lr=0.02"]
    args = [*other_text(tmp_path / "texts"), *more]
    result = trainer_here(*args, "--run_name=tuned", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = RunFolder(tmp_path / RUNS / "tuned")
    summary = json.loads(run.summary.read_text())
    stages = summary["stages"]
    assert next(iter(stages)) == "parent_plain"
    assert stages["live_plain"]["bpb"] < stages["parent_plain"]["bpb"] - 0.1
    assert f"starting from {parent.artifact}, which scores {stages['parent_plain']['bpb']:.4f}" in result.stdout
    # The score that is called the parent's is what scoring its file gives.
    scored = trainer_here(
        *("validate", f"--ckpt={parent.artifact}", "--data.source=Shards"),
        *(f"--data.source.folder={tmp_path}/data/texts", "--eval.stride=null"),
        cwd=tmp_path,
    )
    assert f"val_bpb={stages['parent_plain']['bpb']:.8f}" in scored.stdout, scored.stderr
    assert sha256_of(run.tokenizer) == sha256_of(parent.tokenizer)
    before = json.loads(parent.summary.read_text())
    [origin] = summary["ancestry"]
    assert origin["sha256"] == sha256_of(parent.artifact)
    assert origin["shards_fingerprint"] == before["shards_fingerprint"]
    assert f"init_from_sha256: {origin['sha256']}" in run.config.read_text()
    submission = tmp_path / "submission"
    make_folder(Entry("name", "author", "id", "track", ""), [run.path], tmp_path / "data/texts", submission)
    shipped = json.loads((submission / "submission.json").read_text())["ancestry"]
    assert shipped == [{**origin, "file": "artifact.zst"}]
    assert f"(sha256 {origin['sha256']}), trained on {before['train_tokens']} tokens" in (
        (submission / "README.md").read_text()
    )
    # Resumed without the option, it still knows where it comes from; as a parent, it hands that on.
    longer = [word for word in args if not word.startswith(("--init_from", "--trainer.max_steps"))]
    resumed = trainer_here(*longer, "--trainer.max_steps=31", "--run_name=tuned", "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(run.summary.read_text())["ancestry"] == [origin]
    child = trainer_here(*longer, f"--init_from={run.artifact}", "--trainer.max_steps=1", cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    ancestry = json.loads((tmp_path / RUNS / "1/summary.json").read_text())["ancestry"]
    assert [each["sha256"] for each in ancestry] == [sha256_of(run.artifact), origin["sha256"]]


def test_only_the_weights_are_taken(parent: RunFolder, tmp_path: Path, shard_folder: Path):
    last = parent.last_checkpoint
    rate = ["--model.optimizer.matrix_lr=0", "--model.optimizer.scalar_lr=0", "--model.optimizer.tied_embedding_lr=0"]
    args = small(shard_folder, f"--init_from={last}", *rate, "--trainer.max_steps=1", "--export.enabled=false")
    result = trainer_here(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = RunFolder(tmp_path / RUNS / "1")
    checkpoint = load_checkpoint(run.last_checkpoint)
    assert checkpoint["global_step"] == 1
    expected = stored_weights(last, "best").state
    for name, tensor in stored_weights(tmp_path / RUNS / "1/checkpoints/last.ckpt").state.items():
        assert torch.equal(tensor, expected[name]), name
    [origin] = checkpoint[METADATA_KEY]["ancestry"]
    before = json.loads(parent.summary.read_text())
    assert origin["sha256"] == sha256_of(last)
    assert [origin[key] for key in ("steps", "train_tokens", "shards_fingerprint")] == [
        before[key] for key in ("steps", "train_tokens", "shards_fingerprint")
    ]
    # The origin of a run is what it is: resuming takes no other one, and keeps the hash of its own.
    other = trainer_here(*args, f"--ckpt={run.last_checkpoint}", f"--init_from={parent.artifact}", cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (1, 1), other.stderr
    assert "did not begin with this file" in other.stderr
    again = trainer_here(*args, f"--ckpt={run.last_checkpoint}", "--trainer.max_steps=2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"init_from_sha256: {sha256_of(last)}" in (tmp_path / RUNS / "2/config.yaml").read_text()


def test_what_does_not_fit_is_refused_in_one_line(parent: RunFolder, tmp_path: Path, shard_folder: Path):
    folder, strange = tmp_path / "copy", tmp_path / "strange"
    shutil.copytree(parent.path, folder)
    shutil.copytree(parent.path, strange)
    summary = json.loads(parent.summary.read_text())
    (strange / "summary.json").write_text(json.dumps({**summary, "ancestry": [5, None]}))
    (folder / "tokenizer.model").unlink()
    text = other_text(tmp_path / "texts")
    for args, message in (
        (
            small(shard_folder, f"--init_from={parent.artifact}", "--model.mlp.ratio=2"),
            "another model (mlp.ratio: 3 there, 2 here)",
        ),
        (small(shard_folder, "--init_from=nowhere"), "nowhere: there is no such file"),
        (small(shard_folder, f"--init_from={parent.artifact}", "--init_from_sha256=abc"), "not the abc... of"),
        (
            [*text, f"--init_from={parent.artifact}", "--data.case_markup=true"],
            "this tokenizer has no case markup, but data.case_markup is true; give --data.case_markup false, or",
        ),
        (
            [*text, f"--init_from={parent.artifact}", "--data.source.vocab_size=300"],
            "data.source.vocab_size 300 is for",
        ),
        ([*text, f"--init_from={folder / 'artifact.zst'}"], "is not the tokenizer this model was trained with"),
    ):
        result = trainer_here(*args, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert message in result.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    args = small(
        shard_folder, f"--init_from={strange / 'artifact.zst'}", "--trainer.max_steps=1", "--export.enabled=false"
    )
    assert trainer_here(*args, cwd=tmp_path).returncode == 0
    assert len(json.loads((tmp_path / RUNS / "1/summary.json").read_text())["ancestry"]) == 1
