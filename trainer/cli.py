"""The Lightning command line of `fit` and `validate`: recipes by name, run folders, precision, checkpoints."""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from trainer.callbacks.checkpoint import LAST, Checkpoints
from trainer.callbacks.checkpoint_io import AtomicCheckpointIO
from trainer.callbacks.ema import EMA
from trainer.callbacks.export import PostTrainExport
from trainer.callbacks.late_swa import LateSWA
from trainer.callbacks.progress import Progress
from trainer.callbacks.report import Report
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.wallclock import WallclockCutoff
from trainer.callbacks.warmup import CompileWarmup
from trainer.callbacks.watch import Watch
from trainer.checkpoint import damage, load_checkpoint
from trainer.datamodule import TokenData
from trainer.env_aliases import alias_options
from trainer.errors import UserError
from trainer.evaluation.windows import EvaluationConfig
from trainer.lightning_module import LanguageModel
from trainer.loading import run_folder_of, stored_weights
from trainer.noise import quiet_libraries
from trainer.options import ShortErrors
from trainer.recipes import find_recipe
from trainer.run_log import logged_to

Precision = Literal["auto", "bf16-mixed", "16-mixed", "32-true", "64-true"]


DESCRIPTIONS = {
    "fit": "Train a recipe, export it, load it back and score it; without --config it is quickstart. A recipe's values "
    "come before the defaults below (--print_config shows them). "
    "Example: trainer fit --config int5mlp_10l --wallclock.seconds 300 --model.num_layers 9",
    "validate": "Score a checkpoint or an artifact with the settings of its run. "
    "Example: trainer validate --ckpt runs/quickstart/1/artifact.zst --eval.stride 0",
}


class FitParser(ShortErrors, LightningArgumentParser):
    """Lightning's, with errors in one line."""


