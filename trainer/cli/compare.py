"""`trainer compare`: what a change of the recipe does to the score, over seeds."""

from trainer.cli.parser import CommandParser
from trainer.comparison import as_markdown, group_runs, table
from trainer.errors import UserError
from trainer.run_folder import RunFolder


def compare(runs: list[str]) -> None:
    """Compare runs: a row for each setting, with the change to the first run's, seed by seed, and its p-value.

    Args:
        runs: Run folders; the setting of the first one is what the others are compared with.

    Raises:
        UserError: If a folder holds no finished run, or two saw other text or had another budget.
    """
    if len(runs) < 2:
        raise UserError("compare needs at least two run folders; give several seeds of each setting")
    print(as_markdown(table(group_runs([RunFolder(run).read() for run in runs]))))


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(compare, "compare runs/frontier/base-seed* runs/frontier/wide-seed*", runs={"nargs": "+"})
