"""Is the fast step the same step? Gradients, scores and a loss curve of the compiled model against the eager one.

The eager float32 model with torch's own attention is the measure. Its weights are random but nowhere zero, so that no
gradient is zero. bfloat16 itself moves gradients by about as much as `eager_gradient_error` says.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.subject import load, report
from trainer.evaluation.sliding import NllFn, score
from trainer.kernels.attention_backends import SdpaBackend
from trainer.kernels.fusion import Fused
from trainer.lightning_module import LanguageModel
from trainer.optim.muon_adamw import MuonAdamW, parameter_groups
from trainer.step import clip_gradients, train_step


class Comparison(pl.Callback):
    """Runs every comparison on the run's device and data."""

    def __init__(self, sequences: int, steps: int) -> None:
        self.sequences = sequences
        self.steps = steps
        self.row: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, then end the run."""
        assert isinstance(pl_module, LanguageModel)
        model, fast = pl_module.model, pl_module.nll
        data = trainer.datamodule  # type: ignore[attr-defined]
        stream = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def backward(loss: Tensor, last: bool) -> None:
            loss.backward()

        @contextmanager
        def kernel(eager: bool) -> Iterator[NllFn]:
            model.set_kernels(SdpaBackend() if eager else pl_module.attention, Fused() if eager else pl_module.fused)
            yield model.nll if eager else fast
            model.set_kernels(pl_module.attention, pl_module.fused)

        def gradients(eager: bool, full: bool) -> dict[str, Tensor]:
            rows = stream[0][: self.sequences].to(pl_module.device)
            with kernel(eager) as nll:
                if full:
                    train_step(nll, rows, self.sequences, backward, lambda: None)
                else:
                    with trainer.precision_plugin.forward_context():
                        train_step(nll, rows, 1, backward, lambda: None)
            gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return gradients

        def curve(eager: bool) -> Tensor:
            model.load_state_dict(start)
            optimizer = MuonAdamW(parameter_groups(model, pl_module.optimizer_config), pl_module.optimizer_config)

            def update() -> None:
                clip_gradients(model.parameters(), pl_module.optimizer_config.grad_clip_norm)
                optimizer.step()
                optimizer.zero_grad()

            losses = []
            with kernel(eager) as nll, trainer.precision_plugin.forward_context():
                for step in range(self.steps):
                    rows = stream[step].to(pl_module.device)
                    losses.append(train_step(nll, rows, pl_module.micro_batches(len(rows)), backward, update))
            return torch.stack(losses).float()

        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        exact = gradients(eager=True, full=True)
        errors = {
            name: relative_errors(gradients(eager, False), exact) for name, eager in (("", False), ("eager_", True))
        }
        tokens = data.scorers(pl_module.device)[0].tokens[: 4 * data.evaluation.window + 1]
        scores = []
        for nll in (model.nll, fast):  # with torch's own attention: cudnn and fa4 know no float32
            with kernel(eager=True), torch.no_grad():
                scores.append(score(nll, tokens, data.table, data.evaluation).bpb)
        for prefix, error in errors.items():
            worst = max(error, key=lambda name: error[name])
            self.row[f"{prefix}gradient_error"] = error.pop("all")
            self.row[f"{prefix}worst_gradient_error"] = f"{error[worst]:.2e} ({worst})" if worst in error else ""
        self.row["float32_score_difference_bpb"] = scores[1] - scores[0]
        mixed = []
        for eager in (True, False):  # as a run scores: its own kernels, in its own precision
            with kernel(eager) as nll, torch.no_grad(), trainer.precision_plugin.forward_context():
                mixed.append(score(nll, tokens, data.table, data.evaluation).bpb)
        self.row["score_difference_bpb"] = mixed[1] - mixed[0]
        if self.steps:
            fast_curve, eager_curve = curve(eager=False), curve(eager=True)
            difference = (fast_curve - eager_curve).abs()
            self.row |= {
                "steps": self.steps,
                "loss_difference_mean": float(difference.mean()),
                "loss_difference_largest": float(difference.max()),
                "loss_of_last_20_steps": float(fast_curve[-20:].mean()),
                "eager_loss_of_last_20_steps": float(eager_curve[-20:].mean()),
            }
        self.row["attention"] = pl_module.attention.describe()
        self.row["fused"] = pl_module.fused.describe()
        trainer.should_stop = True


def relative_errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, of every tensor and of all as one vector (`all`)."""
    squares = {
        name: (float((gradients[name] - exact[name]).square().sum()), float(exact[name].square().sum()))
        for name in exact
    }
    errors = {name: (difference / max(norm, 1e-30)) ** 0.5 for name, (difference, norm) in squares.items()}
    total = [sum(column) for column in zip(*squares.values(), strict=True)]
    return errors | {"all": (total[0] / total[1]) ** 0.5}


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--sequences", type=int, default=8, help="sequences whose gradients are compared")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the two loss curves")
    options, args = parser.parse_known_args()
    comparison = Comparison(options.sequences, options.steps)
    cli = load(options.config, ["--trainer.max_steps=1", *args])
    cli.trainer.callbacks.append(comparison)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    report(f"numerics {options.config} {' '.join(args)}".strip(), comparison.row, cli.trainer.strategy.root_device)


if __name__ == "__main__":
    main()
