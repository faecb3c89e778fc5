"""Sliding-window scoring of a recipe's model: forward tokens per second, and what that means for a split's length.

`python -m benchmarks.evaluate --targets 62021846` scores as many random targets as the challenge's split has.
"""

import argparse
import time
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.subject import load, matmul_rate, report
from trainer.device import synchronize
from trainer.evaluation.sliding import NllFn, score
from trainer.evaluation.windows import EvaluationConfig, plan_windows
from trainer.lightning_module import LanguageModel
from trainer.model.flops import forward_flops

CHALLENGE_TARGETS = 62_021_846


class Scoring(pl.Callback):
    """Scores random tokens once Lightning has put the model where it runs."""

    def __init__(self, targets: int, plain_windows: int) -> None:
        self.targets = targets
        self.plain_windows = plain_windows
        self.row: dict[str, Any] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time the sliding score, and the uncompiled forward of whole windows for comparison."""
        assert isinstance(pl_module, LanguageModel)
        data = trainer.datamodule  # type: ignore[attr-defined]
        evaluation, device = data.evaluation, pl_module.device
        torch.manual_seed(0)
        tokens = torch.randint(4, data.vocab_size, (self.targets + 1,), device=device, dtype=torch.int32)

        def seconds(nll: NllFn, count: int, config: EvaluationConfig) -> float:
            synchronize(device)
            started = time.perf_counter()
            score(nll, tokens[: count + 1], data.table, config)
            synchronize(device)
            return time.perf_counter() - started

        with trainer.precision_plugin.forward_context(), torch.no_grad():
            warm = evaluation.window + 2 * evaluation.batch_windows * evaluation.stride
            first = seconds(pl_module.nll, warm, evaluation)
            sliding = seconds(pl_module.nll, self.targets, evaluation)
            whole = EvaluationConfig(evaluation.window, None, evaluation.batch_windows)
            few = self.plain_windows * evaluation.window
            seconds(pl_module.model.nll, few, whole)
            eager = seconds(pl_module.model.nll, few, whole)
        windows = len(plan_windows(self.targets, evaluation.window, evaluation.stride).starts)
        forward = windows * evaluation.window
        flops = forward_flops(pl_module.model.config, evaluation.window) * forward / sliding
        rate = matmul_rate(device)
        challenge = len(plan_windows(CHALLENGE_TARGETS, evaluation.window, evaluation.stride).starts)
        self.row = {
            "targets": self.targets,
            "windows": windows,
            "seconds": round(sliding, 2),
            "forward_tokens_per_second": round(forward / sliding),
            "eager_forward_tokens_per_second": round(few / eager),
            "challenge_split_minutes": round(challenge * evaluation.window / (forward / sliding) / 60, 2),
            "model_tflops": round(flops / 1e12, 2),
            "share_of_matmul_rate_percent": round(100 * flops / rate, 1),
            "compile_and_first_batches_s": round(first, 1),
            "attention": pl_module.attention.describe(),
            "fused": pl_module.fused.describe(),
            "batch_windows": evaluation.batch_windows,
        }


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--targets", type=int, default=1_000_000, help="targets that are scored")
    parser.add_argument("--plain_windows", type=int, default=512, help="whole windows for the uncompiled comparison")
    options, args = parser.parse_known_args()
    scoring = Scoring(options.targets, options.plain_windows)
    cli = load(options.config, ["--trainer.limit_val_batches=1", *args])
    cli.trainer.callbacks = [scoring]  # type: ignore[attr-defined]
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    report(f"evaluate {options.config} {' '.join(args)}".strip(), scoring.row, cli.trainer.strategy.root_device)


if __name__ == "__main__":
    main()
