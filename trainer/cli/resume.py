"""What a run begins with: a checkpoint of its own, or the weights of another run."""

from pathlib import Path
from typing import Any

from trainer.callbacks.checkpoint import Checkpoints
from trainer.callbacks.metrics_file import MetricsFile
from trainer.callbacks.warm_start import WarmStart
from trainer.checkpoint import METADATA_KEY, read_progress, stored_checksum, verify_checksum
from trainer.cli.lightning_cli import TrainerCLI
from trainer.data.local_text import LocalText
from trainer.data.tokenizer import check_case_markup, load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.loading import load_run
from trainer.logging import logger
from trainer.recipes import load_recipe
from trainer.run_folder import RunFolder


def last_checkpoint(cli: TrainerCLI) -> str | None:
    """The checkpoint that `--ckpt last` means; None if the run of the given name has saved nothing yet."""
    name = cli.config.run_name
    newest = newest_checkpoint(cli.folder_of_runs, name)
    if newest is None:
        logger.info(f"--ckpt last: the run {name} has no checkpoint yet, and starts")
        return None
    if name is None:
        cli.config.ckpt = str(newest)
    return str(newest)


def newest_checkpoint(parent: Path, name: str | None = None) -> Path | None:
    """The newest whole checkpoint of all runs of a recipe, or of one of them; each newer one that is damaged is named.

    The newest of a run is the one with the most steps. Of several runs, the newest is the one that saved last. Both are
    read from the files: copying a run changes the times of its files.

    Args:
        parent: Folder of the recipe's runs.
        name: The only run to look at.

    Returns:
        The file; None if the named run has saved nothing yet.

    Raises:
        UserError: If there is none, none that is whole, or a newer one may not be read.
    """
    runs: list[tuple[float, list[tuple[int, Path]]]] = []
    for run in map(RunFolder, [parent / name] if name else sorted(parent.glob("*"))):
        files = [path for path in (run.last_checkpoint, *run.step_checkpoints()) if path.is_file()]
        progress = {path: read_progress(path) for path in files}
        steps = sorted(((progress[path].step, path) for path in files), key=lambda pair: pair[0], reverse=True)
        if files:
            runs.append((max(each.saved_at for each in progress.values()), steps))
    runs.sort(key=lambda run: run[0], reverse=True)  # stable, and last.ckpt before another name of the same file
    for _, steps in runs:
        for step, path in steps:
            if (problem := verify_checksum(path)) is None:
                others = [f"{each[0][1]} (step {each[0][0]:,})" for _, each in runs if each is not steps]
                if others:
                    logger.info(
                        f"--ckpt last: takes {path} (step {step:,}), saved last; there are {', '.join(others)}, too"
                    )
                return path
            logger.warning(f"{path}: is damaged ({problem}); looking for an older one")
    if name and not runs:
        return None
    raise UserError(
        f"--ckpt last: {parent / (name or '')} holds no {'whole ' if runs else ''}checkpoint; start without --ckpt"
    )


def start_from(cli: TrainerCLI, resumes: bool) -> None:
    """Take the weights of another run, unless a run that began with them is resumed, and its tokenizer.

    Raises:
        UserError: If they do not fit.
    """
    path = Path(cli.config.init_from)
    source, tokenizer = cli.datamodule.source, RunFolder.containing(path).tokenizer
    if isinstance(source, LocalText) and source.given_tokenizer is None and tokenizer.is_file():
        if (size := cli.config.data.source.init_args.get("vocab_size")) is not None:
            raise UserError(
                f"data.source.vocab_size {size} is for training a tokenizer, but --init_from takes that of the other "
                "run; leave it out"
            )
        source.given_tokenizer = tokenizer
        cli.config.data.source.init_args.tokenizer = str(tokenizer)
    _check_case_markup(cli, tokenizer)
    if resumes:
        return
    if cli.datamodule.held_out_tokens is not None:
        logger.warning(f"data.held_out_tokens keeps text from this run alone; {path} may have been trained on it")
    try:
        _load_parent(cli)
    except UserError as error:
        _raise_together(cli, error)


