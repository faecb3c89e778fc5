"""The summary of a finished run: `summary.json`, and its last lines."""

from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from trainer.data.identity import Identity, fingerprint
from trainer.data.manifest import Manifest
from trainer.data.shards import TokenFiles
from trainer.evaluation.metric import Score
from trainer.logging import logger
from trainer.optim.schedule import warmdown_warning
from trainer.run_folder import RunFolder
from trainer.versions import versions

MANY_EPOCHS = 16


def make_summary(
    scores: dict[str, Score],
    more: dict[str, Any],
    steps: int,
    batch_tokens: int,
    train_seconds: float,
    shards: list[Path],
    identity: Identity,
    tokenizer_sha256: str,
    held_out_tokens: int | None,
    model: nn.Module,
) -> dict[str, Any]:
    """Everything that `summary.json` says of a run.

    Args:
        scores: Score of each stage; the last one is the run's.
        more: Entries about the export and the averaging.
        steps: Steps of the run.
        batch_tokens: Tokens of a step.
        train_seconds: Time on the training clock.
        shards: Training shards.
        identity: Identity of all shards.
        tokenizer_sha256: sha256 of the tokenizer.
        held_out_tokens: Tokens at the end of the training shards that were not trained on.
        model: The model, for its parameters and its device.
    """
    final = list(scores.values())[-1]
    manifest = Manifest.read(shards[0].parent)
    parameters = list(model.parameters())
    return {
        "val_bpb": final.bpb,
        "val_loss": final.loss,
        "val_tokens": final.tokens,
        "val_bytes": final.bytes,
        "steps": steps,
        "train_tokens": steps * batch_tokens,
        "epochs": steps * batch_tokens / len(TokenFiles(shards, held_out_tokens or 0)),
        "text_fingerprint": manifest.text_fingerprint if manifest else None,
        "shards_fingerprint": fingerprint(identity),
        "tokenizer_sha256": tokenizer_sha256,
        "held_out_tokens": held_out_tokens,
        "train_seconds": train_seconds,
        **more,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "stages": {name: score._asdict() for name, score in scores.items()},
        "versions": versions(parameters[0].device),
    }


def log_summary(summary: dict[str, Any], run: RunFolder, data: Path, has_report: bool) -> None:
    """Log the end of a run in a few lines, with what to do next; the last one is for scripts.

    Args:
        summary: As of `make_summary`.
        run: Folder of the run.
        data: Folder of the shards.
        has_report: Whether `report.html` was drawn.
    """
    stages = summary["stages"]
    speed = summary["train_tokens"] / max(summary["train_seconds"], 1e-9)
    logger.info(f"\nRun finished: {run}")
    logger.info(
        f"  trained     {summary['steps']:,} steps, {summary['train_tokens']:,} tokens "
        f"({summary['epochs']:.1f} epochs) in {summary['train_seconds']:.0f} s ({speed:,.0f} tokens/s)"
    )
    for name, stage in stages.items():
        logger.info(f"  {name:<17} {stage['bpb']:.4f} bpb  ({stage['tokens']:,} tokens, {stage['bytes']:,} bytes)")
    if "averaged_plain" in stages and stages["averaged_plain"]["bpb"] > stages["live_plain"]["bpb"]:
        logger.info("  the average is worse than the live weights; --averaging.method null makes none")
    settings = run.settings()
    if summary["averaged_steps"] < 2 and settings.get("averaging.method") == "late_swa":
        every, start_frac = settings.get("averaging.every"), settings.get("averaging.start_frac")
        logger.info(
            f"  no average, so the live weights count: late SWA takes a snapshot every {every} steps while the "
            f"learning rate is below {start_frac} of its full value, and this run had {summary['averaged_steps']}"
        )
    warmdown = [settings.get(f"model.schedule.{name}") for name in ("warmdown_steps", "warmdown_frac")]
    if isinstance(warmdown[0], int) and (warning := warmdown_warning(warmdown[0], warmdown[1], summary["steps"])):
        logger.info(f"  {warning}")
    if summary["epochs"] > MANY_EPOCHS:
        logger.info(f"  after {MANY_EPOCHS} epochs the same text teaches little (arXiv 2305.16264); more of it helps")
    if "bytes_total" in summary:
        logger.info(
            f"  size        {summary['bytes_model']:,} model + {summary['bytes_code']:,} code = "
            f"{summary['bytes_total']:,} of {summary['bytes_cap']:,} bytes"
        )
    if has_report:
        logger.info(f"  report      {run.report}")
    if "bytes_total" in summary:
        logger.info(f'  next        trainer generate --artifact {quote(str(run.artifact))} --prompt "The"')
        logger.info(f"              trainer validate --ckpt {quote(str(run.artifact))}")
    if "bytes_total" in summary and "script" not in summary:  # whose changes the code that ships would lack
        entry = "--name NAME --author AUTHOR --github_id ID --track non-record-16mb"
        logger.info(f"              trainer submit {quote(str(run))} --data {quote(str(data))} {entry}")
    logger.info(Score(*(summary[f"val_{name}"] for name in Score._fields)).line())
