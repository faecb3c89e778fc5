"""`trainer report`: draw the report of a run again, or of several runs laid over each other."""

from pathlib import Path

from trainer.cli.parser import CommandParser
from trainer.errors import UserError
from trainer.files import check_replaceable
from trainer.report.build import build_report
from trainer.report.page import BEGINNING
from trainer.run_folder import RunFolder


def report(runs: list[str], out: str | None = None) -> None:
    """Draw the report of a run again, or lay several runs over each other.

    Args:
        runs: Run folders; the first one is described in full.
        out: File to write; default: report.html in the first folder.

    Raises:
        UserError: If a folder holds no finished run.
    """
    folders = [RunFolder(run) for run in runs]
    path = Path(out) if out else folders[0].report
    if path.suffix != ".html":
        raise UserError(f"--out {path}: a report is an HTML file; choose a name that ends in .html")
    check_replaceable(path, (BEGINNING,), "--out")
    build_report(folders, path)
    print(path)


def make_parser() -> CommandParser:
    """The options of the command."""
    example = "report runs/quickstart/1 runs/quickstart/2 --out compared.html"
    return CommandParser(report, example, runs={"nargs": "+"})
