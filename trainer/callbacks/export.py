"""The end of a run: score the weights, export them, score the artifact, write the summary and draw the report."""

import hashlib
import json
import time
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning.pytorch as pl
from typing_extensions import override

from trainer.callbacks.wallclock import WallclockCutoff
from trainer.callbacks.warm_start import WarmStart
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.checkpoint import METADATA_KEY
from trainer.datamodule import POSITION_SETTINGS, TokenData, data_of
from trainer.errors import UserError
from trainer.evaluation.metric import Score
from trainer.evaluation.windows import EvaluationConfig
from trainer.files import copy_file
from trainer.lightning_module import LanguageModel
from trainer.logging import logger
from trainer.model.transformer import Transformer
from trainer.model_card import write_model_card
from trainer.quantize.export import SIZE_CAP, export
from trainer.quantize.policy import QuantizationConfig
from trainer.report.build import build_report
from trainer.run_folder import RunFolder
from trainer.script import script_record
from trainer.source_bundle import source_bundle
from trainer.summary import log_summary, make_summary


class PostTrainExport(pl.Callback):
    """Writes the artifact from the averaged weights and reports the score of the file on disk."""

    def __init__(
        self,
        quantization: QuantizationConfig = QuantizationConfig(),
        cap: int = SIZE_CAP,
        shrink_to_cap: bool = False,
        weights: Literal["average", "live", "better"] = "average",
        enabled: bool = True,
    ) -> None:
        """Export when training ends.

        Args:
            quantization: Storage types, rounding and pruning.
            cap: Largest allowed size of code and model together, in bytes (at least 1).
            shrink_to_cap: If code and model exceed the cap, prune more and store fewer bits until they fit, instead of
                failing. With loss-aware rounding, search for the finest quant_step that fits.
            weights: Which weights are stored. average: the averaged ones, where there are any. live: those of the last
                step. better: whichever scores better on data.held_out_tokens.
            enabled: Store the artifact. false only scores the weights, to compare ideas quickly; `trainer export` makes
                the artifact later.
        """
        if cap < 1:
            raise ValueError(f"export.cap must be at least 1, not {cap}")
        self.quantization = quantization
        self.cap = cap
        self.shrink_to_cap = shrink_to_cap
        self.weights = weights
        self.enabled = enabled
        self.code = b""  # of the run, as it was when the run began
        self.script: dict[str, str] | None = None  # of the user's, that changes it

    @override
    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Take the code that ships before anybody can change it.

        Raises:
            UserError: If an option needs another one.
        """
        if self.weights == "better" and data_of(trainer).held_out_tokens is None:
            raise UserError(
                "export.weights better needs data.held_out_tokens, which it decides on; set it, say to 1000000"
            )
        if trainer.is_global_zero:  # the others neither save nor export
            self.code = source_bundle()
            self.script = script_record(self.code, [pl_module, *_callbacks(trainer)])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Keep the tokenizer beside the checkpoints: whatever becomes of the text, they can be used."""
        data, run = data_of(trainer), RunFolder(str(trainer.log_dir))
        if trainer.is_global_zero:
            copy_file(data.text.tokenizer, run.tokenizer, data.tokenizer_sha256)

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        """Let `trainer export --ckpt` do exactly what this callback would."""
        data = data_of(trainer)
        metadata = checkpoint.setdefault(METADATA_KEY, {})
        for name in ("tokenizer_sha256", *POSITION_SETTINGS):
            metadata[name] = getattr(data, name)
        metadata["code_sha256"] = hashlib.sha256(self.code).hexdigest()
        metadata["shards"] = data.shards
        metadata["weights"] = self.weights
        metadata["precision"] = str(trainer.precision)
        metadata["quantization"] = asdict(self.quantization)

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: LanguageModel, checkpoint: dict[str, Any]) -> None:
        """Tell of code that has changed since."""
        if checkpoint[METADATA_KEY]["code_sha256"] != hashlib.sha256(self.code).hexdigest() and trainer.is_global_zero:
            logger.warning("the trainer's code has changed since this checkpoint; the run ships the code of today")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Score on all processes, export on rank 0. Lightning does not call this for an interrupted run.

        Raises:
            UserError: If a file cannot be written or a score is not a finite number.
        """
        last = RunFolder(str(trainer.log_dir)).last_checkpoint  # a collective: all processes must ask
        try:
            self._finish(trainer, pl_module)
        except UserError as error:
            if not isinstance(error.__cause__, OSError) or not last.is_file():
                raise
            raise UserError(f"{error}. The training is kept in {last}: resume with --ckpt last to export it") from error

    def _finish(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        pl_module.model.is_looped = True
        stages = _Stages(trainer, pl_module)
        start = next((callback for callback in _callbacks(trainer) if isinstance(callback, WarmStart)), None)
        if start and start.score:
            stages.scores["parent_plain"] = start.score
        stages.score("live_plain", pl_module.model, stages.data.evaluation.plain)
        averaging = next((callback for callback in _callbacks(trainer) if isinstance(callback, WeightAveraging)), None)
        averaged = averaging.averaged_state() if averaging else None
        model = Transformer(pl_module.model.config).to(pl_module.device)
        model.load_state_dict(averaged or pl_module.model.state_dict())
        if averaged:
            stages.score("averaged_plain", model, stages.data.evaluation.plain)
        if averaged and (self.weights == "live" or (self.weights == "better" and stages.live_is_better(model))):
            averaged = None
            model.load_state_dict(pl_module.model.state_dict())
            stages.scores["live_plain"] = stages.scores.pop("live_plain")  # the last score is the run's
        stored = stages.export(model, self) if self.enabled else {}
        pl_module.display.close()
        if trainer.is_global_zero:
            weights = {
                "processes": trainer.world_size,
                "averaged_steps": averaging.count if averaging else 0,
                "weights": "averaged" if averaged else "live",
                "code_sha256": hashlib.sha256(self.code).hexdigest(),
                **({"script": self.script} if self.script else {}),
                **({"ancestry": start.ancestry} if start and start.ancestry else {}),
            }
            stages.finish(weights, stored)


class _Stages:
    """The stages of a run's end, with the score of each: live weights, averaged weights, artifact."""

    def __init__(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        data = data_of(trainer)
        assert isinstance(data, TokenData)
        self.trainer, self.module, self.data = trainer, module, data
        self.run = RunFolder(str(trainer.log_dir))
        self.autocast = trainer.precision_plugin.forward_context
        self.scores: dict[str, Score] = {}

    def score(self, name: str, model: Transformer, evaluation: EvaluationConfig) -> None:
        """Score a model on all processes.

        Raises:
            UserError: If the score is not a finite number.
        """
        self.scores[name] = self.module.score_model(name, model, evaluation, self.data.val_tokens)

    def live_is_better(self, averaged: Transformer) -> bool:
        """Whether the live weights score better than the averaged ones on the held-out training tokens."""
        plain, tokens = replace(self.data.evaluation.plain, max_tokens=None), self.data.held_out()
        live, average = (
            self.module.score_model(name, model, plain, tokens).bpb
            for name, model in (("live_held_out", self.module.model), ("averaged_held_out", averaged))
        )
        logger.info(f"on {len(tokens) - 1:,} held-out training tokens: live {live:.5f}, averaged {average:.5f} bpb")
        return live < average

    def export(self, model: Transformer, options: PostTrainExport) -> dict[str, Any]:
        """Export and score the artifact; rank 0 gets sizes and times."""
        data, display = self.data, self.module.display
        eval_seconds = 0.0

        def score_artifact(stored: Transformer) -> None:
            nonlocal eval_seconds
            display.update_task("exporting", 1, 1)
            started = time.monotonic()
            self.score("artifact_plain", stored, data.evaluation.plain)
            if not data.evaluation.is_plain:
                self.score("artifact_sliding", stored, data.evaluation)
            eval_seconds = time.monotonic() - started

        display.update_task("exporting", 0, 1)
        exported = export(
            model,
            options.quantization,
            data.tokenizer_sha256,
            self.run.path,
            options.code,
            options.cap,
            options.shrink_to_cap,
            data.calibration_sequences(options.quantization.calibration_sequences, self.module.device),
            self.autocast,
            score_artifact,
        )
        if exported is None:
            return {}
        return {
            "bytes_total": exported.size.total,
            "bytes_model": exported.size.model,
            "bytes_code": exported.size.code,
            "bytes_cap": options.cap,
            "quantization": asdict(exported.size.quantization),
            "calibration_seconds": exported.calibration_seconds,
            "export_seconds": exported.export_seconds,
            "eval_seconds": eval_seconds,
        }

    def finish(self, weights: dict[str, Any], stored: dict[str, Any]) -> None:
        """Write and log the summary, on rank 0."""
        cutoff = next(
            (callback for callback in _callbacks(self.trainer) if isinstance(callback, WallclockCutoff)), None
        )
        clock, steps = self.module.clock, int(self.trainer.global_step)
        seconds = stored.get("calibration_seconds", 0.0)
        if cutoff and clock.budget is not None and seconds > cutoff.reserve:
            logger.warning(
                f"calibration took {seconds:.1f} s, but wallclock.reserve leaves {cutoff.reserve:g} s of the training "
                "time for it: by the challenge's rules the run was too long; raise wallclock.reserve"
            )
        summary = make_summary(
            self.scores,
            {**weights, **stored},
            steps,
            self.data.batch_tokens,
            clock.elapsed,
            self.data.text.train,
            self.data.shards,
            self.data.tokenizer_sha256,
            self.data.held_out_tokens,
            self.module.model,
        )
        self.run.write_summary(summary)
        if stored:
            write_model_card(self.run.path, self.run, summary)
        for metrics_logger in self.trainer.loggers:
            if stored:
                metrics = {"artifact/bpb": summary["val_bpb"], "artifact/bytes": stored["bytes_total"]}
                metrics_logger.log_metrics(metrics, max(steps - 1, 0))  # steps count from 0
            metrics_logger.save()


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


class Report(pl.Callback):
    """Draws `report.html` into the run folder, and logs how the run ended."""

    def __init__(self, enabled: bool = True) -> None:
        """Draw the report when training has ended.

        Args:
            enabled: Draw the report. false leaves it to `trainer report`.
        """
        self.enabled = enabled

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Comes after the export, which writes the summary."""
        run = RunFolder(str(trainer.log_dir))  # a collective: all processes must ask
        if not trainer.is_global_zero:
            return
        is_drawn = False
        if self.enabled and trainer.logger is not None:
            trainer.logger.save()
            try:
                build_report([run], run.report)
                is_drawn = True
            except UserError as error:  # the run itself is finished and safe
                logger.warning(f"no report was made: {error}")
        data = data_of(trainer).text.train[0].parent
        log_summary(json.loads(run.summary.read_text()), run, data, is_drawn)
