"""The callbacks of a run, one idea per file, and the order in which Lightning calls them."""

import lightning.pytorch as pl

from trainer.callbacks.checkpoint import Checkpoints
from trainer.callbacks.export import PostTrainExport, Report
from trainer.callbacks.progress import Progress
from trainer.callbacks.samples import Samples
from trainer.callbacks.stability import StabilityMonitor
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.wallclock import WallclockCutoff
from trainer.callbacks.warm_start import WarmStart
from trainer.callbacks.warmup import CompileWarmup
from trainer.callbacks.weight_averaging import WeightAveraging

# Option prefix and class. The order matters where two callbacks use the same hook:
CALLBACKS: tuple[tuple[str, type[pl.Callback]], ...] = (
    ("warm_start", WarmStart),  # before the warm-up, which must leave the weights alone
    ("warmup", CompileWarmup),  # before the clock starts
    ("wallclock", WallclockCutoff),  # sets the clock that all others read
    ("stability", StabilityMonitor),  # after the last step, before the export
    ("averaging", WeightAveraging),  # before the checkpoint that holds the average
    ("throughput", Throughput),  # after the clock
    ("progress", Progress),  # opens the display that the export uses
    ("samples", Samples),  # after the score of the same validation
    ("export", PostTrainExport),  # after the last snapshot
    ("report", Report),  # reads the summary that the export writes
    ("checkpoints", Checkpoints),  # last, when everything that belongs to a step is done (Lightning moves it there)
)
