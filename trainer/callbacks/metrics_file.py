"""The run's `metrics.csv`, by Lightning's CSVLogger, which would delete the rows of a run that is continued."""

import csv
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from trainer.run_folder import RunFolder

FLUSH_EVERY = 50  # steps


class MetricsFile(CSVLogger):
    """Keeps the rows of the steps before the checkpoint that a run of the same name resumes from."""

    def __init__(self, root: str, recipe: str, run: str) -> None:
        """Log into a run folder.

        Args:
            root: Folder of all recipes.
            recipe: Name of the recipe.
            run: Name of the run.
        """
        super().__init__(root, recipe, run, flush_logs_every_n_steps=FLUSH_EVERY)
        self.resumed_step = 0

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which begins with the rows that are kept."""
        if self._experiment is None:
            kept = self._rows_before(self.resumed_step)
            super().experiment.metrics = kept
            super().experiment.save()
        return super().experiment

    def _rows_before(self, step: int) -> list[dict[str, Any]]:
        path = RunFolder(self.log_dir).metrics
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row and (row.get("step") or "").isdecimal()]
        return [row for row in rows if int(row["step"]) < step]