class TrainerCLI(LightningCLI):
    """One parser for both commands; the command itself is run by `main`."""

    def __init__(self, command: str, recipe: str, args: list[str]) -> None:
        """Parse and build everything.

        Args:
            command: fit or validate.
            recipe: Name of the recipe, for the run folder.
            args: Words after the command.
        """
        self.command = command
        self.recipe = recipe
        super().__init__(
            LanguageModel,
            TokenData,
            run=False,
            args=args,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            parser_class=FitParser,
            parser_kwargs={
                "prog": f"trainer {command}",
                "usage": f"trainer {command} [--config RECIPE] [options]",
                "description": DESCRIPTIONS[command],
                "allow_abbrev": False,
            },
            trainer_defaults={
                "default_root_dir": "runs",
                "callbacks": [Throughput()] if command == "fit" else [],
                "max_epochs": -1,
                "max_steps": -1,
                "val_check_interval": 1000,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # its padding would score windows twice
                "inference_mode": False,  # one grad mode less to compile for
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given words; Lightning would warn about `sys.argv`."""
        self.config = parser.parse_args(args)

    @classmethod
    def make_parser(cls, command: str) -> LightningArgumentParser:
        """The options of a command, without parsing any."""

        class Found(Exception):
            pass

        class OnlyParser(cls):  # type: ignore[misc, valid-type]
            def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
                raise Found(parser)

        try:
            OnlyParser(command, "", [])
        except Found as found:
            return found.args[0]
        raise RuntimeError("Lightning no longer parses while it is constructed")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Evaluation, named callbacks and what Lightning has no word for."""
        parser.add_class_arguments(EvaluationConfig, "eval")
        parser.link_arguments("eval", "data.evaluation", apply_on="instantiate")
        parser.link_arguments("model.vocab_size", "data.vocab_size")
        parser.add_lightning_class_args(CompileWarmup, "warmup")
        parser.add_lightning_class_args(WallclockCutoff, "wallclock")
        parser.add_lightning_class_args(Watch, "watch")
        parser.add_lightning_class_args(LateSWA, "late_swa")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Progress, "progress")  # its bar ends before the export prints
        parser.add_lightning_class_args(PostTrainExport, "export")
        parser.add_lightning_class_args(Report, "report")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_argument(
            "--precision",
            type=Precision,
            default="auto",
            help="auto: bf16-mixed where the GPU has it, else 16-mixed; 32-true on a CPU.",
        )
        text = "While training, log to TensorBoard too; needs the package tensorboard."
        parser.add_argument("--tensorboard", type=bool, default=False, help=text)
        parser.add_argument("--run_name", type=str | None, help="Name of the run's folder; default: the next number.")
        if self.command == "fit":
            text = "Go on from this checkpoint; last: the newest one of this recipe."
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

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Resolve device and precision, give the run its folder."""
        options = self.config.trainer
        if options.accelerator == "auto":  # Apple's GPUs have no float64 for exact sums: only when asked for
            kwargs["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
            if kwargs["accelerator"] == "cpu" and options.devices == "auto":
                kwargs["devices"] = 1
        for limit in ("max_steps", "max_epochs", "limit_train_batches", "log_every_n_steps", "val_check_interval"):
            if getattr(options, limit) == 0:
                raise UserError(f"trainer.{limit} must not be 0")
        if self.command == "fit" and options.fast_dev_run:
            raise UserError("trainer.fast_dev_run makes no run folder; use --trainer.max_steps 1")
        kind = kwargs.get("accelerator", options.accelerator)
        if options.precision is None:
            on_gpu = kind in ("cuda", "gpu")
            has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            kwargs["precision"] = resolve_precision(self.config.precision, on_gpu, has_bf16)
        kwargs["plugins"] = [*(options.plugins or []), AtomicCheckpointIO()]
        if self.command == "fit":
            name, version = Path(options.default_root_dir), self.config.run_name
            folder = claim_run_folder(name / self.recipe, version)
            loggers: list[Logger] = [CSVLogger(name, self.recipe, folder.name, flush_logs_every_n_steps=50)]
            if self.config.tensorboard:
                loggers.append(_tensorboard(name, self.recipe, folder.name))
            asked = self._get(self.config_init, "trainer", default={}).get("logger")  # more, beside the run's own
            asked = asked if isinstance(asked, list) else [asked]
            kwargs["logger"] = loggers + [logger for logger in asked if isinstance(logger, Logger)]
        else:
            kwargs["logger"] = False
            kwargs["enable_checkpointing"] = False
            # The run's own config is read, and what it left out while training would be left out of the score.
            kwargs |= {"limit_val_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}
            kept = [key for key in self.parser.callback_keys if key != "checkpoints"]
            self.parser.callback_keys = kept
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError) as error:
            if self.command == "fit" and folder.is_dir():
                folder.rmdir()
            raise UserError(first_line(error)) from error
        trainer.fit_loop.__class__ = FitLoopWithAnEnd  # Lightning has no argument for its loop
        return trainer


class FitLoopWithAnEnd(_FitLoop):
    """A run that was gone on with and has nothing left to train still ends: it exports, as it could not before."""

    @property
    def skip(self) -> bool:
        """Whether `on_train_start` and `on_train_end` are left out too."""
        return super().skip and not self.restarting


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0]


def _tensorboard(root: Path, recipe: str, run: str) -> TensorBoardLogger:
    try:
        return TensorBoardLogger(root, recipe, run, default_hp_metric=False)
    except ModuleNotFoundError as error:
        raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from error


def resolve_precision(asked: str, on_gpu: bool, has_bf16: bool) -> str:
    """What `auto` means here."""
    if asked != "auto":
        return asked
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if has_bf16 else "16-mixed"


def claim_run_folder(parent: Path, name: str | None) -> Path:
    """Make the run's own folder; the first rank's counts, and Lightning tells the others.

    Raises:
        UserError: If the name is taken or the folder cannot be made.
    """
    if name and name != Path(name).name:
        raise UserError(f"--run_name {name}: is no name of a folder in {parent}")
    if getattr(rank_zero_only, "rank", 0) != 0:
        return parent / (name or "0")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
            folder = parent / (name or str(max(numbers, default=0) + 1))
            try:
                folder.mkdir()
                return folder
            except FileExistsError as error:
                if name:
                    raise UserError(f"{folder}: this run exists already; choose another --run_name") from error
    except OSError as error:
        raise UserError(f"{parent}: no run folder can be made there ({error.strerror})") from error


def take_option(args: list[str], *names: str) -> tuple[list[str], list[str]]:
    """Split off every value of an option; returns (values, other words)."""
    values: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            rest.append(word)
        elif equals:
            values.append(value)
        else:
            values.append(next(words, ""))
    return values, rest


def newest_checkpoint(root: Path, recipe: str) -> str:
    """The newest checkpoint of a recipe's runs that is whole; says which newer ones are not.

    Raises:
        UserError: If there is none.
    """
    found = list((root / recipe).glob(f"*/checkpoints/{LAST}")) + list(
        (root / recipe).glob("*/checkpoints/step-*.ckpt")
    )
    found.sort(key=_modified, reverse=True)  # stable: of two names, last.ckpt comes first
    for path in found:
        if (reason := damage(path)) is None:
            return str(path)
        _print_once(f"{path}: is damaged ({reason}); looking for an older one")
    raise UserError(
        f"--ckpt last: {root / recipe} holds no {'whole ' if found else ''}checkpoint; start without --ckpt"
    )


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # another run has just taken it away
        return 0


def run(command: str, args: Sequence[str]) -> None:
    """Run `fit` or `validate` with the words that follow it.

    Raises:
        UserError: For anything the user can mend.
    """
    quiet_libraries()
    given = list(args)
    wants_help = any(word in ("-h", "--help") for word in given)
    configs, rest = take_option(given, "-c", "--config")
    ckpts, rest = take_option(rest, "--ckpt", "--ckpt_path")
    ckpt = ckpts[-1] if ckpts else None
    if ckpt and re.match(r"[a-z][a-z0-9+.-]*://", ckpt, re.IGNORECASE):
        raise UserError(f"--ckpt {ckpt}: addresses are not opened; download the file and give its path")
    aliases: list[str] = []
    if configs:
        aliases, notes = alias_options(os.environ, command)
        for note in notes:
            _print_once(f"environment: {note}")
        alias_ckpts, aliases = take_option(aliases, "--ckpt")
        ckpt = ckpt or (alias_ckpts[-1] if alias_ckpts else None)
    if command == "validate" and not wants_help:
        if ckpt is None:
            raise UserError("validate needs --ckpt with a checkpoint or an artifact")
        if not Path(ckpt).is_file():
            raise UserError(f"--ckpt {ckpt}: there is no such file")
        beside = run_folder_of(Path(ckpt)) / "config.yaml"
        if not configs and beside.is_file():
            configs = [str(beside)]
        if not configs and not any(word.startswith("--data.") for word in rest):
            raise UserError(f"--ckpt {ckpt}: no config.yaml lies in its run folder; name its recipe with --config")
    if not configs and command == "fit":
        configs = ["quickstart"]
    paths = [find_recipe(name) for name in configs]
    recipe = paths[-1].stem if paths else "default"
    if take_option(rest, "--data.source")[0]:
        paths = [_without_source(path) for path in paths]
    words = [*(f"--config={path}" for path in paths), *aliases, *rest]
    stored = None
    if command == "validate" and ckpt and not wants_help:
        averaged = "averaged" in take_option(rest, "--weights")[0]
        stored = stored_weights(Path(ckpt), "averaged" if averaged else "live")
        words += [f"--{key}={json.dumps(value)}" for key, value in _flat(stored.model.to_dict(), "model")]
    try:
        cli = TrainerCLI(command, recipe, words)
    except ValueError as error:  # a setting out of range, refused by the part it belongs to
        raise UserError(str(error)) from error
    if command == "fit":
        folder = Path(str(cli.trainer.log_dir))
        with _gone_if_refused(folder) if cli.trainer.is_global_zero else nullcontext():
            fit(cli, ckpt or cli.config.ckpt, folder / "train.log")
        return
    assert stored is not None
    cli.model.model.load_state_dict(stored.state)
    cli.datamodule.expected_tokenizer = stored.tokenizer_sha256
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    names = ["plain", "sliding"][: len(cli.model.scores)]
    for name, score in zip(names, cli.model.scores, strict=True):
        _print_once(f"{name:<8} {score.line()}")
    _print_once(f"scored in {cli.model.validation_seconds:.1f} s")
    _print_once(cli.model.scores[-1].line())


def fit(cli: TrainerCLI, ckpt: str | None, log: Path) -> None:
    """Train, export and report.

    Args:
        cli: Of the command fit.
        ckpt: Checkpoint to go on from; last: the newest one of the recipe.
        log: File that what is printed is copied to.

    Raises:
        UserError: For anything the user can mend.
    """
    if ckpt == "last":
        ckpt = newest_checkpoint(Path(cli.config.trainer.default_root_dir), cli.recipe)
    if ckpt is not None:
        load_checkpoint(ckpt)  # refuse a bad file before any work is done
        _print_once(f"going on from {ckpt}")
        cli.config.ckpt = ckpt  # what config.yaml repeats is a run that goes on, too
    try:
        with logged_to(log) if cli.trainer.is_global_zero else nullcontext():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt, weights_only=True)
    except SIGTERMException as error:
        raise SystemExit(143) from error
    except MisconfigurationException as error:
        raise UserError(first_line(error)) from error
    except torch.AcceleratorError as error:
        raise UserError(
            f"the device failed, seen at step {cli.trainer.global_step + 1:,}: {first_line(error)}. "
            "What was saved stays: go on with --ckpt last. If it fails again, CUDA_LAUNCH_BLOCKING=1 tells where"
        ) from error
    except RuntimeError as error:
        if cli.trainer.world_size == 1 or not lost_a_process(error):
            raise
        raise UserError(
            "another process of this run has ended, and this one with it; its own words say why. "
            "What was saved stays: go on with --ckpt last, on any number of devices"
        ) from error
    except OSError as error:  # a full disk or a folder that went away, met by a library
        raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except SystemExit as error:  # Lightning turns Ctrl-C into exit code 1
        if cli.trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _gone_if_refused(folder: Path) -> Iterator[None]:
    """Take a run's folder away again if the run was refused before it learned or saved anything."""
    try:
        yield
    except UserError:
        found = list(folder.glob("*"))
        if {path.name for path in found} <= {"config.yaml", "train.log"}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a process that takes part in it is gone."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, torch.distributed.DistBackendError) or any(word in str(error) for word in words)


def _without_source(path: Path) -> Path:
    """A copy of a recipe that leaves the text open; another class would inherit its folder, and make it anew."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return path  # the parser says what is wrong with it
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or "source" not in data:
        return path
    del data["source"]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / path.name
    copy.write_text(yaml.safe_dump(values, sort_keys=False))
    return copy


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}.{key}"
        pairs += _flat(value, name) if isinstance(value, dict) else [(name, value)]
    return pairs


@rank_zero_only
def _print_once(text: str) -> None:
    print(text, flush=True)
