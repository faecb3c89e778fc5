"""`trainer submit`: a submission folder made of finished runs, and the proof that it works."""

import shutil
from pathlib import Path

from trainer.cli.parser import CommandParser
from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.submission.checks import check
from trainer.submission.folder import Entry, make_folder
from trainer.submission.proof import prove

EXAMPLE = (
    'submit runs/int5mlp_10l/1 --name "10 layers" --author "Ada L." --github_id ada --track non-record-16mb '
    "--data data/fineweb10B_sp1024"
)


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
        track: Track of the challenge.
        data: Folder with the shards that the runs were scored on.
        blurb: A sentence about the submission.
        out: Folder to make; default: submission in the first run's folder.
        fresh_env: Prove it in a new environment with its requirements, which pip downloads.

    Raises:
        UserError: If the runs make no valid submission.
    """
    folders = [Path(run) for run in runs]
    folder = Path(out) if out else folders[0] / "submission"
    best = make_folder(Entry(name, author, github_id, track, blurb), folders, folder)
    try:
        print(prove(folder, Path(data), best.summary, fresh_env), flush=True)
        tokens, num_bytes = best.summary["val_tokens"], best.summary["val_bytes"]
        for line in check(RunFolder(folder).artifact, Path(data), tokens, num_bytes):
            print(line, flush=True)
    except UserError:
        shutil.rmtree(folder)  # an unproved submission must not be sent
        raise
    print(folder)


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
