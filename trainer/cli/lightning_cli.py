"""Lightning's CLI with our options: evaluation, callbacks, precision, run folders. It builds the objects of a run."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from typing_extensions import override

from trainer.callbacks import CALLBACKS
from trainer.callbacks.checkpoint import AtomicCheckpointIO
from trainer.callbacks.metrics_file import MetricsFile
from trainer.cli.lightning_loops import CheckpointConnector, EpochLoop, FitLoop
from trainer.cli.parser import ShortErrors, split_options
from trainer.cli.trainer_options import agree_with_launcher, check_callback, check_trainer_options
from trainer.data.documents import FIELD
from trainer.datamodule import TokenData
from trainer.device import default_device, has_bfloat16
from trainer.errors import UserError, first_line
from trainer.evaluation.windows import EvaluationConfig
from trainer.lightning_module import LanguageModel
from trainer.quantize.artifact import Artifact
from trainer.recipes import flatten
from trainer.run_folder import RunFolder

C = TypeVar("C", bound=pl.Callback)
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 3e38  # that tensors can hold
Precision = Literal["auto", "bf16-mixed", "16-mixed", "32-true", "64-true"]

DESCRIPTIONS = {
    "fit": "Train, export, read back and score a recipe. Example: trainer fit --config frontier --model.num_layers 8",
    "validate": "Score a checkpoint or an artifact with the settings of its run. "
    "Example: trainer validate --ckpt runs/quickstart/1/artifact.zst --eval.stride null",
}
# What a run's own config may not change in a score: it would leave out a part of the split.
WHOLE_SPLIT = {"limit_val_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}


class TrainParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with errors in one line."""


