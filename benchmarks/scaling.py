"""The training step of a recipe on 1, 2, ... GPUs of one host, with the same tokens per GPU.

`python -m benchmarks.scaling --devices 1 2` starts one process per GPU for each number and prints, of each, what a step
takes under Lightning, what the GPU of rank 0 does in it, and Muon's orthogonalization by itself, divided between the
processes and with each process doing all of it. `--muon replicated` makes the steps that way. Further options are those
of `trainer fit`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.profile import PROFILED, SETTLE, Interval, Profile, idle, kernels_of, length
from benchmarks.subject import load, report
from trainer.callbacks.export import PostTrainExport, Report
from trainer.callbacks.progress import Progress
from trainer.device import synchronize
from trainer.lightning_module import LanguageModel
from trainer.optim import newton_schulz
from trainer.optim.muon_adamw import parameter_groups


def device_times(kernels: list[tuple[str, Interval]], steps: int) -> dict[str, float]:
    """Milliseconds per step of what a GPU did.

    Args:
        kernels: Name, start and end in microseconds.
        steps: That they make up.

    Returns:
        Time of the collectives of each kind, of those that nothing else hides, of all other kernels together, and in
        which the GPU did nothing. The last three make up a profiled step.
    """
    milliseconds = 1e-3 / steps
    collectives = [(name, interval) for name, interval in kernels if "nccl" in name.lower()]
    computing = [interval for name, interval in kernels if "nccl" not in name.lower()]
    everything = [interval for _, interval in kernels]
    if not everything:
        return {}
    kinds = {"all_reduce_ms": "allreduce", "all_gather_ms": "allgather"}
    return {
        **{
            key: round(milliseconds * length(each for name, each in collectives if kind in name.lower()), 2)
            for key, kind in kinds.items()
        },
        "collectives_not_hidden_ms": round(milliseconds * (length(everything) - length(computing)), 2),
        "computing_ms": round(milliseconds * length(computing), 2),
        "gpu_idle_ms": round(milliseconds * idle(everything), 2),
    }


def milliseconds_of(call: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Mean time of a call."""
    for repeats in (3, times):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
    return round(1000 * (time.perf_counter() - started) / times, 2)


def replicated(batches: list[Tensor], steps: int) -> list[Tensor]:
    """The same results as `newton_schulz._divided`, all computed by every process."""
    return [newton_schulz.newton_schulz(batch, steps) for batch in batches]


def work(recipe: str, steps: int, muon: str, args: list[str], out: Path) -> None:
    """One process of several: train, and let rank 0 write what it saw."""
    if muon == "replicated":
        newton_schulz._divided = replicated
    watch = Profile(steps)
    total = SETTLE + steps + PROFILED
    # With checkpoints: that callback is what processes hear of signals by.
    without = (PostTrainExport, Progress, Report)
    cli = load(recipe, [*args, f"--trainer.max_steps={total}", "--trainer.val_check_interval=1000000"], without)
    cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    row: dict[str, Any] = {}

    class Muon(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            """Time the orthogonalization while the processes still have a group."""
            assert isinstance(pl_module, LanguageModel)
            config, device = pl_module.optimizer_config, pl_module.device
            groups = [group["params"] for group in parameter_groups(pl_module.model, config) if group["muon"]]
            stacks = [torch.randn(len(group), *group[0].shape, device=device) for group in groups]
            for name, divided in (("divided", newton_schulz._divided), ("replicated", replicated)):
                newton_schulz._divided = divided
                row[f"muon_{name}_ms"] = milliseconds_of(
                    lambda: newton_schulz.orthogonalize(stacks, config.newton_schulz_steps), device
                )

    cli.trainer.callbacks.append(Muon())  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    if not cli.trainer.is_global_zero:
        return
    kernels = kernels_of(watch.profile)
    tokens = cli.datamodule.batch_tokens
    device = cli.trainer.strategy.root_device
    row = {
        "devices": cli.trainer.world_size,
        "muon": muon,
        "tokens_per_step": tokens,
        "micro_batch_tokens": cli.model.micro_batch_tokens,
        "step_ms": round(1000 * watch.seconds, 2),
        "tokens_per_second": round(tokens / watch.seconds),
        **device_times(kernels, PROFILED),
        **row,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0.0,
        "attention": cli.model.attention.describe(),
    }
    report(f"scaling {recipe} {' '.join(args)}".strip(), row, device)
    out.write_text(json.dumps(row))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown; `of linear` is the tokens per second over those of the first row, a device."""
    keys = [key for key in rows[0] if key not in ("attention", "device", "torch", "lightning")]
    first = rows[0]["tokens_per_second"] / rows[0]["devices"]
    lines = [f"| {' | '.join([*keys, 'of linear'])} |", "|" + "---|" * (len(keys) + 1)]
    for row in rows:
        share = row["tokens_per_second"] / row["devices"] / first
        cells = [f"{row[key]:,}" if isinstance(row.get(key), int | float) else str(row.get(key, "")) for key in keys]
        lines.append(f"| {' | '.join([*cells, f'{share:.3f}'])} |")
    return "\n".join(lines)


def main() -> None:
    """Start the processes of every number of devices, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l_8gpu", help="name or path, as for --config")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--tokens-per-device", type=int, default=98_304, help="of a step; the recipe's on eight GPUs")
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed")
    parser.add_argument("--muon", choices=["divided", "replicated"], default="divided", help="who orthogonalizes what")
    parser.add_argument("--process-of", type=Path, help=argparse.SUPPRESS)  # a started process writes there
    options, args = parser.parse_known_args()
    if options.process_of:
        work(options.config, options.steps, options.muon, args, options.process_of)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for devices in options.devices:
            out = folder / f"{devices}.json"
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"),
                *("-m", "benchmarks.scaling", f"--config={options.config}", f"--steps={options.steps}"),
                *(f"--muon={options.muon}", f"--process-of={out}"),
                f"--data.source.folder={folder}/data",  # one for all processes
                f"--trainer.default_root_dir={folder}/runs",
                f"--trainer.devices={devices}",
                f"--data.batch_tokens={devices * options.tokens_per_device}",
                *args,
            ]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"error: the processes of {devices} devices failed")
            rows.append(json.loads(out.read_text()))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
