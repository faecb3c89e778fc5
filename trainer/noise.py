"""What libraries say in a normal run and nobody can do anything about, silenced message by message."""

import logging
import re
import sys
import warnings


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; each filter is as narrow as its message."""
    # Advertisements, device tables and advice that does not apply; our progress callback says what runs where.
    noise = re.compile(
        r"💡|GPU available|TPU available|HPU available|`Trainer|`weights_only` was not set|Using bfloat16 Auto|"
        r"Using 16bit Auto|You are using a CUDA device|LOCAL_RANK|An \w+ was raised with message|"
        r"(\[rank: \d+\] )?Seed set to"
    )
    for name in ("lightning.pytorch", "lightning.fabric"):
        for logger in (name, f"{name}.utilities.rank_zero", f"{name}.utilities.seed", f"{name}.accelerators.cuda"):
            logging.getLogger(logger).addFilter(lambda record: not noise.match(record.getMessage()))
    # One worker-less loader is right here: a batch is a slice of a memory map.
    warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")
    # The data module's position is a function of the step, so a mid-epoch checkpoint is exact.
    warnings.filterwarnings("ignore", message=r"You're resuming from a checkpoint that ended before the epoch ended")
    # Lightning calls a function of torch's that got a new name.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # The folder is the run's own; only its log lies there yet.
    warnings.filterwarnings("ignore", message=r"Experiment logs directory")
    # Evaluations of the whole split are not an epoch of anything.
    warnings.filterwarnings("ignore", message=r"Trying to infer the `batch_size`")
    # Lightning sets DDP up on a stream of its own; flash-attn-4 passes itself an argument that its compiler dislikes.
    warnings.filterwarnings("ignore", message=r"The AccumulateGrad node's stream does not match")
    warnings.filterwarnings("ignore", message=r"Argument \w+ \(position \d+\) cannot be converted to a JitArgument")
    if not sys.warnoptions:
        # Lightning itself uses calls that torch and jsonargparse announce to remove.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning|jsonargparse|torch")
