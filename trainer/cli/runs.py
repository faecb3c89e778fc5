"""`trainer runs`: the runs of a folder in a table, and the removal of old ones."""

import sys
import time
from csv import writer
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

from trainer.cli.parser import CommandParser
from trainer.comparison import as_markdown
from trainer.errors import OptionError, UserError
from trainer.files import atomic_write, check_replaceable
from trainer.lock import is_held
from trainer.logging import counted, logger
from trainer.run_folder import RunFolder

State = Literal["finished", "running", "interrupted", "failed"]
COLUMNS = ("run", "state", "text", "steps", "bpb", "bytes", "last change")
# Settings by which one run needs the files of another.
NAMES_A_RUN = ("ckpt", "init_from", "data.source.init_args.tokenizer")


@dataclass(frozen=True)
class Listed:
    """A run as the table shows it.

    Attributes:
        folder: Its folder.
        state: finished: it has a summary. running: a process trains in it. interrupted: it has a checkpoint. failed: it
            has none.
        text: Folder of its shards, or its source.
        steps: Steps of a finished run.
        bpb: Score of a finished run.
        bytes: Size of code and model of a finished run that stored an artifact.
        changed: Time of the last change of its log, its summary or its checkpoint, in seconds.
        needs: Files of other runs that its config names, as it names them.
    """

    folder: RunFolder
    state: State
    text: str
    steps: int | None
    bpb: float | None
    bytes: int | None
    changed: float
    needs: list[Path]

    @property
    def recipe(self) -> str:
        """Name of the recipe, by the folder above."""
        return self.folder.path.resolve().parent.name

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            str(self.folder),
            self.state,
            self.text,
            "" if self.steps is None else f"{self.steps:,}",
            "" if self.bpb is None else f"{self.bpb:.4f}",
            "" if self.bytes is None else f"{self.bytes:,}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(self.changed)),
        ]

    def values(self) -> list[Any]:
        """The same for programs: numbers as they are, and nothing for what is missing."""
        row: list[Any] = list(self.cells())
        row[3:6] = self.steps, self.bpb, self.bytes
        return row


def runs(
    action: Literal["list", "prune"] = "list",
    root: str = "runs",
    recipe: str | None = None,
    state: State | None = None,
    sort: Literal["changed", "bpb", "bytes", "steps", "name"] = "changed",
    csv: str | None = None,
    keep: int | None = None,
    dry_run: bool = False,
    yes: bool = False,
) -> None:
    """List runs, or remove old ones.

    Args:
        action: What to do. list prints a table. prune removes the oldest runs of each recipe, but never one that
            trains, or whose artifact or checkpoint another run names.
        root: Folder of all runs.
        recipe: Only the runs of this recipe.
        state: Only the runs in this state.
        sort: Order of the table; the newest, the best, the smallest or the longest run comes first.
        csv: File to write the table to, whose name ends in .csv.
        keep: Number of runs of each recipe that prune keeps, the newest ones (at least 1).
        dry_run: Show what prune would remove, and remove nothing.
        yes: Do not ask before removing.

    Raises:
        UserError: If there is no such folder, an option does not fit the action, or prune may not read a run.
    """
    if not Path(root).is_dir():
        raise UserError(
            f"--root {root}: there is no such folder; name the folder that holds the folders of the recipes"
        )
    all_runs = []
    for run in filter(_is_run, map(RunFolder, sorted(Path(root).glob("*/*/")))):
        try:
            all_runs.append(_listed(run))
        except UserError as error:
            if action == "prune":  # it may need the files of another run
                raise
            logger.warning(f"{error}; {run} is left out")
    chosen = [run for run in all_runs if recipe in (None, run.recipe) and state in (None, run.state)]
    if csv is not None and not csv.endswith(".csv"):
        raise UserError(f"--csv {csv}: is written as CSV; choose a name that ends in .csv")
    if csv is not None:
        check_replaceable(Path(csv), (",".join(COLUMNS),), "--csv")
    if action == "prune":
        if csv is not None or sort != "changed":
            raise UserError("--csv and --sort belong to trainer runs list; leave them out")
        _prune(chosen, all_runs, keep, dry_run, yes)
        return
    if keep is not None or dry_run or yes:
        raise UserError("--keep, --dry_run and --yes belong to trainer runs prune")
    missing = float("inf")
    orders: dict[str, Any] = {
        "changed": lambda run: -run.changed,
        "bpb": lambda run: missing if run.bpb is None else run.bpb,
        "bytes": lambda run: missing if run.bytes is None else run.bytes,
        "steps": lambda run: -(run.steps or 0),
        "name": lambda run: str(run.folder),
    }
    ordered = sorted(chosen, key=orders[sort])
    if csv is not None:
        _write_csv(Path(csv), [run.values() for run in ordered])
        print(f"{counted(len(ordered), 'run')} in {csv}")
        return
    print(as_markdown([list(COLUMNS), *(run.cells() for run in ordered)]))


