"""`trainer inspect`: the content of a folder of shards, or of a model file."""

from pathlib import Path

import numpy as np
import torch

from trainer.cli.inspect_model import inspect_model
from trainer.cli.parser import CommandParser
from trainer.data.case_markup import has_case_markup, marked_capitals
from trainer.data.manifest import TOKENIZER, check_vocabulary, documents_of
from trainer.data.shards import open_shard
from trainer.data.source import list_shards
from trainer.data.tokenizer import BOS, ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.logging import counted
from trainer.run_folder import RunFolder

BAR_WIDTH = 40


def inspect(path: str, tokenizer: str | None = None, documents: int = 3) -> None:
    """Show the content of a folder of token shards, of an artifact or of a checkpoint.

    Args:
        path: Folder with *_train_*.bin and *_val_*.bin, a file such as artifact.zst, or the folder of a run, whose
            artifact or last checkpoint is shown.
        tokenizer: SentencePiece model; default: tokenizer.model in the folder, or in that of the file's run.
        documents: Number of documents of a folder to show (at least 0).

    Raises:
        UserError: If there is no such path or tokenizer, it is damaged, or the folder holds no shards or no tokenizer.
    """
    if documents < 0:
        raise UserError(f"--documents must be at least 0, not {documents}")
    if tokenizer and not Path(tokenizer).is_file():
        raise UserError(f"--tokenizer {tokenizer}: there is no such file; give a SentencePiece .model file")
    folder = Path(path)
    if folder.is_file():
        inspect_model(folder, Path(tokenizer) if tokenizer else None)
        return
    if not folder.is_dir():
        raise UserError(
            f"{path}: there is no such folder or file; give a folder with token shards, such as "
            "data/python-documentation, or a file such as runs/quickstart/1/artifact.zst"
        )
    run = RunFolder(folder)
    for file in (run.artifact, run.last_checkpoint):
        if file.is_file():
            inspect_model(file, Path(tokenizer) if tokenizer else None)
            return
    text = list_shards(folder, Path(tokenizer) if tokenizer else folder / TOKENIZER)
    processor = load_tokenizer(text.tokenizer)
    table = ByteTable.from_tokenizer(processor)
    markup = f"case markup of {marked_capitals(processor)}" if has_case_markup(processor) else "no case markup"
    print(f"{text.tokenizer.name}  {processor.get_piece_size():,} tokens  {markup}")
    lengths: list[np.ndarray] = []
    for split, paths in (("train", text.train), ("val", text.val)):
        for shard in paths:
            tokens = open_shard(shard)
            check_vocabulary(shard, tokens, processor.get_piece_size())
            starts = np.flatnonzero(tokens == BOS)
            lengths.append(np.diff(starts, append=len(tokens)))
            sample = torch.from_numpy(tokens[:1_000_000].astype(np.int32))
            bytes_per_token = int(table.count(sample[:-1], sample[1:]).sum()) / len(sample)
            print(
                f"{split:<5} {shard.name}  {len(tokens):,} tokens  {counted(len(starts), 'document')}  "
                f"{bytes_per_token:.2f} bytes per token (first million)"
            )
    print_histogram(np.concatenate(lengths))
    for index, document in zip(range(documents), documents_of(open_shard(text.train[0])), strict=False):
        shown = processor.decode(document[:200].tolist())
        print(f"\ndocument {index + 1}, {len(document):,} tokens: {shown[:500]}{' ...' if len(shown) > 500 else ''}")


def print_histogram(lengths: np.ndarray) -> None:
    """Print how many documents have which length, in powers of two."""
    if not len(lengths):
        print("no document starts here: the shards hold no BOS")
        return
    print("\ntokens per document")
    classes = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(classes)
    for power in range(int(classes.min()), len(counts)):
        bar = "#" * round(BAR_WIDTH * counts[power] / counts.max())
        print(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,}  {counts[power]:>9,}  {bar}")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(inspect, "inspect data/python-documentation", path={"nargs": None})
