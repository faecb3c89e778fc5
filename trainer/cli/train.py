"""`trainer fit` and `trainer validate`: Lightning's CLI with named recipes, run folders, precision and checkpoints."""

import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from trainer.callbacks import CALLBACKS
from trainer.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints
from trainer.callbacks.metrics_file import MetricsFile
from trainer.checkpoint import METADATA_KEY, stored_checksum
from trainer.cli.env_aliases import alias_options
from trainer.cli.parser import ShortErrors, split_options
from trainer.cli.trainer_options import agree_with_launcher, check_trainer_options
from trainer.cli.trusted_settings import settings_beside
from trainer.datamodule import TokenData
from trainer.distributed import is_lost_process
from trainer.errors import UserError
from trainer.evaluation.windows import EvaluationConfig
from trainer.lightning_module import LanguageModel
from trainer.loading import load_run, stored_weights
from trainer.lock import exclusive
from trainer.logging import logger, logging_to, quiet_libraries
from trainer.quantize.artifact import Artifact
from trainer.recipes import find_recipe, load_recipe
from trainer.run_folder import RunFolder, flatten, newest_checkpoint

Precision = Literal["auto", "bf16-mixed", "16-mixed", "32-true", "64-true"]

DESCRIPTIONS = {
    "fit": "Train a recipe, export it, read the artifact back and score it. Without --config the recipe is quickstart. "
    "The values of a recipe replace the defaults below (--print_config shows them). "
    "Example: trainer fit --config int5mlp_10l --wallclock.seconds 300 --model.num_layers 9",
    "validate": "Score a checkpoint or an artifact with the settings of its run. "
    "Example: trainer validate --ckpt runs/quickstart/1/artifact.zst --eval.stride null",
}
# What a run's own config may not change in a score: it would leave out a part of the split.
WHOLE_SPLIT = {"limit_val_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}


class TrainParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with errors in one line."""


class TrainerCLI(LightningCLI):
    """The options of both commands, and the objects that they configure."""

    def __init__(
        self, command: str, recipe: str, args: list[str], stored: Artifact | None = None, reopens: bool = False
    ) -> None:
        """Parse and build everything.

        Args:
            command: fit or validate.
            recipe: Name of the recipe, for the run folder.
            args: Arguments after the command.
            stored: The weights to score, whose model config replaces that of the arguments.
            reopens: Whether a run of the given name may exist already, and is continued.
        """
        self.command = command
        self.recipe = recipe
        self.stored = stored
        self.reopens = reopens
        super().__init__(
            LanguageModel,
            TokenData,
            run=False,
            args=args,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            save_config_kwargs={"overwrite": True},  # in a run folder that is this run's own
            parser_class=TrainParser,
            parser_kwargs={
                "prog": f"trainer {command}",
                "usage": f"trainer {command} [--config RECIPE] [options]",
                "description": DESCRIPTIONS[command],
                "allow_abbrev": False,
            },
            trainer_defaults={
                "default_root_dir": "runs",
                "max_epochs": -1,
                "max_steps": -1,
                "val_check_interval": 1000,
                "log_every_n_steps": 50,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # its padding would score windows twice
                "inference_mode": False,  # it would be another mode to compile for
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; Lightning would warn about `sys.argv`."""
        self.config = parser.parse_args(args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be between 0 and {2**32 - 1}, not {seed}")
        if self.stored is not None:
            self.config = parser.parse_object({"model": self.stored.model.to_dict()}, namespace=self.config)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add evaluation, callbacks, and what Lightning has no option for."""
        parser.add_class_arguments(EvaluationConfig, "eval")
        parser.link_arguments("eval", "data.evaluation", apply_on="instantiate")
        parser.link_arguments("model.vocab_size", "data.vocab_size")
        for name, callback in CALLBACKS:
            parser.add_lightning_class_args(callback, name)
        parser.add_argument(
            "--precision",
            type=Precision,
            default="auto",
            help="Numerical precision. auto is bf16-mixed where the GPU has it, else 16-mixed, and 32-true on a CPU.",
        )
        text = "Log to TensorBoard too while training; needs the package tensorboard."
        parser.add_argument("--tensorboard", type=bool, default=False, help=text)
        parser.add_argument("--run_name", type=str | None, help="Name of the run's folder; default: the next number.")
        if self.command == "fit":
            text = "Checkpoint to resume from; last: the newest one of this recipe. With --run_name, last continues "
            text += "the run of that name in its folder, or starts it if it has saved nothing yet."
        else:
            text = "Checkpoint or artifact to score."
        parser.add_argument("--ckpt", type=str | None, help=text)
        if self.command == "validate":
            parser.add_argument(
                "--weights",
                type=Literal["live", "averaged"],
                default="live",
                help="Which weights of a checkpoint to score.",
            )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Resolve device and precision, and claim the run's folder."""
        options = self.config.trainer
        check_trainer_options(options)
        kwargs["devices"], kwargs["num_nodes"] = agree_with_launcher(options.devices, options.num_nodes)
        if options.accelerator == "auto":  # Apple's GPUs have no float64 for exact sums: only when requested
            kwargs["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
            if kwargs["accelerator"] == "cpu" and kwargs["devices"] == "auto":
                kwargs["devices"] = 1
        if options.precision is None:
            on_gpu = kwargs.get("accelerator", options.accelerator) in ("cuda", "gpu")
            has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            kwargs["precision"] = resolve_precision(self.config.precision, on_gpu, has_bf16)
        kwargs["plugins"] = [*self._plugins(), AtomicCheckpointIO()]
        if SLURMEnvironment.detect():  # Lightning would save, in the middle of an update, what it later loads unasked
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        run: RunFolder | None = None
        if self.command == "fit":
            name = self.config.run_name
            run = RunFolder.claim(self.folder_of_runs, name, self.reopens and name is not None)
            kwargs["logger"] = self._loggers(run)
        else:
            kwargs |= {"logger": False, "enable_checkpointing": False, **WHOLE_SPLIT}
            self.parser.callback_keys = ["progress"]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError, RuntimeError) as error:
            if run is not None:
                run.remove_if_unused()
            raise UserError(first_line(error)) from error
        trainer.fit_loop.__class__ = FitLoop  # Lightning has no argument for its loop
        trainer._checkpoint_connector.__class__ = CheckpointConnector  # nor for this
        return trainer

    @property
    def folder_of_runs(self) -> Path:
        """The folder of all runs of the recipe."""
        return Path(self.config.trainer.default_root_dir) / self.recipe

    def _plugins(self) -> list[Any]:
        """The plugins of `--trainer.plugins`."""
        requested = self._get(self.config_init, "trainer", default={}).get("plugins")
        return requested if isinstance(requested, list) else [requested] if requested else []

    def _loggers(self, run: RunFolder) -> list[Logger]:
        """The run's own loggers, and those of `--trainer.logger`."""
        root = self.config.trainer.default_root_dir
        loggers: list[Logger] = [MetricsFile(root, self.recipe, run.path.name)]
        if self.config.tensorboard:
            try:
                loggers.append(TensorBoardLogger(root, self.recipe, run.path.name, default_hp_metric=False))
            except ModuleNotFoundError as error:
                raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from error
        requested = self._get(self.config_init, "trainer", default={}).get("logger")
        requested = requested if isinstance(requested, list) else [requested]
        return loggers + [each for each in requested if isinstance(each, Logger)]


class FitLoop(_FitLoop):
    """Ends a resumed run properly that has nothing left to train: it exports, as it could not before."""

    @property
    def skip(self) -> bool:
        """Whether `on_train_start` and `on_train_end` are skipped too."""
        return super().skip and not self.restarting


class CheckpointConnector(_CheckpointConnector):
    """Loads no file that was not asked for: under SLURM, Lightning would take a `hpc_ckpt_*.ckpt` that lies around."""

    @property
    def _hpc_resume_path(self) -> None:
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


def resolve_precision(requested: str, on_gpu: bool, has_bf16: bool) -> str:
    """The precision that `auto` means here."""
    if requested != "auto":
        return requested
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if has_bf16 else "16-mixed"


def run(command: str, args: Sequence[str]) -> None:
    """Run `fit` or `validate`.

    Args:
        command: fit or validate.
        args: Arguments after the command.

    Raises:
        UserError: If the user has to correct something.
    """
    quiet_libraries()
    # Recipes come first on the command line, aliases after them; a checkpoint tells which recipe and model it needs.
    options, rest = split_options(list(args), "--config,-c", "--ckpt,--ckpt_path")
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
        configs = ["quickstart"]
    stored = None
    if command == "validate" and not any(arg in ("-h", "--help") for arg in rest):
        ckpt, stored = _to_score(ckpt, rest)
    has_source = bool(split_options(rest, "--data.source,--data.source.class_path")[0]["data.source"])
    if has_source:  # what a variable says of the recipe's source does not hold for another one
        aliases = [alias for alias in aliases if not alias.startswith("--data.source.")]
    paths = [find_recipe(name) for name in configs]
    recipe = RunFolder.recipe_of(paths[-1]) if paths else "default"
    recipes: list[str] = []
    for path in reversed(paths):  # of several recipes, the last one that names a source counts
        recipes.insert(0, f"--config={_recipe(path, has_source)}")
        data = load_recipe(path).get("data")
        has_source |= isinstance(data, dict) and "source" in data
    if stored is not None and not configs and ckpt is not None:
        recipes = settings_beside(ckpt, rest, has_source)
    weights = split_options(rest, "--weights")[0]["weights"][-1:] or ["live"]
    try:
        cli = TrainerCLI(command, recipe, [*recipes, *aliases, *rest], stored, reopens=ckpt == "last")
    except ValueError as error:  # a setting out of range, refused by the part it belongs to
        raise UserError(str(error)) from error
    if stored is not None:
        if cli.config.weights != weights[0]:
            raise UserError(
                f"weights {cli.config.weights} in a config has no effect; give --weights {cli.config.weights}"
            )
        validate(cli, stored)
        return
    run_folder = RunFolder(str(cli.trainer.log_dir))
    with ExitStack() as stack:
        if cli.trainer.is_global_zero:
            stack.enter_context(_removed_if_refused(run_folder))
            stack.enter_context(exclusive(run_folder.lock, f"training {run_folder}", waits=False))
        fit(cli, ckpt or (None if ckpts else cli.config.ckpt), run_folder.log)


def _to_score(ckpt: str | None, rest: list[str]) -> tuple[str, Artifact]:
    """The file to score, and its weights."""
    if ckpt is None:
        raise UserError("validate needs --ckpt with a checkpoint or an artifact")
    is_averaged = split_options(rest, "--weights")[0]["weights"][-1:] == ["averaged"]
    return ckpt, stored_weights(Path(ckpt), "averaged" if is_averaged else "live")


def _recipe(path: Path, has_source: bool) -> str:
    """A recipe for `--config`: its path, or its text without the source if another one is given.

    A source of another class would inherit the recipe's folder, and make it again.
    """
    recipe = load_recipe(path)
    if not has_source or not isinstance(recipe.get("data"), dict):
        return str(path)
    recipe["data"].pop("source", None)
    return yaml.safe_dump(recipe, sort_keys=False)


def validate(cli: TrainerCLI, stored: Artifact) -> None:
    """Score stored weights and print the scores; the last line is for scripts."""
    try:
        cli.model.model.load_state_dict(stored.state)
    except RuntimeError as error:
        raise UserError(f"its tensors do not fit its model ({' '.join(str(error).split())[:200]})") from error
    cli.datamodule.expected_tokenizer = stored.tokenizer_sha256
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    if not all(math.isfinite(score.bpb) for score in cli.model.scores):
        raise UserError("the score is not a number: these weights are not usable")
    names = ["plain", "sliding"][: len(cli.model.scores)]
    for name, score in zip(names, cli.model.scores, strict=True):
        logger.info(f"{name:<8} {score.line()}")
    logger.info(f"scored in {cli.model.validation_seconds:.1f} s")
    logger.info(cli.model.scores[-1].line())


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
        ckpt = _last_checkpoint(cli)
    else:
        cli.config.ckpt = ckpt  # config.yaml then repeats a resumed run, too
    if ckpt is not None:
        _resume(cli, ckpt)
    for each in cli.trainer.loggers[1:]:  # the first one is the run's own, beside config.yaml
        each.log_hyperparams(dict(flatten(yaml.safe_load(cli.parser.dump(cli.config)))))
    try:
        with logging_to(log) if cli.trainer.is_global_zero else nullcontext():
            if ckpt is not None:
                logger.info(f"resuming from {ckpt}")
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
    except SystemExit as error:  # Lightning turns Ctrl-C into exit code 1
        if cli.trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def _last_checkpoint(cli: TrainerCLI) -> str | None:
    """The checkpoint that `--ckpt last` means; None if the run of the given name has saved nothing yet."""
    name = cli.config.run_name
    newest = newest_checkpoint(cli.folder_of_runs, name)
    if newest is None:
        logger.info(f"--ckpt last: the run {name} has no checkpoint yet, and starts")
        return None
    if name is None:
        cli.config.ckpt = str(newest)
    return str(newest)


def _resume(cli: TrainerCLI, ckpt: str) -> None:
    """Check a checkpoint before any data is prepared.

    Raises:
        UserError: If it is damaged, or of another model or another run's text. Where other programs have started the
            processes, `Checkpoints` raises it on all of them: the others may see another file, and would wait.
    """
    environment = getattr(cli.trainer.strategy, "cluster_environment", None)
    checkpoints = next(each for each in cli.trainer.callbacks if isinstance(each, Checkpoints))  # type: ignore[attr-defined]
    try:
        checkpoint = load_run(ckpt)
        cli.model.check_resumable(checkpoint[METADATA_KEY], cli.datamodule)
        checkpoints.resumed = stored_checksum(ckpt)
        for each in cli.trainer.loggers:
            if isinstance(each, MetricsFile):
                each.resumed_step = checkpoint["global_step"]
    except UserError as error:
        if cli.trainer.world_size == 1 or environment is None or not environment.creates_processes_externally:
            raise
        checkpoints.problem = error
    cli.datamodule.resumes = True


@contextmanager
def _removed_if_refused(run_folder: RunFolder) -> Iterator[None]:
    """Remove the folder of a run that was refused before it trained or saved anything."""
    try:
        yield
    except UserError:
        run_folder.remove_if_unused()
        raise


def make_parser(command: str) -> LightningArgumentParser:
    """The options of fit or validate, without parsing any."""

    class Parsed(Exception):
        pass

    class OnlyParser(TrainerCLI):
        @override
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            raise Parsed(parser)

    try:
        OnlyParser(command, "", [])
    except Parsed as parsed:
        return parsed.args[0]
    raise RuntimeError("Lightning no longer parses while it is constructed")