def _is_run(run: RunFolder) -> bool:
    return run.config.is_file() or run.log.is_file() or run.checkpoints.is_dir()


def _listed(run: RunFolder) -> Listed:
    """Read what a folder says of its run; what is missing or damaged is left out.

    Raises:
        UserError: If a file may not be read.
    """
    config = run.settings()
    summary = run.read_summary() or {}
    files = [path for path in (run.log, run.summary, run.last_checkpoint, run.config) if path.is_file()]
    has_checkpoint = run.last_checkpoint.is_file() or bool(run.step_checkpoints())
    state: State = "interrupted" if has_checkpoint else "failed"
    if summary:
        state = "finished"
    if is_held(run.lock):
        state = "running"
    steps = summary.get("steps")
    if steps is None and (saved := run.step_checkpoints()):
        steps = run.step_of(saved[-1])
    source = str(config.get("data.source.class_path", "")).rpartition(".")[2]
    return Listed(
        run,
        state,
        str(config.get("data.source.init_args.folder") or source),
        steps,
        summary.get("val_bpb"),
        summary.get("bytes_total"),
        max((path.stat().st_mtime for path in files), default=0.0),
        [Path(config[name]) for name in NAMES_A_RUN if isinstance(config.get(name), str)]
        + ([run.artifact.resolve()] if run.path.is_symlink() else []),  # a link names the run behind it
    )


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = StringIO()
    writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def _prune(chosen: list[Listed], all_runs: list[Listed], keep: int | None, dry_run: bool, yes: bool) -> None:
    """Remove the oldest runs of each recipe."""
    if keep is None:
        raise OptionError("trainer runs", "prune needs --keep with the number of runs of each recipe that stay")
    if keep < 1:
        raise UserError(f"--keep must be at least 1, not {keep}")
    kept: dict[str, int] = {}
    removed: list[Listed] = []
    for run in sorted(chosen, key=lambda run: -run.changed):
        if run.folder.path.is_symlink() or run.folder.path.parent.is_symlink():
            continue  # it lies somewhere else, or is another name of a run
        kept[run.recipe] = kept.get(run.recipe, 0) + 1
        if kept[run.recipe] > keep and run.state != "running":
            removed.append(run)
    # A run that stays may need files of one that goes; then that one stays, too, and what it needs.
    while needed := [run for run in removed if _is_needed(run, [other for other in all_runs if other not in removed])]:
        removed = [run for run in removed if run not in needed]
    if not removed:
        print("nothing to remove")
        return
    size = sum(path.stat().st_size for run in removed for path in run.folder.path.rglob("*") if path.is_file())
    what = counted(len(removed), "run")
    print(as_markdown([list(COLUMNS), *(run.cells() for run in removed)]))
    if dry_run:
        print(f"would remove {what} ({size / 1e6:,.1f} MB)")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("prune asks before it removes, and there is no terminal; give --yes or --dry_run")
        if input(f"remove {what} ({size / 1e6:,.1f} MB)? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    for run in removed:
        if is_held(run.folder.lock):  # since the question
            raise UserError(f"{run.folder}: a process trains in it now; the runs above it are removed")
        rmtree(run.folder.path)
    print(f"removed {what} ({size / 1e6:,.1f} MB)")


def _is_needed(run: Listed, others: list[Listed]) -> bool:
    """Whether another run names a file in the folder of a run.

    A relative path counts from whatever folder that run was started in, so its parts are looked at.
    """
    folder = run.folder.path.resolve()
    paths = [path for other in others if other is not run for path in other.needs]
    tail = "/".join(("", *folder.parts[-2:], ""))
    return any(folder in path.resolve().parents or tail in f"/{path.as_posix()}" for path in paths)


def make_parser() -> CommandParser:
    """The options of the command."""
    switches = {"action": "store_true"}
    return CommandParser(
        runs,
        "runs --sort bpb",
        action={"nargs": "?", "default": "list", "choices": ["list", "prune"]},
        dry_run=switches,
        yes=switches,
    )
