"""`trainer validate`: which weights and which text are scored, and what is printed."""

import math
from dataclasses import replace
from pathlib import Path

from trainer.callbacks import CALLBACKS
from trainer.cli.held_out import held_out_tokens, warn_of_other_text
from trainer.cli.interruption import interruptible
from trainer.cli.lightning_cli import TrainerCLI
from trainer.cli.parser import split_options
from trainer.data.documents import FIELD
from trainer.data.scored_text import ScoredText
from trainer.datamodule import TokenData
from trainer.errors import OptionError, UserError
from trainer.evaluation.metric import Score
from trainer.evaluation.per_document import PREFIXES, DocumentScores, by_source, write_csv
from trainer.files import check_replaceable
from trainer.loading import is_artifact, stored_weights
from trainer.logging import counted, logger
from trainer.quantize.artifact import Artifact
from trainer.run_folder import RunFolder

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


def weights_to_score(ckpt: str | None, rest: list[str]) -> tuple[str, Artifact]:
    """The file to score, and its weights."""
    if ckpt is None:
        raise OptionError("trainer validate", "needs --ckpt with a checkpoint or an artifact")
    is_averaged = split_options(rest, "--weights")[0]["weights"][-1:] == ["averaged"]
    if is_averaged and Path(ckpt).is_file() and is_artifact(Path(ckpt)):
        raise UserError(f"--weights averaged: {ckpt} is an artifact, which holds one set of weights; leave it out")
    stored = stored_weights(Path(ckpt), "averaged" if is_averaged else "live")
    stored.build()  # before a model is made of sizes that the file may only claim
    return ckpt, stored


def warn_of_no_effect(args: list[str]) -> None:
    """Name the options that say how to train, and so change no score."""
    given = {arg.removeprefix("--").partition("=")[0].rstrip("+") for arg in args if arg.startswith("--")}
    names = sorted(
        f"--{name}"
        for name in given - ABOUT_SCORING
        if any(name == each or name.startswith(f"{each}.") for each in ABOUT_TRAINING)
    )
    if names:
        logger.warning(f"{', '.join(names)}: no effect on trainer validate, which takes the model from the file")


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
    with interruptible():
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
