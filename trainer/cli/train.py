"""`trainer fit` and `trainer validate`: which recipe, text and weights are meant, and what is said of failures."""

import gc
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from trainer.callbacks import CALLBACKS
from trainer.callbacks.checkpoint import STOPPING
from trainer.cli.dry_run import dry_run
from trainer.cli.env_aliases import alias_options
from trainer.cli.held_out import held_out_tokens, warn_of_other_text
from trainer.cli.help import first_help, help_of, parts_named, take_help
from trainer.cli.lightning_cli import TrainerCLI, make_parser
from trainer.cli.parse_errors import reword_failure
from trainer.cli.parser import split_options
from trainer.cli.resume import last_checkpoint, resume, start_from
from trainer.cli.trusted_settings import settings_beside
from trainer.data.documents import FIELD
from trainer.data.scored_text import ScoredText
from trainer.datamodule import TokenData
from trainer.distributed import is_lost_process
from trainer.errors import OptionError, UserError, first_line
from trainer.evaluation.metric import Score
from trainer.evaluation.per_document import PREFIXES, DocumentScores, by_source, write_csv
from trainer.files import check_replaceable
from trainer.loading import is_artifact, stored_weights
from trainer.lock import exclusive
from trainer.logging import counted, logger, logging_to, quiet_libraries
from trainer.quantize.artifact import Artifact
from trainer.recipes import DEFAULT, find_recipe, load_recipe
from trainer.run_folder import RunFolder, flatten

TRAIN_TOKENS = 1_048_576  # of the training split that are scored unless more are asked for
SOURCES = 30  # that are printed
# Options that validate takes, since it reads recipes, and that change no score; and those below them that may.
ABOUT_TRAINING = (
    *(name for name, _ in CALLBACKS if name != "progress"),
    *("init_from", "init_from_sha256", "model", "run_name", "seed_everything", "tensorboard", "wandb"),
    *("data.batch_tokens", "data.order", "data.seed", "eval.every_seconds", "eval.fit_tokens"),
    *("trainer.default_root_dir", "trainer.limit_val_batches", "trainer.log_every_n_steps", "trainer.logger"),
    *("trainer.max_steps", "trainer.overfit_batches", "trainer.val_check_interval"),
)
ABOUT_SCORING = {"model", "model.compile", "model.fused", "model.attention.backend"}


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
        ckpt, stored = _to_score(ckpt, rest)
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
        _warn_of_no_effect(rest)
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


def _to_score(ckpt: str | None, rest: list[str]) -> tuple[str, Artifact]:
    """The file to score, and its weights."""
    if ckpt is None:
        raise OptionError("trainer validate", "needs --ckpt with a checkpoint or an artifact")
    is_averaged = split_options(rest, "--weights")[0]["weights"][-1:] == ["averaged"]
    if is_averaged and Path(ckpt).is_file() and is_artifact(Path(ckpt)):
        raise UserError(f"--weights averaged: {ckpt} is an artifact, which holds one set of weights; leave it out")
    stored = stored_weights(Path(ckpt), "averaged" if is_averaged else "live")
    stored.build()  # before a model is made of sizes that the file may only claim
    return ckpt, stored


def _warn_of_no_effect(args: list[str]) -> None:
    """Name the options that say how to train, and so change no score."""
    given = {arg.removeprefix("--").partition("=")[0].rstrip("+") for arg in args if arg.startswith("--")}
    names = sorted(
        f"--{name}"
        for name in given - ABOUT_SCORING
        if any(name == each or name.startswith(f"{each}.") for each in ABOUT_TRAINING)
    )
    if names:
        logger.warning(f"{', '.join(names)}: no effect on trainer validate, which takes the model from the file")


def _recipe(path: Path, has_source: bool) -> str:
    """A recipe for `--config`: its path, or its text without the source if another one is given.

    A source of another class would inherit the recipe's folder, and make it again.
    """
    recipe = load_recipe(path)
    if not has_source or not isinstance(recipe.get("data"), dict):
        return str(path)
    recipe["data"].pop("source", None)
    return yaml.safe_dump(recipe, sort_keys=False)


