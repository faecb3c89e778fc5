"""Where a training step's time goes on a GPU: its kernels by their time.

`python -m benchmarks.profile --config frontier` times steps under Lightning, then profiles a few of the next. Further
options are those of `trainer fit`.
"""

import argparse
import time
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.subject import load, matmul_rate, report
from trainer.device import synchronize

SETTLE, PROFILED = 5, 4  # steps before the timed ones, and after them

Interval = tuple[float, float]


class Profile(pl.Callback):
    """Times Lightning's steps, then profiles a few."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0
        self.started = 0.0
        # What the host does is left out: recording it takes longer than starting the kernels, and the GPU waits.
        self.profile = profile(activities=[ProfilerActivity.CUDA])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Start after some steps, stop after the last."""
        done = trainer.global_step
        if done not in (SETTLE, SETTLE + self.steps, SETTLE + self.steps + PROFILED):
            return
        synchronize(pl_module.device)
        if done == SETTLE:
            self.started = time.perf_counter()
        elif done == SETTLE + self.steps:
            self.seconds = (time.perf_counter() - self.started) / self.steps
            self.profile.start()
        else:
            self.profile.stop()


def kernels_of(recorded: profile) -> list[tuple[str, Interval]]:
    """What a GPU did: names, starts and ends in microseconds."""
    return [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in recorded.events() or []
        if str(event.device_type) == "DeviceType.CUDA" and not event.is_user_annotation
    ]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Stretches of time that at least one interval covers, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Time that at least one interval covers."""
    return sum(end - start for start, end in union(intervals))


def idle(intervals: list[Interval]) -> float:
    """Time between the first start and the last end that no interval covers."""
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return span - length(intervals)


def by_time(kernels: Iterable[tuple[str, Interval]]) -> list[tuple[str, int, float]]:
    """Each kernel's calls and the sum of its times, the longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for name, (start, end) in kernels:
        calls, total = sums.get(name, (0, 0.0))
        sums[name] = calls + 1, total + end - start
    return sorted(((name, *found) for name, found in sums.items()), key=lambda row: -row[2])


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--kernels", type=int, default=60, help="lines of the table")
    options, args = parser.parse_known_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU to profile")
    watch = Profile(options.steps)
    steps = SETTLE + options.steps + PROFILED
    cli = load(options.config, [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1000000", *args])
    cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    device = cli.trainer.strategy.root_device
    kernels = kernels_of(watch.profile)
    print("\nms per step  calls  us per call  kernel")
    for name, calls, taken in by_time(kernels)[: options.kernels]:
        print(f"{taken / 1000 / PROFILED:10.3f} {calls / PROFILED:7.1f} {taken / calls:11.1f}  {name[:120]}")
    report(
        f"profile {options.config} {' '.join(args)}".strip(),
        {
            "step_ms": round(1000 * watch.seconds, 2),
            "kernels_ms": round(sum(end - start for _, (start, end) in kernels) / 1000 / PROFILED, 2),
            "gpu_idle_ms": round(idle([interval for _, interval in kernels]) / 1000 / PROFILED, 2),
            "kernels": round(len(kernels) / PROFILED),
            "matmul_tflops": round(matmul_rate(device) / 1e12, 2),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "attention": cli.model.attention.describe(),
            "fused": cli.model.fused.describe(),
        },
        device,
    )


if __name__ == "__main__":
    main()
