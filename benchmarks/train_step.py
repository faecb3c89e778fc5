"""The training step of a recipe: the bare loop and the same steps under Lightning, in one process.

`python -m benchmarks.train_step --config int5mlp_10l` prints the reference model's figures; further options are those
of `trainer fit`. The text is Python's own documentation; speed does not depend on it.
"""

import argparse
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.subject import load, matmul_rate, report
from trainer.device import synchronize
from trainer.lightning_module import LanguageModel
from trainer.model.flops import forward_flops
from trainer.optim.muon_adamw import MuonAdamW
from trainer.step import StepFence, clip_gradients, train_step


class Stopwatch(pl.Callback):
    """Times the bare loop before the first step, then as many of Lightning's steps."""

    def __init__(self, steps: int, settle: int = 5) -> None:
        self.steps = steps
        self.settle = settle
        self.ready = 0.0
        self.bare = 0.0
        self.fitted = 0.0
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time raw steps on the real data; weights and optimizer of the run are not touched."""
        assert isinstance(pl_module, LanguageModel)
        self.ready = time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = pl_module.model
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer, fence = pl_module.configure_optimizers(), StepFence(pl_module.device)
        assert isinstance(optimizer, MuonAdamW)
        stream = trainer.train_dataloader.dataset  # type: ignore[union-attr]

        def backward(loss: Tensor, last: bool) -> None:
            loss.backward()

        def update() -> None:
            norms = clip_gradients(model.parameters(), pl_module.optimizer_config.grad_clip_norm)
            optimizer.finite = norms.total.isfinite()
            optimizer.step()
            optimizer.zero_grad()

        for step in range(self.settle + self.steps):
            if step == self.settle:
                synchronize(pl_module.device)
                started = time.perf_counter()
            tokens = stream[step]
            tokens = (tokens.pin_memory() if pl_module.device.type == "cuda" else tokens).to(
                pl_module.device, non_blocking=True
            )
            slices = pl_module.micro_batches(len(tokens))
            with trainer.precision_plugin.forward_context():
                loss = train_step(pl_module.nll, tokens, slices, backward, update)
            fence.record(step, loss)
        synchronize(pl_module.device)
        self.bare = (time.perf_counter() - started) / self.steps
        model.load_state_dict(saved)
        self.graphs = counters["stats"]["unique_graphs"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Start after some steps, stop after the last."""
        self.losses.append(trainer.callback_metrics["train/loss"])
        if trainer.global_step in (self.settle, self.settle + self.steps):
            synchronize(pl_module.device)
            now = time.perf_counter()
            if trainer.global_step == self.settle:
                self._started = now
            else:
                self.fitted = (now - self._started) / self.steps


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed")
    options, args = parser.parse_known_args()
    started = time.perf_counter()
    watch = Stopwatch(options.steps)
    cli = load(
        options.config,
        [f"--trainer.max_steps={options.steps + watch.settle}", "--trainer.val_check_interval=1000000", *args],
    )
    cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    module, data = cli.model, cli.datamodule
    device = cli.trainer.strategy.root_device
    flops = 3 * forward_flops(module.model.config, data.sequence_length) * data.batch_tokens
    rate = matmul_rate(device)
    report(
        f"train_step {options.config} {' '.join(args)}".strip(),
        {
            "step_ms": round(1000 * watch.fitted, 2),
            "tokens_per_second": round(data.batch_tokens / watch.fitted),
            "bare_loop_step_ms": round(1000 * watch.bare, 2),
            "lightning_overhead_percent": round(100 * (watch.fitted / watch.bare - 1), 2),
            "model_tflops": round(flops / watch.fitted / 1e12, 2),
            "matmul_tflops": round(rate / 1e12, 2),
            "share_of_matmul_rate_percent": round(100 * flops / watch.fitted / rate, 1),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0.0,
            "start_to_first_step_s": round(watch.ready - started, 1),
            "graphs_compiled_after_warmup": counters["stats"]["unique_graphs"] - watch.graphs,
            "first_loss": round(float(watch.losses[0]), 6),
            "last_loss": round(float(watch.losses[-1]), 6),
            "attention": module.attention.describe(),
            "fused": module.fused.describe(),
            "micro_batch_tokens": module.micro_batch_tokens,
            "precision": str(cli.trainer.precision),
        },
        device,
    )


if __name__ == "__main__":
    main()
