"""What a tokenizer's normalisation makes of a text, told to whoever prepares it: bits per byte count what comes out."""

import unicodedata
from collections import Counter

import sentencepiece

SAMPLE_BYTES = 2_000_000
LISTED = 8


class NormalisationSample:
    """Looks at the first documents of a text: which characters the tokenizer replaces, and how often."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        """Begin with an empty sample.

        Args:
            tokenizer: The SentencePiece model whose normalisation is looked at.
        """
        self._tokenizer = tokenizer
        self._documents = self._bytes = self._changed = self._bytes_after = 0
        self._characters: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Take a document, until the sample is full."""
        if self._bytes >= SAMPLE_BYTES:
            return
        after = self._normalised(text)
        self._documents += 1
        self._bytes += len(text.encode())
        self._bytes_after += len(after.encode())
        self._changed += after != text
        self._characters.update(text)

    def _normalised(self, text: str) -> str:
        return str(self._tokenizer.normalize(text)).replace("\u2581", " ")

    def describe(self) -> str:
        """What was found, in one or two lines."""
        said = (
            f"normalisation changed {self._changed:,} of the first {self._documents:,} documents "
            f"({self._bytes:,} bytes became {self._bytes_after:,})"
        )
        replaced = [
            f"{_named(character)} to {after!r} {count:,} times"
            for character, count in self._characters.most_common()
            if not unicodedata.combining(character)  # what becomes of it depends on the letter before
            and (after := self._normalised(f"a{character}a")[1:-1]) != character
        ]
        more = f", and {len(replaced) - LISTED:,} other characters" if len(replaced) > LISTED else ""
        return f"{said}; {', '.join(replaced[:LISTED])}{more}" if replaced else said


def _named(character: str) -> str:
    shown = character if character.isprintable() and not character.isspace() else ""
    return f"U+{ord(character):04X} {shown or unicodedata.name(character, repr(character))}"
