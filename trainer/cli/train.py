"""`trainer fit` and `trainer validate`: which recipe, text and weights are meant, and what is said of failures."""

import gc
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from trainer.callbacks.checkpoint import STOPPING
from trainer.cli.dry_run import dry_run
from trainer.cli.env_aliases import alias_options
from trainer.cli.help import first_help, help_of, parts_named, take_help
from trainer.cli.interruption import interruptible
from trainer.cli.lightning_cli import TrainerCLI, make_parser
from trainer.cli.parse_errors import reword_failure
from trainer.cli.parser import split_options
from trainer.cli.resume import last_checkpoint, resume, start_from
from trainer.cli.trusted_settings import settings_beside
from trainer.cli.validate import validate, warn_of_no_effect, weights_to_score
from trainer.distributed import is_lost_process
from trainer.errors import UserError, first_line
from trainer.evaluation.metric import Score
from trainer.lock import exclusive
from trainer.logging import logger, logging_to, quiet_libraries
from trainer.recipes import DEFAULT, find_recipe, flatten, load_recipe
from trainer.run_folder import RunFolder


def run(command: str, args: Sequence[str]) -> RunFolder | dict[str, Score] | None:
    """Run `fit` or `validate`.

    Args:
        command: fit or validate.
        args: Arguments after the command.

    Returns:
        The folder of a run that has ended, or the scores by name; None if only help was asked for.

    Raises:
        UserError: If the user has to correct something.
    """
    quiet_libraries()
    about, given = take_help(list(args))
    # Recipes come first on the command line, aliases after them; a checkpoint tells which recipe and model it needs.
    options, rest = split_options(given, "--config,-c", "--ckpt,--ckpt_path")
    configs, ckpts = options["config"], options["ckpt"]
    ckpt = ckpts[-1] if ckpts and ckpts[-1] != "null" else None
    if ckpt and re.match(r"[a-z][a-z0-9+.-]*://", ckpt, re.IGNORECASE):
        raise UserError(f"--ckpt {ckpt}: addresses are not opened; download the file and give its path")
    aliases: list[str] = []
    if configs:
        aliases, lines = alias_options(os.environ, command)
        for line in lines:
            logger.info(f"environment: {line}")
        alias_ckpts, aliases = split_options(aliases, "--ckpt")
        ckpt = ckpt or (alias_ckpts["ckpt"][-1] if alias_ckpts["ckpt"] else None)
    if not configs and command == "fit":
        configs = [DEFAULT]
    stored = None
    if command == "validate" and about is None:
        ckpt, stored = weights_to_score(ckpt, rest)
    text_options, _ = split_options(rest, "--data.source,--data.source.class_path", "--text")
    if text_options["text"] and not text_options["data.source"]:
        rest.append("--data.source=Shards")  # some source must be named; the text takes its place
    has_source = bool(text_options["data.source"] or text_options["text"])
    if has_source:  # what a variable says of the recipe's source does not hold for another one
        aliases = [alias for alias in aliases if not alias.startswith("--data.source.")]
    paths = [find_recipe(name) for name in configs]
    recipe = RunFolder.recipe_of(paths[-1]) if paths else "default"
    recipes: list[str] = []
    for path in reversed(paths):  # of several recipes, the last one that names a source counts
        recipes.insert(0, f"--config={_recipe(path, has_source)}")
        data = load_recipe(path).get("data")
        has_source |= isinstance(data, dict) and "source" in data
    if about is not None:
        _print_help(command, about, paths, [*recipes, *aliases, *rest])
        return None
    if stored is not None and not configs and ckpt is not None:
        recipes = settings_beside(ckpt, rest, has_source)
    weights = split_options(rest, "--weights")[0]["weights"][-1:] or ["live"]
    try:
        cli = TrainerCLI(command, recipe, [*recipes, *aliases, *rest], stored, reopens=ckpt == "last")
    except ValueError as error:  # a setting out of range, refused by the part it belongs to
        raise UserError(reword_failure(str(error))) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise UserError("the model's weights do not fit into memory; lower --model.model_dim or num_layers") from error
    if stored is not None and ckpt is not None:
        if cli.config.weights != weights[0]:
            raise UserError(
                f"weights {cli.config.weights} in a config has no effect; give --weights {cli.config.weights}"
            )
        if cli.is_dry_run:
            raise UserError("--dry_run belongs to trainer fit; leave it out")
        warn_of_no_effect(rest)
        is_cut = any(arg.startswith("--eval.max_tokens") for arg in rest)
        has_own_text = not configs and not any(arg.startswith(("--data.source", "--text")) for arg in rest)
        return validate(cli, stored, Path(ckpt), is_cut, has_own_text)
    if cli.is_dry_run:
        cli.config.ckpt = ckpt or cli.config.ckpt
        dry_run(cli)
        return None
    return train(cli, ckpt or (None if ckpts else cli.config.ckpt))


