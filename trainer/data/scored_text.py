"""Text that is scored without being prepared: its documents as one row of tokens."""

from dataclasses import dataclass

import numpy as np
import sentencepiece

from trainer.data.documents import FIELD, TextFiles, find_files
from trainer.data.shards import TokenArray
from trainer.data.tokenizer import BEGIN, ByteTable, normalized_bytes
from trainer.errors import UserError


@dataclass(frozen=True)
class ScoredText:
    """Which text is scored instead of the validation split.

    Attributes:
        files: Files, folders and glob patterns.
        field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
        source_field: Field or column that says where a document comes from; None: the name of its file says it.
    """

    files: list[str]
    field: str = FIELD
    source_field: str | None = None

    def read(self, tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable) -> tuple[TokenArray, list[str]]:
        """Tokenize the documents, each after a BOS token.

        Returns:
            (n,) uint16, and where each document comes from.

        Raises:
            UserError: If a file cannot be read, or the tokenizer has no tokens for some of its characters.
        """
        pieces, sources = [], []
        try:
            texts = TextFiles(find_files(self.files, "--text"), self.field, self.source_field)
            for text in texts:
                ids = np.array(tokenizer.encode(text), dtype=np.uint16)
                table.check(ids, normalized_bytes(tokenizer, text), str(texts.paths[texts.index]))
                pieces += [BEGIN, ids]
                sources.append(texts.source)
        except UserError as error:  # it may name an option of a source
            words = str(error).replace("--data.source.field", "--text_field").replace("data.source", "--text")
            raise UserError(words) from error
        if self.source_field and not any(sources):
            raise UserError(f"--source_field {self.source_field}: no document has it; name another one")
        return np.concatenate(pieces), sources
