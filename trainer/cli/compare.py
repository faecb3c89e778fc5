"""`trainer compare`: what a change of the recipe does to the score, over seeds or document by document."""

from pathlib import Path

from trainer.cli.parser import CommandParser
from trainer.comparison import as_markdown, group_runs, table, warn_of_other_code, warn_of_other_devices
from trainer.errors import UserError
from trainer.paired import compare_documents, moved_table, read_table, sentences
from trainer.run_folder import RunFolder


def compare(runs: list[str]) -> None:
    """Compare runs: a row for each setting, with the change to the first run's, seed by seed, and its p-value.

    Or compare two models document by document: the change in bits per byte with an interval from a bootstrap, and the
    documents that moved most.

    Args:
        runs: Run folders; the setting of the first one is what the others are compared with. Or two CSV files of
            trainer validate --per_document.

    Raises:
        UserError: If a folder holds no finished run, or two saw other text or had another budget.
    """
    if any(run.endswith(".csv") for run in runs):
        if len(runs) != 2:
            raise UserError(f"compare takes two CSV files, not {len(runs)}")
        paired = compare_documents(*(read_table(Path(run)) for run in runs))
        print("\n".join([*sentences(paired), "", as_markdown(moved_table(paired))]))
        return
    data = [RunFolder(run).read() for run in runs]
    if len(runs) < 2:
        raise UserError("compare needs at least two run folders; give several seeds of each setting")
    warn_of_other_code(data)
    warn_of_other_devices(data)
    print(as_markdown(table(group_runs(data))))


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(compare, "compare runs/frontier/base-seed* runs/frontier/wide-seed*", runs={"nargs": "+"})
