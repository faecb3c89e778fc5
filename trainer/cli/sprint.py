"""`trainer sprint`: one recipe trained with several seeds, one job on each GPU, and compared with other runs."""

import hashlib
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from trainer.cli.parser import CommandParser
from trainer.comparison import as_markdown, group_runs, is_compared, table, warn_of_other_code, warn_of_other_devices
from trainer.data.manifest import MANIFEST, Manifest
from trainer.device import gpu_count
from trainer.errors import UserError
from trainer.logging import logger
from trainer.recipes import find_recipe, flatten
from trainer.run_folder import RunData, RunFolder
from trainer.script import script_record, user_script
from trainer.source_bundle import source_bundle

INSIDE = "GOLF_TRAINER_SPRINT"  # set for the runs of a sprint
# Settings of fit that a sprint makes itself.
OWN = (
    *("c", "ckpt", "ckpt_path", "config", "data", "data.seed", "dry_run", "run_name", "seed_everything"),
    *("trainer", "trainer.default_root_dir", "trainer.devices", "trainer.max_steps", "wallclock", "wallclock.seconds"),
)
CONFIG_START = "# lightning.pytorch"  # of what --print_config prints
SECONDS = 300.0  # of training, the yardstick of docs/ablations.md


def sprint(
    config: str,
    data: str,
    settings: list[str],
    name: str = "sprint",
    against: str | None = None,
    seeds: int = 4,
    seconds: float | None = None,
    steps: int | None = None,
    runs: str = "runs",
) -> None:
    """Train a recipe with several seeds, and print a row for each setting.

    Args:
        config: Recipe, by name or path.
        data: Folder of prepared shards with its manifest.
        settings: Options of fit as KEY=VALUE; may be given several times.
        name: Name of the runs, which become NAME-seed1, NAME-seed2, ...
        against: Name of an earlier sprint of this recipe, which this one is compared with.
        seeds: Number of runs, with the seeds 1, 2, ... of weights and order (at least 1).
        seconds: Training time of each run in seconds (above 0). null: 300, or no limit if steps are given.
        steps: Steps of each run (at least 1). null: no limit.
        runs: Folder of all runs.

    Raises:
        UserError: If an option cannot be used or a run fails.
    """
    if INSIDE in os.environ:
        raise UserError("a script that a sprint runs for each seed must not start a sprint itself; let it call main()")
    for setting in settings:
        key = setting.partition("=")[0]
        if key in OWN or key.startswith("data.source"):
            raise UserError(f"--set {key}: a sprint decides that itself; --help lists its options")
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {seeds}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    manifest = Manifest.read(Path(data))
    if manifest is None:
        raise UserError(f"--data {data}: holds no {MANIFEST}; make it with trainer prepare")
    folder = Path(runs) / RunFolder.recipe_of(find_recipe(config))
    base = _finished(folder, against) if against else []
    seconds = SECONDS if seconds is None and steps is None else seconds
    for run in base:
        before = run.read()
        if (
            before.config.get("wallclock.seconds") != seconds
            or before.summary["text_fingerprint"] != manifest.text_fingerprint
        ):
            raise UserError(f"--against {against}: {run} had another training time, or another text than {data}")
    args = [
        f"--config={config}",
        "--data.source=Shards",
        f"--data.source.folder={data}",
        f"--wallclock.seconds={'null' if seconds is None else seconds}",
        *([] if steps is None else [f"--trainer.max_steps={steps}"]),
        f"--trainer.default_root_dir={runs}",
        "--trainer.devices=1",
        *(f"--{setting}" for setting in settings),
    ]
    new_runs = [RunFolder(folder / f"{name}-seed{seed}") for seed in range(1, seeds + 1)]
    for run in new_runs:
        if run.path.exists():
            raise UserError(f"{run}: this run exists already; choose another --name")
    names = [run.path.name for run in new_runs]
    jobs = [
        [*args, f"--seed_everything={seed}", "--dry_run=false", f"--run_name={each}"]
        for seed, each in enumerate(names, 1)
    ]
    new_settings = _settings(jobs[0])
    if any(_is_same(run.read(), new_settings) for run in base):
        raise UserError(f"--against {against}: has these settings already, and this code; change something with --set")
    _run_all(jobs)
    finished = [run.read() for run in [*base, *new_runs]]
    warn_of_other_code(finished)
    warn_of_other_devices(finished)
    try:
        print(as_markdown(table(group_runs(finished))))
    except UserError:
        print(as_markdown(table(group_runs(finished[len(base) :]))))  # what was trained for is shown in any case
        raise