def train(cli: TrainerCLI, ckpt: str | None, check: Callable[[], object] = lambda: None) -> RunFolder:
    """Train in the run's folder, which no other process may do meanwhile.

    Args:
        cli: The configured objects.
        ckpt: Checkpoint to resume from.
        check: Called before anything is trained; its UserError refuses the run.

    Returns:
        The folder of the run, which has ended.
    """
    run_folder = RunFolder(str(cli.trainer.log_dir))
    with ExitStack() as stack:
        if cli.trainer.is_global_zero:
            stack.enter_context(_removed_if_refused(run_folder))
            stack.enter_context(exclusive(run_folder.lock, f"training {run_folder}", waits=False))
        check()
        fit(cli, ckpt, run_folder.log)
    return run_folder


def _print_help(command: str, about: str, paths: list[Path], args: list[str]) -> None:
    """Print the help of a command, or of a part of its options; arguments that are wrong do not keep it back.

    Raises:
        UserError: If there is no such part.
    """
    parser = make_parser(command)
    if about == "all":
        parser.print_help()
    elif about:
        text = help_of(parser, about)
        if not text:
            parts = parts_named(parser, about)
            raise UserError(
                f"--help {about}: no option begins with {about}; try {' or '.join(f'--help {part}' for part in parts)}"
            )
        print(text)
    else:
        values = {}
        if paths:
            try:
                config = parser.parse_args(args)
            except UserError:
                config = parser.parse_args([f"--config={path}" for path in paths])
            values = yaml.safe_load(parser.dump(config))
        print(first_help(parser, dict(flatten(values)), RunFolder.recipe_of(paths[-1]) if paths else ""))


def _recipe(path: Path, has_source: bool) -> str:
    """A recipe for `--config`: its path, or its text without the source if another one is given.

    A source of another class would inherit the recipe's folder, and make it again.
    """
    recipe = load_recipe(path)
    if not has_source or not isinstance(recipe.get("data"), dict):
        return str(path)
    recipe["data"].pop("source", None)
    return yaml.safe_dump(recipe, sort_keys=False)


def fit(cli: TrainerCLI, ckpt: str | None, log: Path) -> None:
    """Train, export and report.

    Args:
        cli: The configured objects.
        ckpt: Checkpoint to resume from; last: the newest one of the recipe, or of the run that has a name.
        log: File that messages are copied to.

    Raises:
        UserError: If the user has to correct something.
    """
    if ckpt == "last":
        ckpt = last_checkpoint(cli)
    else:
        cli.config.ckpt = ckpt  # config.yaml then repeats a resumed run, too
    if cli.config.init_from is not None:
        start_from(cli, resumes=ckpt is not None)
    if ckpt is not None:
        resume(cli, ckpt)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        _log_settings(cli)
        with logging_to(log) if cli.trainer.is_global_zero else nullcontext():
            if ckpt is not None:
                logger.info(f"resuming from {ckpt}")
            with interruptible():
                cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt, weights_only=True)
    except SIGTERMException as error:
        raise SystemExit(128 + getattr(error, "number", signal.SIGTERM)) from error
    except MisconfigurationException as error:
        raise UserError(first_line(error)) from error
    except torch.AcceleratorError as error:
        raise UserError(
            f"the device failed at about step {cli.trainer.global_step + 1:,}: {first_line(error)}. Checkpoints are "
            "kept: resume with --ckpt last. If it fails again, CUDA_LAUNCH_BLOCKING=1 shows where"
        ) from error
    except RuntimeError as error:
        if "which is not available" in str(error):  # what EarlyStopping says of the metric that it watches
            raise UserError(f"{first_line(error)} docs/metrics.md lists the metrics of a run") from error
        if cli.trainer.world_size == 1 or not is_lost_process(error):
            raise
        raise UserError(
            "another process of this run has ended, and this one with it; its own messages tell why. Checkpoints are "
            "kept: resume with --ckpt last, on any number of devices"
        ) from error
    except OSError as error:  # a full disk or a missing folder, met by a library
        raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    finally:  # whoever called this from Python goes on
        gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None is one that Python did not set
                    signal.signal(number, handler)
        for each in cli.trainer.loggers:
            if isinstance(each, WandbLogger):
                each.experiment.finish()


def _log_settings(cli: TrainerCLI) -> None:
    """Give the settings to all loggers but the first, which is the run's own, beside config.yaml.

    Raises:
        UserError: If Weights & Biases refuses, for instance without a login.
    """
    settings = dict(flatten(yaml.safe_load(cli.parser.dump(cli.config))))
    for each in cli.trainer.loggers[1:]:
        try:
            each.log_hyperparams(settings)
        except Exception as error:
            if not isinstance(each, WandbLogger):
                raise
            raise UserError(f"--wandb {cli.config.wandb}: {first_line(error)}") from error


@contextmanager
def _removed_if_refused(run_folder: RunFolder) -> Iterator[None]:
    """Remove the folder of a run that was refused before it trained or saved anything."""
    try:
        yield
    except UserError:
        run_folder.remove_if_unused()
        raise
