"""The sources of text that `--data.source` knows; their import paths begin here."""

import os
from pathlib import Path

from trainer.data.local_text import LocalText
from trainer.data.manifest import TOKENIZER
from trainer.data.python_documentation import PythonDocumentation
from trainer.data.retokenize import MarkedCopy
from trainer.data.shards import open_shard
from trainer.data.source import PreparedText, Source, list_shards
from trainer.data.tokenizer import load_tokenizer

__all__ = ["LocalText", "PreparedText", "PythonDocumentation", "Shards", "Source"]


class Shards(Source):
    """Token shards that exist already, such as the challenge's FineWeb export."""

    def __init__(self, folder: str = "data/fineweb10B_sp1024", tokenizer: str | None = None) -> None:
        """Use the shards of a folder.

        Args:
            folder: Folder with `*_train_*.bin` and `*_val_*.bin`.
            tokenizer: SentencePiece model; default: `tokenizer.model` in the folder.
        """
        self.folder = Path(folder)
        self.tokenizer = Path(tokenizer) if tokenizer else self.folder / TOKENIZER

    def check(self) -> None:
        """Refuse a folder without shards, and damaged ones; a folder that is not there yet may be made elsewhere."""
        if self.folder.is_dir():
            text = list_shards(self.folder, self.tokenizer)
            for path in (*text.train, *text.val):
                open_shard(path)
            if self.case_markup:
                self._copy().check()

    def is_prepared(self) -> bool:
        """Whether there is a copy with case markup, where one is asked for."""
        return not self.case_markup or self._copy().is_prepared()

    def known_vocab_size(self) -> int | None:
        """That of the shards' tokenizer, once it is there; of a copy, that of the model."""
        if not self.tokenizer.is_file() or (self.case_markup and not self._copy().has_original_vocabulary()):
            return None
        return int(load_tokenizer(self.tokenizer).get_piece_size())

    def prepare(self, only_if_missing: bool = False) -> None:
        """Make the copy with case markup, where one is asked for; else the shards exist."""
        if self.case_markup:
            self._copy().prepare(only_if_missing)

    def prepared(self) -> PreparedText:
        """The shards of the folder, or of the copy."""
        return self._copy().prepared() if self.case_markup else list_shards(self.folder, self.tokenizer)

    def _copy(self) -> MarkedCopy:
        name = Path(os.path.abspath(self.folder)).name
        return MarkedCopy(name, lambda: list_shards(self.folder, self.tokenizer), self.model_vocab_size)
