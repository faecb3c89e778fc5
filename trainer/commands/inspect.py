"""`trainer inspect`: what lies in a folder of shards."""

from pathlib import Path

import numpy as np
import torch

from trainer.data.manifest import check_vocabulary, documents_of
from trainer.data.shards import open_shard
from trainer.data.sources import list_shards
from trainer.data.tokenizer import BOS, ByteTable, load_tokenizer
from trainer.options import Parser

BAR = 40


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("inspect", "Show what lies in a folder of token shards.", "inspect data/python-documentation")
    parser.add_argument("folder", type=str, help="Folder with *_train_*.bin and *_val_*.bin.")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: tokenizer.model beside.")
    parser.add_argument("--documents", type=int, default=3, help="Documents to show.")
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If the folder holds no shards or no tokenizer.
    """
    options = make_parser().parse_args(words)
    folder = Path(options.folder)
    text = list_shards(folder, Path(options.tokenizer) if options.tokenizer else folder / "tokenizer.model")
    tokenizer = load_tokenizer(text.tokenizer)
    table = ByteTable.from_tokenizer(tokenizer)
    lengths: list[np.ndarray] = []
    for split, paths in (("train", text.train), ("val", text.val)):
        for path in paths:
            tokens = open_shard(path)
            check_vocabulary(path, tokens, tokenizer.get_piece_size())
            starts = np.flatnonzero(tokens == BOS)
            lengths.append(np.diff(starts, append=len(tokens)))
            sample = torch.from_numpy(tokens[:1_000_000].astype(np.int32))
            rate = int(table.count(sample[:-1], sample[1:]).sum()) / len(sample)
            print(
                f"{split:<5} {path.name}  {len(tokens):,} tokens  {len(starts):,} documents  "
                f"{rate:.2f} bytes per token (first million)"
            )
    print_histogram(np.concatenate(lengths))
    for index, document in zip(range(options.documents), documents_of(open_shard(text.train[0])), strict=False):
        shown = tokenizer.decode(document[:200].tolist())
        print(f"\ndocument {index + 1}, {len(document):,} tokens: {shown[:500]}{' ...' if len(shown) > 500 else ''}")


def print_histogram(lengths: np.ndarray) -> None:
    """Documents by length, in powers of two."""
    if not len(lengths):
        print("no document starts here: the shards hold no BOS")
        return
    print("\ntokens a document")
    classes = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(classes)
    for power in range(int(classes.min()), len(counts)):
        bar = "#" * round(BAR * counts[power] / counts.max())
        print(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,}  {counts[power]:>9,}  {bar}")
