"""The sources of text that `--data.source` knows; their import paths begin here."""

from pathlib import Path

from trainer.data.local_text import LocalText
from trainer.data.manifest import TOKENIZER
from trainer.data.python_documentation import PythonDocumentation
from trainer.data.shards import open_shard
from trainer.data.source import PreparedText, Source, list_shards
from trainer.data.tokenizer import load_tokenizer

__all__ = ["LocalText", "PreparedText", "PythonDocumentation", "Shards", "Source"]


class Shards(Source):
    """Token shards that exist already, such as the challenge's FineWeb export."""

    def __init__(self, folder: str = "data/fineweb10B_sp1024", tokenizer: str | None = None) -> None:
        """Use the shards of a folder as they are.

        Args:
            folder: Folder with `*_train_*.bin` and `*_val_*.bin`.
            tokenizer: SentencePiece model; default: `tokenizer.model` in the folder.
        """
        self.folder = Path(folder)
        self.tokenizer = Path(tokenizer) if tokenizer else self.folder / TOKENIZER

    def check(self) -> None:
        """Refuse a folder without shards, and damaged ones; a folder that is not there yet may be made elsewhere."""
        if self.folder.is_dir():
            text = self.prepared()
            for path in (*text.train, *text.val):
                open_shard(path)

    def known_vocab_size(self) -> int | None:
        """That of the shards' tokenizer, once it is there."""
        return int(load_tokenizer(self.tokenizer).get_piece_size()) if self.tokenizer.is_file() else None

    def prepare(self, only_if_missing: bool = False) -> None:
        """Do nothing: the shards exist."""

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.tokenizer)
