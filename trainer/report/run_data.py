"""What a run folder says about its run."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

Series = tuple[list[float], list[float]]  # steps and values


@dataclass(frozen=True)
class RunData:
    """A finished run.

    Attributes:
        folder: Where it lies.
        summary: Content of `summary.json`.
        curves: Series of every metric in `metrics.csv`, by name.
        config: Content of `config.yaml`, flat: `data.order` and so on.
    """

    folder: Path
    summary: dict[str, Any]
    curves: dict[str, Series]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Recipe and number."""
        return f"{self.folder.resolve().parent.name}/{self.folder.resolve().name}"

    @classmethod
    def read(cls, folder: Path) -> "RunData":
        """Read a run folder.

        Raises:
            UserError: If no finished run lies there.
        """
        try:
            summary = json.loads((folder / "summary.json").read_text())
            config = yaml.safe_load((folder / "config.yaml").read_text())
            rows = _rows(folder / "metrics.csv")
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{folder}: holds no finished run ({error}); one has summary.json, metrics.csv and config.yaml"
            ) from error
        curves: dict[str, Series] = {}
        for row in rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["step"]) + 1)
                    values.append(float(value))
        return cls(folder, summary, curves, dict(_flat(config, "")))


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file; none if nothing was logged, as in a very short run."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
