"""`trainer submit`: a folder for the challenge out of finished runs, and the proof that it works."""

import shutil
from pathlib import Path

from trainer.errors import UserError
from trainer.options import Parser
from trainer.submission.folder import Entry, make_folder
from trainer.submission.proof import prove

EXAMPLE = """submit runs/int5mlp_10l/1 --name "10 layers" --author "Ada L." --github_id ada \\
      --track non-record-16mb --data data/fineweb10B_sp1024"""


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("submit", "Make a folder for the challenge out of finished runs, and prove that it works.", EXAMPLE)
    parser.add_argument("runs", nargs="+", help="run folders; several seeds of one recipe make one submission")
    parser.add_argument("--name", required=True, help="title of the submission")
    parser.add_argument("--author", required=True, help="who made it")
    parser.add_argument("--github_id", "--github-id", required=True, help="account at GitHub")
    parser.add_argument("--track", required=True, help="track of the challenge")
    parser.add_argument("--blurb", default="", help="a sentence on it")
    parser.add_argument("--data", required=True, help="folder with the shards and tokenizer the runs were scored on")
    parser.add_argument("--out", help="folder to make; default: submission in the first run's folder")
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If no valid submission can be made of the runs.
    """
    options = make_parser().parse_args(words)
    folders = [Path(folder) for folder in options.runs]
    out = Path(options.out) if options.out else folders[0] / "submission"
    entry = Entry(options.name, options.author, options.github_id, options.track, options.blurb)
    best = make_folder(entry, folders, out)
    try:
        print(prove(out, Path(options.data), best.summary), flush=True)
    except UserError:
        shutil.rmtree(out)  # nothing unproved is left to be sent
        raise
    print(out)
