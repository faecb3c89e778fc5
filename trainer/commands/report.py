"""`trainer report`: the report of a run again, or of several over each other."""

from pathlib import Path

from trainer.options import Parser
from trainer.report.build import NAME, build_report

EXAMPLE = """report runs/quickstart/1 runs/quickstart/2 --out compared.html"""


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("report", "Make the report of a run again, or lay several runs over each other.", EXAMPLE)
    parser.add_argument("runs", nargs="+", help="run folders; the first one is described in full")
    parser.add_argument("--out", help="file to write; default: report.html in the first folder")
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If a folder holds no finished run.
    """
    options = make_parser().parse_args(words)
    folders = [Path(folder) for folder in options.runs]
    out = Path(options.out) if options.out else folders[0] / NAME
    build_report(folders, out)
    print(out)
