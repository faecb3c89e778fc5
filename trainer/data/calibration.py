"""Calibration text: the first training sequences, which loss-aware rounding measures the loss on."""

from collections.abc import Iterator

from torch import Tensor

from trainer.data.shards import TokenFiles
from trainer.data.source import PreparedText
from trainer.data.stream import Order, TrainStream
from trainer.errors import UserError
from trainer.files import sha256_of

MAX_SEQUENCES = 8  # in a batch, whose forward and backward pass is not compiled
MAX_LOGITS = 2**27  # of a batch; they take 3 GB


def calibration_sequences(
    text: PreparedText,
    count: int,
    batch_tokens: int,
    sequence_length: int,
    order: Order,
    seed: int,
    vocab_size: int,
    tokenizer_sha256: str,
    held_out_tokens: int | None = None,
) -> Iterator[Tensor]:
    """The first sequences of a run's training stream.

    Args:
        text: Prepared shards.
        count: Number of sequences.
        batch_tokens: Tokens of a step, as in the run.
        sequence_length: Tokens of a sequence, as in the run.
        order: Order of the sequences, as in the run.
        seed: Seed of the order, as in the run.
        vocab_size: Vocabulary size of the model, which bounds a batch by the size of its logits.
        tokenizer_sha256: sha256 of the tokenizer of the run.
        held_out_tokens: Tokens at the end that the run did not train on.

    Yields:
        (b, sequence_length + 1) int32.

    Raises:
        UserError: If the shards were made with another tokenizer.
    """
    if sha256_of(text.tokenizer) != tokenizer_sha256:
        raise UserError(f"{text.tokenizer}: is not the tokenizer this model was trained with; name its own shards")
    steps = -(-count * sequence_length // batch_tokens)
    files = TokenFiles(text.train, held_out_tokens or 0)
    stream = TrainStream(files, batch_tokens, sequence_length, steps, order=order, seed=seed)
    max_rows = max(1, min(MAX_SEQUENCES, MAX_LOGITS // (sequence_length * vocab_size)))
    for step in range(steps):
        rows = stream[step][:count]
        if int(rows.max()) >= vocab_size:
            raise UserError(
                f"{text.train[0].parent}: holds token {int(rows.max())}, but the vocabulary is {vocab_size:,}"
            )
        yield from rows.split(max_rows)
        count -= len(rows)
