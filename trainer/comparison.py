"""Whether a change helps: runs grouped by their settings, seed against seed, with a test of significance."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.logging import logger
from trainer.run_folder import RunData

STAGES = ("live_plain", "averaged_plain", "artifact_plain")
# Settings that make no other experiment of a run: its seed, its place, what it shows and what it reads its text from.
NOT_COMPARED = (
    *("seed_everything", "data.seed", "data.source.", "run_name", "ckpt", "config", "tensorboard", "wandb"),
    *("progress.", "report.", "checkpoints.", "samples.", "trainer.default_root_dir", "trainer.logger"),
    *("trainer.val_check_interval", "trainer.log_every_n_steps", "eval.every_seconds", "eval.fit_tokens"),
    *("eval.batch_windows", "model.micro_batch_tokens"),  # what fits into the memory that was free
    *("trainer.devices", "trainer.num_nodes"),  # whose auto says nothing; the number of processes is compared
)
EQUAL = (
    "wallclock.seconds",
    "trainer.max_steps",
    "eval.window",
    "eval.stride",
    "eval.attention_window",
    "eval.canonical",
)
Seed = tuple[Any, Any]  # seed_everything and data.seed


@dataclass(frozen=True)
class Group:
    """Runs of one setting.

    Attributes:
        name: What the setting differs in from the first group's, or the recipe.
        runs: The runs by their seed.
    """

    name: str
    runs: dict[Seed, RunData]

    @property
    def scores(self) -> dict[Seed, float]:
        """Bits per byte by seed."""
        return {seed: float(run.summary["val_bpb"]) for seed, run in self.runs.items()}

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.mean(self.scores.values())

    def mean_of(self, key: str) -> float:
        """Mean of a number of the runs' summaries."""
        return statistics.mean(run.summary[key] for run in self.runs.values())


@dataclass(frozen=True)
class Change:
    """The difference of two groups in bits per byte.

    Attributes:
        mean: Mean difference; below zero, the second group is better.
        stderr: Its standard error, or None with too few runs.
        p: Two-sided p-value of "no difference", or None.
        pairs: Number of pairs of equal seeds; 0 if groups of other seeds are compared.
    """

    mean: float
    stderr: float | None
    p: float | None
    pairs: int


def group_runs(runs: list[RunData]) -> list[Group]:
    """Group runs that differ in nothing but their seed.

    Args:
        runs: Finished runs; the group of the first one is the base.

    Raises:
        UserError: If two runs saw other text, had another budget or scored something else, or are the same run twice.
    """
    first = runs[0]
    settings = [
        {key: value for key, value in run.config.items() if value is not None and is_compared(key)}
        | {"tokenizer": run.summary["tokenizer_sha256"][:12], "code": run.summary.get("code_sha256", "")[:8]}
        | {"processes": _processes(run)}
        | ({"script": f"{script['name']}@{script['sha256'][:8]}"} if (script := run.summary.get("script")) else {})
        for run in runs
    ]
    groups: list[tuple[dict[str, object], dict[Seed, RunData]]] = []
    for run, setting in zip(runs, settings, strict=True):
        _check_comparable(first, run)
        members = next((members for other, members in groups if other == setting), None)
        if members is None:
            members = {}
            groups.append((setting, members))
        seed = run.config.get("seed_everything"), run.config.get("data.seed")
        if seed[0] is False:  # none, so that no other run has the same; in a dictionary it would equal 0
            seed = str(run.folder), None
        if seed in members:
            raise UserError(f"{run.folder}: has the settings and the seed of {members[seed].folder}; leave one out")
        members[seed] = run
    return [Group(_name(first, settings[0], setting, members), members) for setting, members in groups]


def _processes(run: RunData) -> object:
    """Number of processes that trained; in a summary of before this entry, what the config says."""
    devices = run.config.get("trainer.devices", "auto")
    return run.summary.get("processes") or (1 if devices == "auto" else devices)


def is_compared(key: str) -> bool:
    """Whether runs that differ in this setting are other experiments."""
    return not any(key == name or (name.endswith(".") and key.startswith(name)) for name in NOT_COMPARED)


def warn_of_other_code(runs: list[RunData]) -> None:
    """Name the runs whose code is another one than that of the first run."""
    others = [run.name for run in runs if run.summary.get("code_sha256") != runs[0].summary.get("code_sha256")]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        logger.warning(f"{others[0]}{more}: other code than {runs[0].name}, so more than a setting may differ")


def warn_of_other_devices(runs: list[RunData]) -> None:
    """Name the runs that had the same time on another device than the first run."""
    devices = [run.summary["versions"]["device"] for run in runs]
    others = [run for run, device in zip(runs, devices, strict=True) if device != devices[0]]
    if others and runs[0].config.get("wallclock.seconds"):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        device = others[0].summary["versions"]["device"]
        logger.warning(
            f"{others[0].name}{more}: ran on another device ({device}, not {devices[0]}), so the same time is another "
            "amount of training"
        )


def _name(first: RunData, base: dict[str, object], setting: dict[str, object], members: dict[Seed, RunData]) -> str:
    """What a group differs in from the first; before it the name of its sprint, if all its runs are of one."""
    names = {run.folder.path.resolve().name for run in members.values()}
    sprints = {name.rpartition("-seed")[0] for name in names}
    title = f"{sprints.pop()}: " if len(sprints) == 1 and "" not in sprints else ""
    changed = [f"{key}={setting.get(key, 'null')}" for key in {**base, **setting} if setting.get(key) != base.get(key)]
    return title + (" ".join(changed) or first.folder.path.resolve().parent.name)


