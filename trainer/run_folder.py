"""The folder of a run: the names of its files, claiming one, its newest checkpoint, and what it says of its run."""

import contextlib
import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from trainer.errors import UserError
from trainer.files import atomic_write, cannot_read, remove_partials
from trainer.logging import logger
from trainer.rank import rank
from trainer.recipes import flatten

Series = tuple[list[float], list[float]]  # steps and values
# Of a summary:
NUMBERS = (
    "val_bpb",
    "val_loss",
    "val_tokens",
    "val_bytes",
    "steps",
    "epochs",
    "train_tokens",
    "train_seconds",
    "parameters",
)
SIZES = ("bytes_total", "bytes_model", "bytes_code", "bytes_cap")
MAX_NUMBER = 2.0**63
NAMES = ("weights", "shards_fingerprint", "tokenizer_sha256")

HINT = "choose another --trainer.default_root_dir"  # where runs cannot be made
CARD = "README.md"  # beside a stored model, in a run folder or another one


class RunFolder:
    """Paths of a run's files; nothing is read or made until a method says so."""

    def __init__(self, path: str | Path) -> None:
        """Name the files.

        Args:
            path: The folder; need not exist.
        """
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.artifact = self.path / "artifact.zst"
        self.code = self.path / "train_gpt.py"
        self.tokenizer = self.path / "tokenizer.model"
        self.summary = self.path / "summary.json"
        self.log = self.path / "train.log"
        self.report = self.path / "report.html"
        self.card = self.path / CARD
        self.documents = self.path / "documents.csv"  # where `validate --per_document` may write
        self.lock = self.path / ".training"  # while a process trains in the folder

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def containing(cls, file: Path) -> "RunFolder":
        """The run folder of a checkpoint or an artifact, also by another name of the file."""
        folder = file.resolve().parent if file.is_symlink() else file.parent
        if folder.resolve().name != "checkpoints":
            return cls(folder)
        return cls(folder.parent if folder.name == "checkpoints" else folder.resolve().parent)

    @staticmethod
    def recipe_of(config: Path) -> str:
        """Name of a recipe by its file; the config of a run has the recipe of that run."""
        return config.resolve().parent.parent.name if config.name == "config.yaml" else config.stem

    @classmethod
    def claim(cls, parent: Path, name: str | None, reopens: bool = False) -> "RunFolder":
        """Make a folder for a new run. Rank 0 makes it; Lightning tells the other processes its name.

        Args:
            parent: Folder of all runs of a recipe.
            name: Name of the run; default: the next number.
            reopens: Whether a run of this name may exist already, and is continued.

        Raises:
            UserError: If the name is taken or the folder cannot be made.
        """
        if name:
            check_name(parent, name)
        if rank() != 0:
            return cls(parent / (name or "0"))
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for other in map(cls, parent.iterdir()):
                remove_partials(other.path)
                remove_partials(other.checkpoints)
            while True:
                numbers = [int(path.name) for path in parent.iterdir() if path.name.isascii() and path.name.isdecimal()]
                run = cls(parent / (name or str(max(numbers, default=0) + 1)))
                try:
                    run.path.mkdir(parents=True)  # a run that is refused removes the folder of an empty recipe
                    return run
                except FileExistsError as error:  # without a name: another run was faster
                    if reopens:
                        return run
                    if name:
                        hint = "choose another --run_name, or let fit continue it with --ckpt last"
                        raise UserError(f"{run}: this run exists already; {hint}") from error
        except OSError as error:
            raise UserError(f"{parent}: no run folder can be made there ({error.strerror}); {HINT}") from error

    def checkpoint(self, step: int) -> Path:
        """The file of a checkpoint."""
        return self.checkpoints / f"step-{step:09d}.ckpt"

    @staticmethod
    def step_of(checkpoint: Path) -> int | None:
        """The step in the name of a checkpoint; None if somebody has named it otherwise."""
        digits = checkpoint.stem.removeprefix("step-")
        return int(digits) if digits.isascii() and digits.isdecimal() else None

    def step_checkpoints(self) -> list[Path]:
        """The checkpoints that are kept, the oldest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"))

    def remove_if_unused(self) -> None:
        """Remove the folder of a run that was refused before it trained or saved anything."""
        if set(self.path.glob("*")) <= {self.config, self.log, self.tokenizer}:
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # the recipe's folder, if it holds no other run
                self.path.parent.rmdir()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`; the run then counts as finished."""
        with atomic_write(self.summary) as file:
            file.write(json.dumps(summary, indent=2, allow_nan=False).encode())

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None where there is none, or it cannot be used.

        Raises:
            UserError: If it may not be read.
        """
        try:
            summary = json.loads(self.summary.read_text(), parse_constant=_refuse_constant)
            _check_types(summary)
        except PermissionError as error:
            raise cannot_read(error) from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return dict(summary)

    def settings(self) -> dict[str, Any]:
        """The settings of the run by dotted name; none where config.yaml is missing or holds none.

        Raises:
            UserError: If it may not be read.
        """
        try:
            return dict(flatten(yaml.safe_load(self.config.read_text())))
        except PermissionError as error:
            raise cannot_read(error) from error
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            return {}

    def read(self) -> "RunData":
        """What the folder says of its run.

        Raises:
            UserError: If the run has not finished, or its files may not be read.
        """
        if not self.path.is_dir():
            raise UserError(f"{self}: there is no such run folder")
        try:
            summary = json.loads(self.summary.read_text(), parse_constant=_refuse_constant)
            config = yaml.safe_load(self.config.read_text())
            if not isinstance(summary, dict) or not isinstance(config, dict):
                raise ValueError("summary.json or config.yaml holds no settings")
            settings = dict(flatten(config))
            _check_types(summary)
            rows = _rows(self.metrics)
        except PermissionError as error:
            raise cannot_read(error) from error
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            reason = (
                f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else " ".join(str(error).split())
            )
            raise UserError(
                f"{self}: holds no finished run ({reason}); one has summary.json, metrics.csv and config.yaml"
            ) from error
        curves: dict[str, Series] = {}
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(row["step"] + 1)
                    values.append(value)
        return RunData(self, summary, curves, settings)


@dataclass(frozen=True)
class RunData:
    """A finished run.

    Attributes:
        folder: Its folder.
        summary: Content of `summary.json`.
        curves: Series of every metric in `metrics.csv`, by name.
        config: Content of `config.yaml`, flat: `data.order` and so on.
    """

    folder: RunFolder
    summary: dict[str, Any]
    curves: dict[str, Series]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Recipe and name of the run."""
        path = self.folder.path.resolve()
        return f"{path.parent.name}/{path.name}"


