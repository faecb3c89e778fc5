"""What a tokenizer's normalization changes in a text; bits per byte count the bytes after it."""

import hashlib
import unicodedata
from collections import Counter

import sentencepiece

SAMPLE_BYTES = 2_000_000
LISTED = 8


class DocumentKeys:
    """Equal keys for documents that are the same text, also with other case, spaces, line ends or character forms.

    The splits are made by these keys, so that no near copy of a validation document is trained on.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor | None = None) -> None:
        """Choose the normalization.

        Args:
            tokenizer: SentencePiece model whose own normalization comes first; it may merge more.
        """
        self._tokenizer = tokenizer
        self._folded = sentencepiece.SentencePieceNormalizer(
            rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True, add_dummy_prefix=False, escape_whitespaces=False
        )

    def of(self, text: str) -> bytes:
        """The key of a document: a sha256."""
        if self._tokenizer is not None:
            text = str(self._tokenizer.normalize(text)).replace("\u2581", " ")
        return hashlib.sha256(str(self._folded.normalize(text)).encode()).digest()


class NormalizationSample:
    """Counts, in the first documents of a text, which characters the tokenizer replaces and how often."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        """Start with an empty sample.

        Args:
            tokenizer: SentencePiece model whose normalization is examined.
        """
        self._tokenizer = tokenizer
        self._documents = self._bytes = self._changed = self._bytes_after = 0
        self._characters: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Add a document, unless the sample is full."""
        if self._bytes >= SAMPLE_BYTES:
            return
        after = self._normalized(text)
        self._documents += 1
        self._bytes += len(text.encode())
        self._bytes_after += len(after.encode())
        self._changed += after != text
        self._characters.update(text)

    def _normalized(self, text: str) -> str:
        return str(self._tokenizer.normalize(text)).replace("\u2581", " ")

    def describe(self) -> str:
        """The counts, in one or two lines."""
        summary = (
            f"normalization changed {self._changed:,} of the first {self._documents:,} documents "
            f"({self._bytes:,} bytes became {self._bytes_after:,})"
        )
        replaced = [
            f"{_named(character)} to {after!r} {count:,} times"
            for character, count in self._characters.most_common()
            if not unicodedata.combining(character)  # what becomes of it depends on the letter before
            and (after := self._normalized(f"a{character}a")[1:-1]) != character
        ]
        more = f", and {len(replaced) - LISTED:,} other characters" if len(replaced) > LISTED else ""
        return f"{summary}; {', '.join(replaced[:LISTED])}{more}" if replaced else summary


def _named(character: str) -> str:
    shown = character if character.isprintable() and not character.isspace() else ""
    return f"U+{ord(character):04X} {shown or unicodedata.name(character, repr(character))}"