def validate(cli: TrainerCLI, stored: Artifact, ckpt: Path, is_cut: bool, has_own_text: bool) -> dict[str, Score]:
    """Score stored weights and print the scores, which are returned by name; the last line is for scripts.

    Args:
        cli: The configured objects.
        stored: The weights.
        ckpt: Their file.
        is_cut: Whether the command line limits the tokens; the run's own limit does not hold for another text.
        has_own_text: Whether nothing but the run's own config says what is scored.
    """
    cli.model.model.load_state_dict(stored.state)
    cli.datamodule.expected_tokenizer = stored.tokenizer_sha256
    _choose_text(cli, ckpt, is_cut)
    if has_own_text and cli.datamodule.split == "val" and cli.trainer.is_global_zero:
        warn_of_other_text(ckpt, cli.datamodule.source)
    with _interruptible():
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    if not all(math.isfinite(score.bpb) for score in cli.model.scores):
        rate = cli.datamodule.evaluation.adapt_rate
        reason = f"lower --eval.adapt_rate {rate:g}" if rate else "these weights are not usable"
        raise UserError(f"the score is not a number: {reason}")
    last = "adapted" if cli.datamodule.evaluation.adapt_rate else "sliding"
    scores = dict(zip(("plain", last), cli.model.scores, strict=False))
    for name, score in scores.items():
        logger.info(f"{name:<8} {score.line()}")
    logger.info(f"scored in {cli.model.validation_seconds:.1f} s")
    if cli.model.documents is not None and cli.trainer.is_global_zero:
        path, precision = Path(cli.config.per_document or ""), str(cli.trainer.precision)
        _report_documents(path, cli.datamodule, cli.model.documents, precision)
    logger.info(cli.model.scores[-1].line())
    return scores


def _choose_text(cli: TrainerCLI, ckpt: Path, is_cut: bool) -> None:
    """Take what `validate` is asked to score.

    Raises:
        UserError: If the options contradict each other.
    """
    config, data = cli.config, cli.datamodule
    if config.per_document and not config.per_document.endswith(".csv"):
        raise UserError(f"--per_document {config.per_document}: is written as CSV; choose a name that ends in .csv")
    if config.per_document:
        check_replaceable(Path(config.per_document), PREFIXES, "--per_document")
    if config.text is None:
        if config.source_field is not None:
            raise UserError("--source_field belongs to --text; shards do not say where a document comes from")
        if config.tokenizer is not None:
            raise UserError("--tokenizer belongs to --text; for shards it is --data.source.tokenizer")
        if config.text_field != FIELD:
            raise UserError("--text_field belongs to --text; shards hold tokens, not fields")
        data.split, data.scores_documents = config.split, config.per_document is not None
        if data.split == "train" and not is_cut:
            data.evaluation = replace(data.evaluation, max_tokens=TRAIN_TOKENS)
            logger.info(f"--split train: at most {TRAIN_TOKENS:,} tokens; --eval.max_tokens sets another number")
        if data.split == "held_out":
            data.held_out_tokens = held_out_tokens(ckpt, data.source, data.held_out_tokens)
            if not is_cut:
                data.evaluation = replace(data.evaluation, max_tokens=None)
        return
    if config.split != "val":
        raise UserError("--split and --text both say what is scored; leave one out")
    files = [config.text] if isinstance(config.text, str) else config.text
    data.scored_text = ScoredText(files, config.text_field, config.source_field)
    data.tokenizer = Path(config.tokenizer) if config.tokenizer else RunFolder.containing(ckpt).tokenizer
    if not config.tokenizer and not data.tokenizer.is_file():
        raise UserError(f"{data.tokenizer}: there is no tokenizer; name that of the model with --tokenizer")
    if not is_cut:
        data.evaluation = replace(data.evaluation, max_tokens=None)
    data.scores_documents = True


def _report_documents(path: Path, data: TokenData, documents: DocumentScores, precision: str) -> None:
    """Log the score of each source, and write the documents' scores if there is a path for them."""
    sources, columns = data.document_sources, documents.compute()
    if path.name:
        write_csv(path, sources, f"{data.evaluation.description}, precision {precision}", *columns)
    rows = by_source(sources[: len(columns[0])], *columns)
    for name, count, score in rows[:SOURCES]:
        logger.info(f"{score.bpb:.4f} bpb  {counted(count, 'document')}, {score.bytes:,} bytes  {name}")
    if len(rows) > SOURCES:
        logger.info(f"and {len(rows) - SOURCES:,} more sources")
    if path.name:
        logger.info(f"{counted(len(columns[0]), 'document')} in {path}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Hand on Ctrl-C, which Lightning turns into exit code 1 and ignores from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


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
            with _interruptible():
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