def _rows(path: Path) -> list[dict[str, float]]:
    """Numbers of a metrics file by name, row by row; none if nothing was logged, as in a very short run.

    Raises:
        ValueError: If a row but the last is not whole; the last one was cut if the disk was full.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"{path.name}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({name: float(value) for name, value in line.items() if value and name})
            if int(line["step"]) >= MAX_NUMBER:
                raise ValueError
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(f"{path.name}: row {number} is not whole") from error
            logger.warning(f"{path}: its last row is truncated, and left out")
            return rows[: number - 1]
    return rows


def _check_types(summary: dict[str, Any]) -> None:
    """Refuse a summary that was changed by hand, or written by another version.

    Raises:
        ValueError: If a value is missing or of another type.
    """
    checks: list[tuple[str, type | tuple[type, ...]]] = [(name, str) for name in NAMES]
    checks += [("text_fingerprint", (str, type(None))), ("versions", dict)]
    wrong = [name for name, kind in checks if not isinstance(summary.get(name, ()), kind)]
    wrong += [name for name in NUMBERS if not _is_number(summary.get(name))]
    if any(name in summary for name in SIZES):  # of a run that stored an artifact
        wrong += [name for name in SIZES if not _is_number(summary.get(name), int) or summary[name] <= 0]
    if not wrong and not isinstance(summary["versions"].get("device"), str):
        wrong = ["versions"]
    if wrong:
        raise ValueError(f"summary.json: {wrong[0]} is missing or invalid")
    script = summary.get("script", {"name": "", "sha256": ""})
    if not isinstance(script, dict) or not all(isinstance(script.get(name), str) for name in ("name", "sha256")):
        raise ValueError("summary.json: script is missing or invalid")
    stages = summary.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError("summary.json: stages is missing or invalid")
    for stage in stages.values():
        if not all(_is_number(stage.get(name)) for name in ("bpb", "loss", "tokens", "bytes")):
            raise ValueError("summary.json: stages is missing or invalid")


def _is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(cast(float, value)) < MAX_NUMBER


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not a number")


def check_name(parent: Path, name: str) -> None:
    """Refuse a name of a run that leads to another folder.

    Raises:
        UserError: If it does.
    """
    if name != Path(name).name or name == "..":
        raise UserError(f"--run_name {name}: must be the name of a folder in {parent}, not a path")
