"""The end of a run: export, load back, score, and one summary."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from trainer.callbacks.ema import EMA
from trainer.callbacks.late_swa import LateSWA
from trainer.callbacks.progress import Progress
from trainer.callbacks.wallclock import WallclockCutoff
from trainer.checkpoint import OWN_KEY
from trainer.data.manifest import Manifest
from trainer.data.shards import TokenFiles
from trainer.datamodule import TokenData
from trainer.environment import versions
from trainer.errors import UserError
from trainer.evaluation.metric import Score
from trainer.evaluation.sliding import score
from trainer.evaluation.windows import EvaluationConfig
from trainer.files import atomic_write
from trainer.lightning_module import LanguageModel
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import read_artifact
from trainer.quantize.calibration import calibrate
from trainer.quantize.export import CAP, ExportedSize, export
from trainer.quantize.policy import QuantizationConfig
from trainer.quantize.sensitive import SensitiveRounding


class PostTrainExport(pl.Callback):
    """Write the artifact from the averaged weights and report the score of the file on disk."""

    def __init__(
        self,
        quantization: QuantizationConfig = QuantizationConfig(),
        cap: int = CAP,
        fit: bool = False,
        enabled: bool = True,
    ) -> None:
        """Export when training ends.

        Args:
            quantization: What is stored how.
            cap: Largest size of code and model together, in bytes.
            fit: If they are larger, prune more and store fewer bits until they fit, instead of failing.
            enabled: false scores the weights and stores no artifact, to compare ideas quickly; `trainer export` makes
                it later.
        """
        self.quantization = quantization
        self.cap = cap
        self.fit = fit
        self.enabled = enabled

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let `trainer export --ckpt` quantise exactly as this would."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        own = checkpoint.setdefault(OWN_KEY, {})
        own["quantization"] = asdict(self.quantization)
        own["tokenizer_sha256"] = data.tokenizer_sha256
        own["batch_tokens"], own["sequence_length"] = data.batch_tokens, data.sequence_length
        own["order"], own["seed"], own["precision"] = data.order, data.seed, str(trainer.precision)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score on all ranks, export on rank 0. Lightning does not call this for an interrupted run."""
        assert isinstance(pl_module, LanguageModel)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenData)
        folder = Path(str(trainer.log_dir))
        progress = next((callback for callback in trainer.callbacks if isinstance(callback, Progress)), None)  # type: ignore[attr-defined]
        stages: dict[str, Score] = {}

        def score_stage(name: str, model: Transformer, evaluation: EvaluationConfig) -> None:
            def show(done: int, total: int) -> None:
                if progress:
                    progress.part(f"scoring {name}", done, total)

            stages[name] = _score(trainer, pl_module, data, model, evaluation, show)

        plain = data.evaluation.plain
        pl_module.model.is_looped = True
        score_stage("live_plain", pl_module.model, plain)
        if not math.isfinite(stages["live_plain"].bpb):
            raise UserError("the weights have no finite score, and nothing is exported; lower the learning rate")
        averages = [callback for callback in trainer.callbacks if isinstance(callback, LateSWA | EMA)]  # type: ignore[attr-defined]
        averaged = next((found for callback in averages if (found := callback.averaged_state())), None)
        state: dict[str, Tensor] = averaged or pl_module.model.state_dict()
        final_model = Transformer(pl_module.model.config).to(pl_module.device)
        final_model.load_state_dict(state)
        if averaged:
            score_stage("averaged_plain", final_model, plain)
        if trainer.is_global_zero:
            shutil.copyfile(data.text.tokenizer, folder / "tokenizer.model")
        stored = self._store(trainer, pl_module, final_model, state, progress, score_stage) if self.enabled else {}
        if progress:
            progress.close()
        if not trainer.is_global_zero:
            return
        final = list(stages.values())[-1]
        cutoff = next((callback for callback in trainer.callbacks if isinstance(callback, WallclockCutoff)), None)  # type: ignore[attr-defined]
        clock = cutoff.clock if cutoff else pl_module.clock
        measuring = stored.get("calibration_seconds", 0.0)
        if cutoff and clock.budget is not None and measuring > cutoff.reserve:
            print(
                f"measuring for the export took {measuring:.1f} s of training time, but wallclock.reserve "
                f"holds {cutoff.reserve:g} s for it; under the challenge's rules the run was too long"
            )
        steps = int(trainer.global_step)
        manifest = Manifest.read(data.text.train[0].parent)
        summary: dict[str, Any] = {
            "val_bpb": final.bpb,
            "val_loss": final.loss,
            "val_tokens": final.tokens,
            "val_bytes": final.bytes,
            **stored,
            "steps": steps,
            "train_tokens": steps * data.batch_tokens,
            "epochs": steps * data.batch_tokens / len(TokenFiles(data.text.train)),
            "text_fingerprint": manifest.text_fingerprint if manifest else None,
            "train_seconds": clock.elapsed,
            "averaged_steps": sum(callback.count for callback in averages),
            "weights": "averaged" if averaged else "live",
            "parameters": sum(parameter.numel() for parameter in pl_module.model.parameters()),
            "stages": {name: value._asdict() for name, value in stages.items()},
            "versions": versions(pl_module.device),
        }
        with atomic_write(folder / "summary.json") as file:
            file.write(json.dumps(summary, indent=2).encode())
        for logger in trainer.loggers:
            if stored:
                logger.log_metrics({"artifact/bpb": final.bpb, "artifact/bytes": stored["bytes_total"]}, steps)
            logger.save()
        print_summary(summary, folder)

    def _store(
        self,
        trainer: pl.Trainer,
        module: LanguageModel,
        model: Transformer,
        state: dict[str, Tensor],
        progress: Progress | None,
        score_stage: Callable[[str, Transformer, EvaluationConfig], None],
    ) -> dict[str, Any]:
        """Write the artifact of a model's weights, load it back and score it; rank 0 gets sizes and times."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(str(trainer.log_dir))
        rounding = None
        calibration_seconds, started = 0.0, time.monotonic()
        if trainer.is_global_zero and self.quantization.rounding == "sensitive":
            with trainer.precision_plugin.forward_context():
                batches = data.calibration_batches(self.quantization.calibration_sequences, module.device)
                moments = calibrate(model, batches)
            calibration_seconds = time.monotonic() - started
            rounding = SensitiveRounding(model.state_dict(), moments)  # an average gone on with may lie on the host
        started = time.monotonic()
        if progress:
            progress.part("exporting", 0, 1)
        size: ExportedSize | None = None
        error: UserError | None = None
        if trainer.is_global_zero:
            try:
                size = export(
                    state,
                    model.config,
                    self.quantization,
                    data.tokenizer_sha256,
                    folder,
                    self.cap,
                    self.fit,
                    rounding,
                    progress.note if progress else print,
                )
            except UserError as found:  # the others wait to hear how it went
                error = found
        failed = trainer.strategy.broadcast(error is not None)
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)  # rank 0 says why
        export_seconds = time.monotonic() - started
        if progress:
            progress.part("exporting", 1, 1)
        like = model.skip_weights
        stored = read_artifact(folder / "artifact.zst").build().to(device=like.device, dtype=like.dtype)
        started = time.monotonic()
        score_stage("artifact_plain", stored, data.evaluation.plain)
        if not data.evaluation.is_plain:
            score_stage("artifact_sliding", stored, data.evaluation)
        if size is None:
            return {}
        return {
            "bytes_total": size.total,
            "bytes_model": size.model,
            "bytes_code": size.code,
            "bytes_cap": self.cap,
            "quantization": asdict(size.quantization),
            "calibration_seconds": calibration_seconds,
            "export_seconds": export_seconds,
            "eval_seconds": time.monotonic() - started,
        }


def _score(
    trainer: pl.Trainer,
    module: LanguageModel,
    data: TokenData,
    model: Transformer,
    evaluation: EvaluationConfig,
    progress: Callable[[int, int], None],
) -> Score:
    tokens = data.val_tokens.to(module.device)
    assert data.table is not None
    with trainer.precision_plugin.forward_context(), torch.no_grad():
        nll = module.nll_of(model)
        return score(nll, tokens, data.table, evaluation, trainer.global_rank, trainer.world_size, progress)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The end of a run in a few lines; the last one is for scripts."""
    stages = summary["stages"]
    print(f"\nRun finished: {folder}")
    print(
        f"  trained     {summary['steps']:,} steps, {summary['train_tokens']:,} tokens "
        f"in {summary['train_seconds']:.0f} s"
        f" ({summary['train_tokens'] / max(summary['train_seconds'], 1e-9):,.0f} tokens/s)"
    )
    for name, stage in stages.items():
        print(f"  {name:<17} {stage['bpb']:.4f} bpb  ({stage['tokens']:,} tokens, {stage['bytes']:,} bytes)")
    if "averaged_plain" in stages and stages["averaged_plain"]["bpb"] > stages["live_plain"]["bpb"]:
        print("  the average is worse than the live weights; late_swa.start_frac 0 and ema.horizon 0 make none")
    if "bytes_total" in summary:
        print(
            f"  size        {summary['bytes_model']:,} model + {summary['bytes_code']:,} code = "
            f"{summary['bytes_total']:,} of {summary['bytes_cap']:,} bytes"
        )
        print(
            f"  files       {folder / 'artifact.zst'}, "
            "tokenizer.model, train_gpt.py, summary.json, report.html, metrics.csv, config.yaml"
        )
    final = Score(summary["val_bpb"], summary["val_loss"], summary["val_tokens"], summary["val_bytes"])
    print(final.line())
