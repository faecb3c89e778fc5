"""The training stream: which tokens step n of rank r reads, as a pure function.

It has no state, so a resumed run continues at the right token and no worker can lose a batch. It advances by exactly
the tokens of a step; the published loader lost one token per micro-batch and rank.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.shards import TokenFiles
from trainer.errors import UserError

Order = Literal["sequential", "shuffled"]


def check_batch(batch_tokens: int, sequence_length: int, world_size: int) -> None:
    """Refuse a batch that is not a whole number of sequences for each process.

    Raises:
        UserError: If it is not.
    """
    if batch_tokens < 1 or batch_tokens % (sequence_length * world_size):
        raise UserError(
            f"data.batch_tokens {batch_tokens:,} is not a multiple of data.sequence_length {sequence_length:,} "
            f"times {world_size} processes ({sequence_length * world_size:,}); change one of them"
        )


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
        order: Order = "sequential",
        seed: int = 0,
    ) -> None:
        """Cut the tokens of every step out of the training tokens.

        Args:
            files: The training tokens.
            batch_tokens: Tokens of one step over all processes.
            sequence_length: Tokens of one training sequence.
            num_steps: Length of the dataset, in steps.
            rank: Number of this process.
            world_size: Number of processes.
            order: sequential reads one running stream, shard after shard, and continues with the first token after the
                last. shuffled reads every sequence of the shards once per epoch, in an order that seed and epoch
                determine.
            seed: Seed of the order shuffled (at least 0).

        Raises:
            UserError: If the batch is not a whole number of sequences per process, or longer than the data.
        """
        for name, value, minimum in (
            ("batch_tokens", batch_tokens, 1),
            ("sequence_length", sequence_length, 1),
            ("seed", seed, 0),
        ):
            if value < minimum:
                raise UserError(f"data.{name} must be at least {minimum}, not {value}")
        check_batch(batch_tokens, sequence_length, world_size)
        if batch_tokens >= len(files):
            raise UserError(
                f"data.batch_tokens {batch_tokens:,} is more than the training tokens give ({max(len(files), 0):,}); "
                "lower it, or prepare more text"
            )
        self.files = files
        self.length = sequence_length
        self.num_steps = num_steps
        self.rank = rank
        self.order = order
        self.seed = seed
        self.batch_sequences = batch_tokens // sequence_length
        self.local_sequences = self.batch_sequences // world_size
        self.sequences = (len(files) - 1) // sequence_length  # of an epoch, each with the token after it as last target

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Tensor:
        """Tokens of one step and process, each sequence with one look-ahead token for its last target.

        Returns:
            (sequences, sequence_length + 1) int32.
        """
        first = step * self.batch_sequences + self.rank * self.local_sequences
        if self.order == "sequential":
            tokens = self.files.read(first * self.length, self.local_sequences * self.length + 1)
            rows = np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1)[:: self.length]
            return torch.from_numpy(rows.astype(np.int32))
        rows = np.empty((self.local_sequences, self.length + 1), dtype=np.int32)
        for row, number in zip(rows, range(first, first + self.local_sequences), strict=True):
            sequence = int(permutation(self.seed, number // self.sequences, self.sequences)[number % self.sequences])
            row[:] = self.files.read(sequence * self.length, self.length + 1)
        return torch.from_numpy(rows)


@lru_cache(maxsize=2)  # a batch may cross the end of an epoch
def permutation(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of an epoch's sequences, (count,) int64: 40 MB for 10 billion tokens in sequences of 2,048."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
