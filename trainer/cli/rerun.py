"""`trainer rerun`: repeat a run from its folder, and say what has changed since."""

import hashlib
from pathlib import Path
from shlex import quote
from typing import Any

from trainer.cli.lightning_cli import TrainerCLI
from trainer.cli.parser import CommandParser
from trainer.cli.train import train
from trainer.data.identity import fingerprint, identify
from trainer.errors import OptionError, UserError
from trainer.logging import counted, logger, quiet_libraries
from trainer.run_folder import RunData, RunFolder
from trainer.script import script_record
from trainer.source_bundle import source_bundle, sources_of
from trainer.versions import versions

LOSS = "train/loss"
NAMED = 3  # files that are named in a line


def rerun(run: str, run_name: str | None = None, data: str | None = None) -> None:
    """Repeat a run from its folder with the same settings, text and seeds, and compare the losses.

    A run on a CPU that ends after a number of steps, without a time limit, has the same losses again.

    Args:
        run: Folder of the run.
        run_name: Name of the new run's folder; default: the next number.
        data: Folder of the run's token shards, if they are no longer where its config.yaml says.

    Raises:
        UserError: If the run has not ended, or its text is no longer the same.
    """
    quiet_libraries()
    folder = RunFolder(run)
    if folder.path.is_dir() and not folder.summary.is_file() and folder.last_checkpoint.is_file():
        raise UserError(
            f"{run}: has not ended; resume it with trainer fit --config {quote(str(folder.config))} --ckpt last"
        )
    first = folder.read()
    if data is not None and not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder")
    # A name in the config is the first run's own.
    args = [f"--config={first.folder.config}", f"--run_name={'null' if run_name is None else run_name}"]
    args.append("--dry_run=false")
    args += [] if data is None else [f"--data.source.folder={data}"]
    try:
        cli = TrainerCLI("fit", RunFolder.recipe_of(first.folder.config), args)
    except OptionError as error:  # of another version, or changed by hand
        raise UserError(f"{first.folder.config}: {error.reason}") from error
    except ValueError as error:  # a setting that this version refuses
        raise UserError(f"{first.folder.config}: {error}") from error
    _tell_changes(first, cli)
    cli.datamodule.resumes = True  # the text is checked, and must stay as it is
    again = train(cli, cli.config.ckpt, lambda: _check_text(first.summary, cli, may_make=data is None))
    if cli.trainer.is_global_zero:
        logger.info(_compared(first, again.read()))


def _tell_changes(first: RunData, cli: TrainerCLI) -> None:
    """Warn of other code, other packages and a time limit, with which the losses may differ."""
    code = source_bundle()
    if hashlib.sha256(code).hexdigest() != first.summary.get("code_sha256"):
        logger.warning(f"the trainer's code is not that of {first.name}: {_changed_files(first.folder, code)}")
    scripts = [first.summary.get("script"), script_record(code, [cli.model, *cli.callbacks])]
    if scripts[0] != scripts[1]:
        names = [f"{script['name']} ({script['sha256'][:12]})" if script else "trainer alone" for script in scripts]
        logger.warning(f"{first.name} ran with {names[0]}, this run with {names[1]}; own code may change the training")
    before, now = first.summary["versions"], versions(cli.trainer.strategy.root_device)
    changes = [f"{name} {before.get(name)} is {now[name]} now" for name in now if before.get(name) != now[name]]
    if changes:
        logger.warning(f"{first.name} had others: {', '.join(changes)}")
    if LOSS not in first.curves:
        logger.warning(f"{first.folder.metrics}: has no losses to compare with")
    if first.config.get("wallclock.seconds") is not None:
        logger.warning(
            "its learning rates follow the clock (wallclock.seconds), so its steps and losses are not exactly repeated"
        )


def _changed_files(folder: RunFolder, code: bytes) -> str:
    try:
        before, now = sources_of(folder.code.read_bytes()), sources_of(code)
    except (OSError, ValueError):
        return f"which files differ is not known without {folder.code}"
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"{counted(len(names), 'file')} changed: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"


def _check_text(summary: dict[str, Any], cli: TrainerCLI, may_make: bool) -> None:
    source = cli.datamodule.source
    if cli.trainer.is_global_zero:
        if may_make:
            source.prepare(only_if_missing=True)
        text = source.prepared()
        if (found := fingerprint(identify(text, reads_all=True))) != summary["shards_fingerprint"]:
            raise UserError(
                f"{text.train[0].parent}: is not the text of that run (fingerprint {found}, it was "
                f"{summary['shards_fingerprint']}); name the folder of its shards with --data"
            )


def _compared(first: RunData, again: RunData) -> str:
    """Whether the losses of two runs are equal, in a line.

    Raises:
        UserError: If they cannot be compared.
    """
    one, two = (dict(zip(*run.curves.get(LOSS, ([], [])), strict=True)) for run in (first, again))
    common = sorted(one.keys() & two.keys())
    scores = f"val_bpb {first.summary['val_bpb']:.8f} and {again.summary['val_bpb']:.8f}"
    if not common:
        raise UserError(f"no step was logged by both {first.name} and {again.name}, so nothing is compared; {scores}")
    steps = counted(len(common), "logged step")
    unequal = [step for step in common if one[step] != two[step]]
    if not unequal:
        rest = "" if one.keys() == two.keys() else " that both have"
        return f"{again.name} has the losses of {first.name} at all {steps}{rest}; {scores}"
    largest = max(abs(one[step] - two[step]) for step in unequal)
    return (
        f"the losses of {again.name} differ from those of {first.name} from step {int(unequal[0]):,} on, "
        f"by at most {largest:.2g} in {steps}; {scores}"
    )


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(rerun, "rerun runs/int5mlp_10l_parity/1", run={"nargs": None})