def program() -> list[str]:
    """The command that runs this program again: a user's own script, which may change more than options do, or ours."""
    return [sys.executable, *(user_script("sprint") or ["-m", "trainer"])]  # another one would not understand `fit`


def _settings(job: list[str]) -> dict[str, Any]:
    """The settings that a run would have, by dotted name; none of a script that does not print them.

    Raises:
        UserError: In fit's own words, if it refuses them.
    """
    command, env = [*program(), "fit", *job, "--print_config"], os.environ | {INSIDE: "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["fit does not start"]
        reason = next((line for line in lines if line.startswith("trainer")), lines[-1])
        raise UserError(reason.removeprefix("trainer: "))
    try:
        return dict(flatten(yaml.safe_load(result.stdout.partition(CONFIG_START)[2].partition("\n")[2])))
    except (yaml.YAMLError, AttributeError):  # the script printed something else, too
        return {}


def _is_same(run: RunData, settings: dict[str, Any]) -> bool:
    """Whether a run had these settings but for its seed, and the code of today."""
    code = source_bundle()
    if run.summary.get("code_sha256") != hashlib.sha256(code).hexdigest():
        return False
    if run.summary.get("script") != script_record(code):
        return False
    names = {name for name in {*run.config, *settings} - {"dry_run"} if is_compared(name)}
    return all(run.config.get(name) == settings.get(name) for name in names)


def _finished(folder: Path, name: str) -> list[RunFolder]:
    """The runs of an earlier sprint."""
    finished = sorted(folder.glob(f"{name}-seed*/summary.json"))
    if not finished:
        raise UserError(f"--against {name}: there is no finished run {folder / name}-seed1")
    return [RunFolder(path.parent) for path in finished]


def _run_all(jobs: list[list[str]]) -> None:
    """Run `trainer fit` for each job, as many side by side as there are GPUs.

    Raises:
        UserError: If one fails; its own words are on the screen.
    """
    devices: queue.Queue[str | None] = queue.Queue()
    count = max(gpu_count(), 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # those that the user gave to this process
    for index in range(count):
        name = visible[index] if len(visible) == count else str(index)
        devices.put(name if count > 1 else None)
    quiet = ["--progress.mode=quiet"] if count > 1 else []

    def run(number: int, job: list[str]) -> int:
        device = devices.get()
        title = f"seed {number} of {len(jobs)}: {job[-1].partition('=')[2]}"
        logger.info(f"{title} {'on GPU ' + device if device else 'starts'}")
        env = os.environ | {INSIDE: "1"} | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        try:
            command = [*program(), "fit", *job, *quiet]
            code = subprocess.run(command, env=env, check=False).returncode
        finally:
            devices.put(device)
        logger.info(f"{title} {'failed' if code else 'has ended'}")
        return code

    with ThreadPoolExecutor(count) as pool:
        failed = sum(code != 0 for code in pool.map(run, range(1, len(jobs) + 1), jobs))
    if failed == len(jobs):
        raise UserError("all runs failed; their own lines say why")
    if failed:
        raise UserError(f"{failed} of {len(jobs)} runs failed; trainer compare shows the others")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        sprint,
        "sprint --config frontier --data data/mine8192 --name wide --set model.mlp.ratio=5 --against base",
        settings={"flags": ["--set"], "dest": "settings", "action": "append", "default": [], "metavar": "KEY=VALUE"},
    )
