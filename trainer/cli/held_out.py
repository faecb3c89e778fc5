"""Whether `validate` scores the text of the run: the part that it held out, or shards that are still its own."""

from pathlib import Path

from trainer.checkpoint import METADATA_KEY
from trainer.data.identity import fingerprint, identify
from trainer.data.manifest import Manifest
from trainer.data.source import Source
from trainer.errors import UserError
from trainer.loading import is_artifact, load_run
from trainer.logging import logger
from trainer.run_folder import RunFolder


def held_out_tokens(ckpt: Path, source: Source, given: int | None) -> int:
    """Number of tokens at the end of the training text that a run held out.

    Args:
        ckpt: Checkpoint or artifact of the run.
        source: The text.
        given: Number of a config or of the command line.

    Raises:
        UserError: If the run held nothing out, another number is given, the text is another one, or none of this can be
            known.
    """
    tokens, shards = _of_run(ckpt)
    if tokens is None:
        raise UserError("--split held_out: this run trained on all of its text; train one with data.held_out_tokens")
    if given not in (None, tokens):
        raise UserError(
            f"--split held_out: this run held out {tokens:,} tokens, not {given:,}; leave --data.held_out_tokens out"
        )
    text = source.prepared()
    if fingerprint(identify(text, reads_all=True)) != shards:
        raise UserError(
            f"--split held_out: {text.train[0].parent} does not hold the text of this run; name the folder of its "
            "shards with --data.source.folder"
        )
    return tokens


def warn_of_other_text(ckpt: Path, source: Source) -> None:
    """Tell of shards that have been replaced since the run, as far as their manifest says so.

    Args:
        ckpt: Checkpoint or artifact of the run.
        source: The text that its config names.
    """
    text = source.prepared()
    folder = text.train[0].parent
    if Manifest.read(folder) is None:  # reading all shards could take minutes
        return
    now = identify(text)
    if is_artifact(ckpt):
        summary = RunFolder.containing(ckpt).read_summary()
        is_same = summary is None or summary["shards_fingerprint"] == fingerprint(now)
    else:
        before = load_run(ckpt)[METADATA_KEY].get("shards") or now
        is_same = [tuple(shard) for shard in before["val"]] == now["val"]
    if not is_same:
        logger.warning(
            f"{folder}: some of its shards are not those of this run any more (trainer prepare --config "
            f"{RunFolder.containing(ckpt).config} --verify checks them); with another validation split, the score does "
            "not compare with the run's"
        )


def _of_run(ckpt: Path) -> tuple[int | None, str]:
    """Number of tokens that a run held out, and fingerprint of its shards."""
    if not is_artifact(ckpt):
        metadata = load_run(ckpt)[METADATA_KEY]
        return metadata.get("held_out_tokens"), fingerprint(metadata["shards"])
    run = RunFolder.containing(ckpt)
    summary = run.read_summary()
    if summary is None or not isinstance(summary.get("held_out_tokens", ""), int | None):
        raise UserError(
            f"--split held_out: what the run of {ckpt} held out is in its {run.summary.name}, which is not beside it"
        )
    return summary["held_out_tokens"], summary["shards_fingerprint"]
