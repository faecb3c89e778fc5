"""One recipe under the yardstick: train for 300 s, export, score the artifact, and add a row to a table.

`python -m benchmarks.sprint --config frontier --data data/sp8192 --seeds 3 --set model.mlp.ratio=3` runs `trainer fit`
on prepared shards (`trainer prepare`). For screening, `--half` trains for 150 s, and `--screen` for 60 s without an
artifact: its score is that of the averaged weights. `--steps 750` trains for 750 steps instead, so that the score does
not depend on the load of the machine; the tokens per second in the table show the cost of a step. Rows compare only if
they have the same text, the same time or number of steps, and the same kind of score. A table with other rows is
refused before anything is trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.manifest import NAME, Manifest
from trainer.errors import UserError
from trainer.recipes import find_recipe

FULL, HALF, SCREEN = 300.0, 150.0, 60.0  # seconds of training
STAGES = ("live_plain", "averaged_plain", "artifact_plain", "artifact_sliding")


@dataclass(frozen=True)
class Budget:
    """Length of each run: a time or a number of steps.

    Attributes:
        seconds: Seconds on the training clock, or None.
        max_steps: Number of steps, or None.
    """

    seconds: float | None = None
    max_steps: int | None = None

    @property
    def args(self) -> list[str]:
        """As options of `trainer fit`."""
        if self.max_steps is not None:
            return ["--wallclock.seconds=null", f"--trainer.max_steps={self.max_steps}"]
        return [f"--wallclock.seconds={self.seconds}"]

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.max_steps is None else f"{self.max_steps} steps"


def read_table(path: Path, fingerprint: str, budget: Budget, has_artifact: bool = True) -> list[dict[str, Any]]:
    """The rows of a table that has no others.

    Args:
        path: JSON lines; need not exist.
        fingerprint: Fingerprint of the text of all rows.
        budget: Training budget of all rows.
        has_artifact: Whether the rows score artifacts, or weights.

    Raises:
        UserError: If a row saw another text or had another budget or scored something else, or the file is no table.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not a table of sprints ({error}); correct it or use another --table") from error
    for number, row in enumerate(rows, 1):
        if row["text_fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: row {number} saw the text {row['text_fingerprint']}, this run would see {fingerprint}; "
                "they do not compare: use another --table"
            )
        known = Budget(row["seconds"], row.get("max_steps"))
        if known != budget:
            raise UserError(
                f"{path}: row {number} trained for {known}, this run would for {budget}; "
                "they do not compare: use another --table"
            )
        if ("bytes_total" in row) != has_artifact:
            raise UserError(
                f"{path}: row {number} has the score of {'weights' if has_artifact else 'an artifact'}, this run would "
                f"have that of {'an artifact' if has_artifact else 'weights'}; they do not compare: use another --table"
            )
    return rows


def fit(config: str, data: Path, budget: Budget, seed: int, settings: list[str], runs: Path) -> dict[str, Any]:
    """Run `trainer fit` once.

    Returns:
        Its summary.

    Raises:
        UserError: If it fails; its own words are on the screen.
    """
    name = f"{time.strftime('%m%d-%H%M%S')}-seed{seed}"
    args = [
        f"--config={config}",
        "--data.source=trainer.data.sources.Shards",
        f"--data.source.folder={data}",
        f"--seed_everything={seed}",
        *budget.args,
        f"--trainer.default_root_dir={runs}",
        f"--run_name={name}",
        *(f"--{setting}" for setting in settings),
    ]
    if subprocess.run([sys.executable, "-m", "trainer", "fit", *args], check=False).returncode:
        raise UserError(f"seed {seed}: the run failed; no row was added for it")
    summary: dict[str, Any] = json.loads((runs / find_recipe(config).stem / name / "summary.json").read_text())
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, seeds of one setting together, differences to the first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(" ".join([row["config"], *row["settings"]]), []).append(row)
    lines = [
        "| recipe | seeds | steps | M tok/s | live | averaged | artifact | **score** | change | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = None
    for name, group in groups.items():
        stages = [_mean([row["stages"].get(stage) for row in group]) for stage in STAGES]
        scores = [row["val_bpb"] for row in group]
        mean = statistics.mean(scores)
        first = mean if first is None else first
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        rate = statistics.mean(row["train_tokens"] / row["train_seconds"] for row in group) / 1e6
        steps = statistics.mean(row["steps"] for row in group)
        sizes = [row["bytes_total"] for row in group if "bytes_total" in row]  # none where nothing was stored
        size = f"{max(sizes):,}" if sizes else ""
        lines.append(
            f"| {name} | {len(group)} | {steps:,.0f} | {rate:.3f} | {stages[0]} | {stages[1]} | {stages[2]} | "
            f"**{mean:.4f}**{spread} | {mean - first:+.4f} | {size} |"
        )
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.4f}" if known else ""


def main() -> None:
    """Run the seeds, append their rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="recipe, by name or path")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared shards with its manifest")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, with the seeds 1, 2, ...")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help="options of fit")
    short = parser.add_mutually_exclusive_group()
    short.add_argument("--half", action="store_true", help="150 s for screening, in a table of its own")
    short.add_argument("--screen", action="store_true", help="60 s and no artifact, in a table of its own")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--seconds", type=float, help="another training time")
    other.add_argument("--steps", type=int, help="so many steps instead of a time, in a table of its own")
    parser.add_argument("--table", type=Path, help="default: sprints.jsonl, or sprints-half, -screen, -750-steps.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    options = parser.parse_args()
    if options.half and (options.steps or options.seconds):
        parser.error("--half is 150 s: leave it out, or --steps and --seconds")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    kind, usual = ("-half", HALF) if options.half else ("-screen", SCREEN) if options.screen else ("", FULL)
    budget = Budget(max_steps=options.steps) if options.steps else Budget(options.seconds or usual)
    kind += f"-{options.steps}-steps" if options.steps else ""
    path = options.table or Path(f"sprints{kind}.jsonl")
    if options.screen:
        options.settings = ["export.enabled=false", "wallclock.reserve=0", *options.settings]
    try:
        manifest = Manifest.read(options.data)
        if manifest is None:
            raise UserError(f"{options.data}: holds no {NAME}; make it with trainer prepare")
        read_table(path, manifest.text_fingerprint, budget, not options.screen)
        for seed in range(1, options.seeds + 1):
            summary = fit(options.config, options.data, budget, seed, options.settings, options.runs)
            row = {
                "config": options.config,
                "settings": options.settings,
                "seed": seed,
                **asdict(budget),
                **{key: value for key, value in summary.items() if key != "stages"},
                "stages": {name: stage["bpb"] for name, stage in summary["stages"].items()},
            }
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(table(read_table(path, manifest.text_fingerprint, budget, not options.screen)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the run has said so


if __name__ == "__main__":
    main()