class TrainerCLI(LightningCLI):
    """The options of both commands, and the objects that they configure."""

    model: LanguageModel
    datamodule: TokenData

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
        for name in split_options(args, "--trainer.callbacks,--trainer.callbacks+")[0]["trainer.callbacks"]:
            check_callback(name)  # the parser has other words for some of them
        self.config = parser.parse_args(args)
        self.is_dry_run = self.config.pop("dry_run", False)  # no setting of the run
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be between 0 and {2**32 - 1}, not {seed}")
        callbacks = self.config.trainer.callbacks
        for each in callbacks if isinstance(callbacks, list) else [callbacks]:
            check_callback(getattr(each, "class_path", ""))
        for name, number in flatten(self.config.as_dict()):
            if "init_args" in name:  # of a class that may be the user's own
                continue
            if isinstance(number, int) and abs(number) > LARGEST_INT:
                raise UserError(f"--{name}: a number of {len(str(number))} digits is out of range")
            if isinstance(number, float) and LARGEST_FLOAT < abs(number) < math.inf:
                raise UserError(f"--{name} {number:g} is out of range")
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
        text = "Project at Weights & Biases to log to, too, while training; needs the package wandb."
        parser.add_argument("--wandb", type=str | None, help=text)
        parser.add_argument("--run_name", type=str | None, help="Name of the run's folder; default: the next number.")
        text = "Artifact or checkpoint whose weights the run starts from, with a new schedule and optimizer state."
        other = "Hash that init_from must have; the run writes it into its config."
        # Also for validate, which reads the configs of runs.
        for name, about in (("init_from", text), ("init_from_sha256", other)):
            about = about if self.command == "fit" else argparse.SUPPRESS
            parser.add_argument(f"--{name}", type=str | None, help=about)
        parser.link_arguments("init_from", "warm_start.path")
        parser.link_arguments("init_from_sha256", "warm_start.sha256")
        is_fit = self.command == "fit"
        text = "Estimate bytes, memory, time and epochs of the run, without training or writing anything."
        text = text if is_fit else argparse.SUPPRESS  # for validate too, which reads recipes
        parser.add_argument("--dry_run", type=bool, default=False, nargs="?", const=True, help=text)
        if is_fit:
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
                help="Which weights of a checkpoint to score; live are those of its step.",
            )
            text = "CSV file for the score of each document: its tokens, bytes and nats."
            parser.add_argument("--per_document", type=str | None, help=text)
            text = "Which split is scored; held_out: the training tokens that data.held_out_tokens kept from the run."
            parser.add_argument("--split", type=Literal["val", "train", "held_out"], default="val", help=text)
            text = "Files, folders and glob patterns with text to score instead of the run's; no shards are needed."
            parser.add_argument("--text", type=list[str] | str | None, help=text)
            text = "Tokenizer for --text, that of the weights; default: tokenizer.model in their run folder."
            parser.add_argument("--tokenizer", type=str | None, help=text)
            text = "Field of a .jsonl line, or column of a .parquet file, that holds the text to score."
            parser.add_argument("--text_field", type=str, default=FIELD, help=text)
            text = "Field or column that says where a document comes from, for a score by source; default: its file."
            parser.add_argument("--source_field", type=str | None, help=text)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Resolve device and precision, and claim the run's folder."""
        options = self.config.trainer
        check_trainer_options(options)
        kwargs["devices"], kwargs["num_nodes"] = agree_with_launcher(options.devices, options.num_nodes)
        if options.accelerator == "auto":
            kwargs["accelerator"] = default_device().type
            if kwargs["accelerator"] == "cpu" and kwargs["devices"] == "auto":
                kwargs["devices"] = 1
        if options.precision is not None and self.config.precision not in ("auto", _precision_name(options.precision)):
            raise UserError(
                f"trainer.precision {options.precision} is not --precision {self.config.precision}; set only the "
                "latter, and trainer.precision to null"
            )
        requested = self.config.precision if options.precision is None else _precision_name(options.precision)
        on_gpu = kwargs.get("accelerator", options.accelerator) in ("cuda", "gpu")
        precision = resolve_precision(requested, on_gpu, on_gpu and has_bfloat16(default_device()))
        if options.precision is None:
            kwargs["precision"] = precision
        kwargs["plugins"] = [*self._plugins(), AtomicCheckpointIO()]
        if SLURMEnvironment.detect():  # Lightning would save, in the middle of an update, what it later loads unasked
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        run: RunFolder | None = None
        if self.command == "fit" and not self.is_dry_run:
            name = self.config.run_name
            run = RunFolder.claim(self.folder_of_runs, name, self.reopens and name is not None)
            try:
                kwargs["logger"] = self._loggers(run)
            except UserError:
                run.remove_if_unused()
                raise
        else:
            kwargs["logger"] = False
        if self.command == "validate":
            kwargs |= {"enable_checkpointing": False, **WHOLE_SPLIT}
            self.parser.callback_keys = ["progress"]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError, RuntimeError) as error:
            if run is not None:
                run.remove_if_unused()
            where = f"trainer.devices {options.devices}: " if "`devices`" in str(error) else ""
            raise UserError(f"{where}{first_line(error)}") from error
        if run is not None and trainer.num_nodes > 1 and _is_alone(trainer):
            run.remove_if_unused()
            raise UserError(
                f"trainer.num_nodes {trainer.num_nodes}: nothing has started the other nodes, and this one would wait "
                "for them; start all with torchrun or srun, as docs/multi-gpu.md shows"
            )
        trainer.fit_loop.__class__ = FitLoop  # Lightning has no argument for its loops
        trainer.fit_loop.epoch_loop.__class__ = EpochLoop
        trainer._checkpoint_connector.__class__ = CheckpointConnector  # nor for this
        return trainer

    @property
    def folder_of_runs(self) -> Path:
        """The folder of all runs of the recipe."""
        return Path(self.config.trainer.default_root_dir) / self.recipe

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The trainer's callbacks, with a user's own."""
        return self.trainer.callbacks  # type: ignore[attr-defined]

    def callback(self, kind: type[C]) -> C:
        """The trainer's callback of a class."""
        return next(each for each in self.callbacks if isinstance(each, kind))

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
        if self.config.wandb:
            try:
                loggers.append(WandbLogger(run.path.name, root, project=self.config.wandb, group=self.recipe))
            except ModuleNotFoundError as error:
                raise UserError("--wandb needs the package wandb; pip install wandb") from error
        requested = self._get(self.config_init, "trainer", default={}).get("logger")
        requested = requested if isinstance(requested, list) else [requested]
        return loggers + [each for each in requested if isinstance(each, Logger)]


def _is_alone(trainer: pl.Trainer) -> bool:
    """Whether no launcher, cluster or user says which of the nodes this one is."""
    environment = trainer._accelerator_connector.cluster_environment
    return type(environment) is LightningEnvironment and not {"NODE_RANK", "GROUP_RANK", "MASTER_ADDR"} & {*os.environ}


def _precision_name(given: Any) -> str:
    """The name of a precision that Lightning knows by several."""
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(str(given), str(given))


def resolve_precision(requested: str, on_gpu: bool, has_bf16: bool) -> str:
    """The precision that `auto` means here.

    Raises:
        UserError: If a CPU shall compute in float16; Lightning would take bfloat16 in silence.
    """
    if requested == "16-mixed" and not on_gpu:
        raise UserError("--precision 16-mixed needs a GPU; a CPU has bf16-mixed and 32-true")
    if requested != "auto":
        return requested
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if has_bf16 else "16-mixed"


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
