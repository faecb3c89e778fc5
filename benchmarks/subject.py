"""What a benchmark measures: a recipe as `trainer fit` would run it, on text that every machine has."""

import atexit
import json
import shutil
import tempfile
import time
from importlib.metadata import version
from typing import Any

import torch

from trainer.callbacks.checkpoint import Checkpoints
from trainer.callbacks.export import PostTrainExport, Report
from trainer.callbacks.progress import Progress
from trainer.cli.lightning_cli import TrainerCLI
from trainer.device import synchronize
from trainer.logging import quiet_libraries
from trainer.recipes import find_recipe

LEFT_OUT = (PostTrainExport, Checkpoints, Progress, Report)


def load(recipe: str, args: list[str], left_out: tuple[type, ...] = LEFT_OUT) -> TrainerCLI:
    """Build module, data and trainer of a recipe, without export, checkpoints and progress lines.

    Args:
        recipe: Name or path, as for `--config`.
        args: Further options of `trainer fit`.
        left_out: Callbacks that the trainer goes without.
    """
    quiet_libraries()
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = find_recipe(recipe)
    cli = TrainerCLI(
        "fit",
        path.stem,
        [
            f"--config={path}",
            "--data.source=trainer.data.sources.PythonDocumentation",
            f"--data.source.folder={folder}/data",
            "--data.source.max_bytes=3000000",
            f"--trainer.default_root_dir={folder}/runs",
            "--trainer.devices=1",
            "--wallclock.seconds=null",
            *args,
        ],
    )
    cli.trainer.callbacks = [callback for callback in cli.trainer.callbacks if not isinstance(callback, left_out)]  # type: ignore[attr-defined]
    return cli


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, what the arithmetic of a step is compared with."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for steps in (3, 20):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            a @ b
        synchronize(device)
        seconds = (time.perf_counter() - started) / steps
    return 2 * size**3 / seconds


def report(title: str, row: dict[str, Any], device: torch.device) -> None:
    """Print a table and the same as one line of JSON."""
    row |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }
    print(f"\n{title}")
    for key, value in row.items():
        print(f"  {key:<32} {value:,}" if isinstance(value, int | float) else f"  {key:<32} {value}")
    print(json.dumps({"benchmark": title, **row}), flush=True)