def _check_comparable(first: RunData, run: RunData) -> None:
    reason = why_incomparable(first, run)
    for key in EQUAL:
        there, here = (each.config.get(key) or None for each in (run, first))  # a canonical score that is off: None
        if reason is None and there != here:
            there, here = ("null" if value is None else value for value in (there, here))
            reason = f"{key} is {there} there and {here} here"
    if reason is None and ("bytes_total" in first.summary) != ("bytes_total" in run.summary):
        reason = "one stored an artifact, the other none"
    if reason is not None:
        raise UserError(f"{run.folder}: does not compare with {first.folder} ({reason})")


def change(base: Group, group: Group) -> Change:
    """Compare two groups: pair by pair where at least two seeds are equal, else by Welch's test."""
    seeds = [seed for seed in base.runs if seed in group.runs]
    if len(seeds) >= 2:
        differences = [group.scores[seed] - base.scores[seed] for seed in seeds]
        stderr = statistics.stdev(differences) / math.sqrt(len(seeds))
        mean = statistics.mean(differences)
        return Change(mean, stderr, p_value(mean, stderr, len(seeds) - 1), len(seeds))
    mean = group.mean - base.mean
    sides = [list(each.scores.values()) for each in (base, group)]
    if min(map(len, sides)) < 2:
        return Change(mean, None, None, len(seeds))
    shares = [statistics.variance(side) / len(side) for side in sides]
    stderr = math.sqrt(sum(shares))
    freedom = sum(shares) ** 2 / max(
        sum(share**2 / (len(side) - 1) for share, side in zip(shares, sides, strict=True)), 1e-300
    )
    return Change(mean, stderr, p_value(mean, stderr, freedom), 0)


def p_value(mean: float, stderr: float, freedom: float) -> float:
    """Two-sided p-value of Student's t-test.

    With t = sqrt(n) tan(a), the density of Student's t with n degrees of freedom is proportional to cos(a)^(n - 1),
    which is integrated numerically.

    Args:
        mean: Mean difference.
        stderr: Its standard error.
        freedom: Degrees of freedom (above 0).
    """
    if stderr == 0:
        return 1.0 if mean == 0 else 0.0
    angle = math.atan(abs(mean / stderr) / math.sqrt(freedom))
    tail, half = (
        float(np.trapezoid(np.cos(grid) ** (freedom - 1), grid))
        for grid in (np.linspace(start, math.pi / 2, 20_001) for start in (angle, 0.0))
    )
    return tail / half


HEAD = ("setting", "seeds", "steps", "epochs", "M tok/s", "MFU", "live", "averaged", "artifact", "score", "change", "p")


def table(groups: list[Group]) -> list[list[str]]:
    """The comparison as cells: `HEAD` and the size names the columns, the first group is what the others change."""
    rows = [[*HEAD, "bytes"]]
    for group in groups:
        difference = change(groups[0], group)
        scores = list(group.scores.values())
        stderr = f" ± {statistics.stdev(scores) / math.sqrt(len(scores)):.4f}" if len(scores) > 1 else ""
        sizes = [run.summary["bytes_total"] for run in group.runs.values() if "bytes_total" in run.summary]
        is_base = group is groups[0]
        rows.append(
            [
                group.name,
                str(len(scores)),
                f"{group.mean_of('steps'):,.0f}",
                f"{group.mean_of('epochs'):.2f}",
                f"{statistics.mean(_speed(run) for run in group.runs.values()):.3f}",
                _mfu(group),
                *(_stage(group, stage) for stage in STAGES),
                f"{group.mean:.4f}{stderr}",
                "" if is_base else f"{difference.mean:+.4f}" + _error(difference),
                "" if difference.p is None or is_base else _p(difference.p),
                f"{max(sizes):,}" if sizes else "",
            ]
        )
    return rows


def _error(difference: Change) -> str:
    pairs = f", {difference.pairs} pairs" if difference.pairs > 1 else ""
    return "" if difference.stderr is None else f" ± {difference.stderr:.4f}{pairs}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _speed(run: RunData) -> float:
    return float(run.summary["train_tokens"] / max(run.summary["train_seconds"], 1e-9) / 1e6)


def _mfu(group: Group) -> str:
    values = [value for run in group.runs.values() for value in run.curves.get("perf/mfu", ([], []))[1]]
    return f"{100 * statistics.mean(values):.1f} %" if values else ""


def _stage(group: Group, stage: str) -> str:
    scores = [run.summary["stages"][stage]["bpb"] for run in group.runs.values() if stage in run.summary["stages"]]
    return f"{statistics.mean(scores):.4f}" if scores else ""


def as_markdown(rows: list[list[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(" ".join(cell.splitlines()) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def why_incomparable(first: RunData, other: RunData) -> str | None:
    """Why the scores of two runs do not compare, or None if they saw and scored the same text.

    Shards without a manifest have no fingerprint of their text; those of two tokenizers cannot be compared then.
    """
    one, two = first.summary, other.summary
    texts = one["text_fingerprint"], two["text_fingerprint"]
    if None in texts and one["tokenizer_sha256"] != two["tokenizer_sha256"]:
        return "text unknown"
    if None in texts:
        texts = one["shards_fingerprint"], two["shards_fingerprint"]
    if texts[0] != texts[1]:
        return "other text"
    return None if one["val_bytes"] == two["val_bytes"] else "another part of the text"
