"""Starts a run from the weights of another one: new schedule, new optimizer state, and other text if that is given."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from trainer.checkpoint import METADATA_KEY, load_checkpoint
from trainer.data.identity import fingerprint
from trainer.datamodule import data_of
from trainer.errors import UserError
from trainer.evaluation.metric import Score
from trainer.files import sha256_of
from trainer.lightning_module import LanguageModel
from trainer.loading import is_artifact, stored_weights
from trainer.logging import logger
from trainer.quantize.artifact import Artifact
from trainer.run_folder import RunFolder

FROM_SUMMARY = ("steps", "train_tokens", "text_fingerprint", "shards_fingerprint")


class WarmStart(pl.Callback):
    """Loads the weights, scores them before the first step, and remembers where they come from.

    Attributes:
        ancestry: The runs that the weights come from, the newest first: file, sha256, and what its summary says.
        score: Score of the weights before the first step, by plain windows; None without a parent.
    """

    def __init__(self, path: str | None = None, sha256: str | None = None) -> None:
        """Start from a file.

        Args:
            path: Artifact or checkpoint whose weights the run starts from. null: none.
            sha256: Hash that the file must have. null: any.
        """
        self.path = path
        self.sha256 = sha256
        self.ancestry: list[dict[str, Any]] = []
        self.score: Score | None = None

    def load(self, module: LanguageModel) -> Artifact:
        """Put the weights into the model.

        Returns:
            What the file holds.

        Raises:
            UserError: If the file cannot be read, is another one than the hash says, or holds another model.
        """
        path = Path(str(self.path))
        weights = stored_weights(path, "best")
        sha256 = sha256_of(path)
        if self.sha256 not in (None, sha256):
            raise UserError(
                f"init_from {path}: its sha256 is {sha256[:12]}..., not the {str(self.sha256)[:12]}... of "
                "init_from_sha256; give the file that the run began with"
            )
        run = RunFolder.containing(path)
        if different := module.difference_from(weights.model.to_dict(), "there"):
            hint = f" --config {run.config} has them," if run.config.is_file() else ""
            raise UserError(
                f"init_from {path}: holds another model ({different}); give the options of its run,{hint} or another "
                "file"
            )
        try:
            module.model.load_state_dict(weights.state)
        except RuntimeError as error:
            raise UserError(f"init_from {path}: its tensors do not fit its model; give another file") from error
        self.sha256 = sha256
        facts, before = _origin(path, run)
        self.ancestry = [{"file": str(path), "sha256": sha256, **facts}, *before]
        return weights

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Score the weights before the first step; a resumed run knows the score."""
        if self.ancestry and self.score is None:
            data = data_of(trainer)
            self.score = pl_module.score_model("parent_plain", pl_module.model, data.evaluation.plain, data.val_tokens)
            logger.info(f"starting from {self.ancestry[0]['file']}, which scores {self.score.bpb:.4f} bpb (plain)")

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        """Keep the origin with the weights."""
        metadata = checkpoint.setdefault(METADATA_KEY, {})
        metadata["ancestry"] = self.ancestry
        metadata["parent_score"] = None if self.score is None else self.score._asdict()

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        """A resumed run has the origin of the run that it continues."""
        metadata = checkpoint[METADATA_KEY]
        self.ancestry = _ancestry(metadata.get("ancestry"))
        score = metadata.get("parent_score")
        self.score = None if score is None else Score(**score)


def _origin(path: Path, run: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a checkpoint, or the summary beside an artifact, says of the training, and of what came before it."""
    if not is_artifact(path):
        checkpoint = load_checkpoint(path)
        metadata, steps = checkpoint[METADATA_KEY], checkpoint["global_step"]
        facts = {"steps": steps, "train_tokens": steps * metadata.get("batch_tokens", 0)}
        facts["shards_fingerprint"] = fingerprint(metadata.get("shards"))
        return facts, _ancestry(metadata.get("ancestry"))
    # `trainer export` writes into a folder of the run.
    summary = run.read_summary() or RunFolder(run.path.parent).read_summary() or {}
    return {name: summary[name] for name in FROM_SUMMARY if name in summary}, _ancestry(summary.get("ancestry"))


def _ancestry(value: Any) -> list[dict[str, Any]]:
    """The ancestry in a file, as far as it is one."""
    entries = value if isinstance(value, list) else []
    return [each for each in entries if isinstance(each, dict) and {"file", "sha256"} <= set(each)]
