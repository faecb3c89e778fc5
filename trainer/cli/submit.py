"""`trainer submit`: a submission folder made of finished runs, and the proof that it works."""

import shutil
from pathlib import Path

from trainer.cli.parser import CommandParser
from trainer.data.manifest import Manifest
from trainer.data.sources import Shards
from trainer.errors import UserError
from trainer.run_folder import RunData, RunFolder
from trainer.submission.checks import check
from trainer.submission.folder import Entry, make_folder
from trainer.submission.proof import prove

EXAMPLE = "submit runs/frontier/1 --data data/mine8192 --name mine --author Ada --github_id ada --track non-record-16mb"


def submit(
    runs: list[str],
    name: str,
    author: str,
    github_id: str,
    track: str,
    data: str,
    blurb: str = "",
    out: str | None = None,
    fresh_env: bool = False,
) -> None:
    """Make a submission folder of finished runs, and prove that it works.

    Args:
        runs: Run folders; several seeds of one recipe make one submission.
        name: Title of the submission.
        author: Name of the author.
        github_id: Account of the author at GitHub.
        track: Track of the challenge, such as non-record-16mb; its repository lists them.
        data: Folder with the shards that the runs were scored on.
        blurb: A sentence about the submission.
        out: Folder to make; default: submission in the first run's folder.
        fresh_env: Prove it in a new environment with its requirements, which pip downloads.

    Raises:
        UserError: If the runs make no valid submission.
    """
    folders = [Path(run) for run in runs]
    folder = Path(out) if out else folders[0] / "submission"
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --out or remove it")
    draft = folder.with_name(f"{folder.name}.unproved")  # what a killed command leaves must not be sent
    shutil.rmtree(draft, ignore_errors=True)
    try:
        best = make_folder(Entry(name, author, github_id, track, blurb), folders, Path(data), draft)
        _check_data(Path(data), best)
        print("scoring the artifact in a clean process, from a copy of the folder ...", flush=True)
        print(prove(draft, Path(data), best.summary, fresh_env), flush=True)
        tokens, num_bytes = best.summary["val_tokens"], best.summary["val_bytes"]
        canonical = bool(best.config.get("eval.canonical"))
        for line in check(RunFolder(draft).artifact, Path(data), tokens, num_bytes, canonical):
            print(line, flush=True)
        draft.rename(folder)
    except UserError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    print(folder)


def _check_data(data: Path, run: RunData) -> None:
    """Refuse shards that another tokenizer made, before anything is scored."""
    text = Shards(str(data)).prepared()
    manifest = Manifest.read(text.val[0].parent)
    if manifest is not None and manifest.tokenizer_sha256 != run.summary["tokenizer_sha256"]:
        raise UserError(
            f"--data {data}: these shards were made with another tokenizer than the run's; give the run's own"
        )


def make_parser() -> CommandParser:
    """The options of the command."""
    flags = ["--github_id", "--github-id"]  # an alias
    return CommandParser(
        submit,
        EXAMPLE,
        runs={"nargs": "+"},
        github_id={"flags": flags, "required": True},
        fresh_env={"action": "store_true"},
    )