def _load_parent(cli: TrainerCLI) -> None:
    warm_start = cli.callback(WarmStart)
    cli.datamodule.expected_tokenizer = warm_start.load(cli.model).tokenizer_sha256
    cli.config.init_from_sha256 = warm_start.sha256


def resume(cli: TrainerCLI, ckpt: str) -> None:
    """Check a checkpoint before any data is prepared.

    Raises:
        UserError: If it is damaged, or of another model or another run's text. Where other programs have started the
            processes, `Checkpoints` raises it on all of them: the others may see another file, and would wait.
    """
    checkpoints = cli.callback(Checkpoints)
    try:
        checkpoint = load_run(ckpt)
        _check_steps(cli, checkpoint["global_step"])
        _check_source(cli, RunFolder.containing(Path(ckpt)))
        _check_case_markup(cli, RunFolder.containing(Path(ckpt)).tokenizer)
        _check_parent(cli, checkpoint[METADATA_KEY].get("ancestry") or [])
        cli.model.check_resumable(checkpoint[METADATA_KEY], cli.datamodule)
        checkpoints.resumed = stored_checksum(ckpt)
        for each in cli.trainer.loggers:
            if isinstance(each, MetricsFile):
                each.resumed_step = checkpoint["global_step"]
    except UserError as error:
        _raise_together(cli, error)
    cli.datamodule.resumes = True


def _check_steps(cli: TrainerCLI, steps: int) -> None:
    """Refuse a run that would be labeled with fewer steps than it has.

    Raises:
        UserError: If the checkpoint is beyond the last step.
    """
    if 0 < cli.trainer.max_steps < steps:
        raise UserError(
            f"--trainer.max_steps {cli.trainer.max_steps}: the checkpoint has {steps:,} steps already; give at least "
            "as many, or an earlier --ckpt"
        )


def _check_parent(cli: TrainerCLI, ancestry: list[dict[str, Any]]) -> None:
    """Refuse a resumed run another origin than the one it has, which would be recorded and not be true.

    Raises:
        UserError: If it is another one.
    """
    path = cli.config.init_from
    if path is None:
        return
    origin = ancestry[0]["sha256"] if ancestry else None
    if Path(path).is_file() and sha256_of(path) != origin:
        raise UserError(
            f"--init_from {path}: the run of --ckpt did not begin with this file, and resuming keeps its own weights; "
            "leave one of the two out"
        )
    cli.config.init_from_sha256 = origin


def _raise_together(cli: TrainerCLI, error: UserError) -> None:
    """Raise an error here, or where other programs have started the processes, later on all of them.

    Raises:
        UserError: The error.
    """
    environment = getattr(cli.trainer.strategy, "cluster_environment", None)
    if cli.trainer.world_size == 1 or environment is None or not environment.creates_processes_externally:
        raise error
    cli.callback(Checkpoints).problem = error


def _check_case_markup(cli: TrainerCLI, tokenizer: Path) -> None:
    """Refuse another setting than that of the run before its text is encoded again, which takes minutes.

    Raises:
        UserError: If the run's tokenizer has case markup and none is wanted, or the other way round.
    """
    if tokenizer.is_file():
        check_case_markup(tokenizer, load_tokenizer(tokenizer), cli.datamodule.source.case_markup)


def _check_source(cli: TrainerCLI, run: RunFolder) -> None:
    """Refuse to prepare other text than the one that a resumed run read, which could take minutes.

    Raises:
        UserError: If the source is of another class than that of the run, and has no shards yet.
    """
    if not run.config.is_file():
        return
    source, now = (load_recipe(run.config).get("data") or {}).get("source") or {}, type(cli.datamodule.source).__name__
    before = str(source.get("class_path") if isinstance(source, dict) else source).rpartition(".")[2]
    try:
        cli.datamodule.source.prepared()
    except UserError as error:
        if before not in ("None", now):
            raise UserError(
                f"--ckpt: its run read its text with --data.source {before}, not {now}; give its config, --config "
                f"{run.config}"
            ) from error
