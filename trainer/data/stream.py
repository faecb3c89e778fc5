"""The training stream: which tokens step n of rank r reads, as a pure function.

It has no state, so a resumed run continues at the right token and no worker can lose a batch. It advances by exactly
the tokens of a step; the published loader lost one token per micro-batch and rank.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.shards import TokenFiles
from trainer.errors import UserError


class TrainStream(Dataset[Tensor]):
    """Batches by step number: `stream[step]`."""

    def __init__(
        self,
        files: TokenFiles,
        batch_tokens: int,
        sequence_length: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Cut the tokens of every step out of one running stream.

        Args:
            files: The training tokens; after the last one the stream goes on with the first.
            batch_tokens: Tokens of one step over all ranks.
            sequence_length: Tokens of one training sequence.
            num_steps: Length of the dataset, in steps.
            rank: This process.
            world_size: Number of processes.

        Raises:
            UserError: If the batch is not a whole number of sequences per rank, or longer than the data.
        """
        if batch_tokens % (sequence_length * world_size):
            raise UserError(
                f"data.batch_tokens {batch_tokens:,} is not a multiple of data.sequence_length {sequence_length:,} "
                f"times {world_size} processes ({sequence_length * world_size:,}); change one of them"
            )
        if batch_tokens > len(files):
            raise UserError(
                f"data.batch_tokens {batch_tokens:,} is more than all training tokens ({len(files):,}); "
                "lower it or prepare more text"
            )
        self.files = files
        self.batch_tokens = batch_tokens
        self.local_tokens = batch_tokens // world_size
        self.num_steps = num_steps
        self.rank = rank

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Tensor:
        """Tokens of one step and rank, with one look-ahead token for the last target.

        Returns:
            (local_tokens + 1,) int32.
        """
        start = step * self.batch_tokens + self.rank * self.local_tokens
        return torch.from_numpy(self.files.read(start, self.local_tokens + 1).astype(np.int32))
