"""Case markup: an unexpected capital becomes a mark and its lowercase letter, so that words share their tokens.

`The cat` is encoded as a mark, `the`, ` cat`, and decoded to `The cat` again. After a period, an exclamation or a
question mark and a space a capital is expected, so there it is the lowercase letter that gets the mark: `It is. The
end` is a mark and `it is. the end`. The letters are A to Z and a to z; `I`, `NASA` and `École` stay as they are. The
mark is a token of its own, before the space of its word, so ` the` stays one token. The rules are in the SentencePiece
model, as its normalization and denormalization. Sources: OpenNMT Tokenizer's case markup; openai/parameter-golf #1729
(CaseOps).
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

MARK = "\ue000"  # for private use; in a text it becomes REPLACEMENT
DELIMITER = "\ue001"  # keeps the mark apart from other characters while a tokenizer is trained
REPLACEMENT = "\ufffd"  # has as many bytes as the mark
SPACE = "\u2581"  # SentencePiece's visible space
RULES = 2  # number of their version; copies of shards that were made with others are made anew
SENTENCE_ENDS = ".!?"
# A letter that needs a mark, with the space before it: a small one after the end of a sentence, or a capital elsewhere.
UNEXPECTED = re.compile(
    rf"(?<=[{SENTENCE_ENDS}]) [a-z](?=[a-z])|(?<![{SENTENCE_ENDS}] )(?:(?<![{SENTENCE_ENDS}]) )?[A-Z](?=[a-z])"
)


class CaseMarkupProcessor(sentencepiece.SentencePieceProcessor):
    """A tokenizer with case markup, behind SentencePiece's interface.

    Text is normalized as by the challenge's tokenizers before the rules of the model see it: a rule can mark a capital
    after a space, but not remove the second of two spaces before it.
    """

    def __init__(self, path: str | Path, normalizes: bool = True) -> None:
        """Open a model that was trained with case markup.

        Args:
            path: The model file.
            normalizes: Whether texts are normalized; those that are decoded from tokens are normalized already.
        """
        super().__init__(model_file=str(path))
        self._normalizer = _text_normalizer() if normalizes else None

    def Normalize(self, input: str | list[str]) -> Any:  # type: ignore[override]
        """The text that decoding restores, or each of several texts, with visible spaces."""
        return _each(lambda text: _normalized(self._normalizer, text).replace(" ", SPACE), input)

    def Encode(self, input: str | bytes | list[str], *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Tokens of a text, or of each of several texts."""
        input = input.decode() if isinstance(input, bytes) else input
        return super().Encode(_each(lambda text: _normalized(self._normalizer, text), input), *args, **options)

    def Decode(self, input: Any, *args: Any, **options: Any) -> Any:
        """The text of tokens, without a mark whose letter is missing, as at the end of a text that is cut off."""
        return _each(lambda text: text.replace(MARK, ""), super().Decode(input, *args, **options))

    normalize = Normalize  # type: ignore[assignment]
    encode = tokenize = Tokenize = Encode  # type: ignore[assignment]
    decode = detokenize = Detokenize = Decode


def has_case_markup(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a tokenizer was trained with case markup."""
    return MARK in tokenizer.encode("Aa", out_type=str)


def marked_capitals(tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """Which capitals before a lowercase letter a tokenizer with case markup marks; until 84e8666 it was all of them."""
    marks_starts = MARK in tokenizer.encode("a. Aa", out_type=str)
    return "all capitals" if marks_starts else "capitals that do not follow the end of a sentence"


def training_text(sentences: Iterable[str]) -> Iterator[str]:
    """Sentences with marks, which SentencePiece's trainer must be told to keep apart at DELIMITER.

    The capitals that need no mark are left to the rules, which the trainer applies.
    """
    normalizer = _text_normalizer()
    for sentence in sentences:
        text = _normalized(normalizer, sentence).replace(DELIMITER, REPLACEMENT)
        yield UNEXPECTED.sub(lambda match: f"{DELIMITER}{MARK}{DELIMITER}{match[0].lower()}", text)


def write_rules(folder: Path) -> tuple[str, str]:
    """Write the rules as files for SentencePiece's trainer.

    Args:
        folder: Where to write them.

    Returns:
        The paths of the rules for normalization and for denormalization.
    """
    marked: dict[str, str] = {}
    restored: dict[str, str] = {}
    for small, capital in zip(string.ascii_lowercase, string.ascii_uppercase, strict=True):
        for space in ("", " "):
            restored[f"{MARK}{space}{small}"] = f"{space}{capital}"
        restored |= {f"{end}{MARK} {small}": f"{end} {small}" for end in SENTENCE_ENDS}
        for following in string.ascii_lowercase:
            word, title = small + following, capital + following
            marked |= {f"{space}{title}": f"{MARK}{space}{word}" for space in ("", " ")}
            marked |= {f"{end} {title}": f"{end} {word}" for end in SENTENCE_ENDS}
            marked |= {f"{end} {word}": f"{end}{MARK} {word}" for end in SENTENCE_ENDS}
            restored |= {f"{end} {word}": f"{end} {title}" for end in SENTENCE_ENDS}
    paths = folder / "normalization.tsv", folder / "denormalization.tsv"
    for path, rules in zip(paths, (marked, restored), strict=True):
        path.write_text("".join(f"{_code_points(old)}\t{_code_points(new)}\n" for old, new in sorted(rules.items())))
    return str(paths[0]), str(paths[1])


def _text_normalizer() -> sentencepiece.SentencePieceNormalizer:
    """The normalization of the challenge's tokenizers, which comes before the rules."""
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=False, escape_whitespaces=False
    )


def _normalized(normalizer: sentencepiece.SentencePieceNormalizer | None, text: str) -> str:
    """A text as the rules get it: normalized, and without marks."""
    return (text if normalizer is None else str(normalizer.normalize(text))).replace(MARK, REPLACEMENT)


def without_paths(model: bytes) -> bytes:
    """A model without the paths of the rules that it was trained with, which are others each time.

    Args:
        model: The serialized message of SentencePiece's sentencepiece_model.proto. Its fields 3 and 5 specify the
            normalization and the denormalization, and their field 6 is the path.
    """
    fields = []
    for number, field, content in _fields(model):
        if number in (3, 5):
            content = b"".join(inner for name, inner, _ in _fields(content) if name != 6)
            field = field[:1] + _as_varint(len(content)) + content
        fields.append(field)
    return b"".join(fields)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The fields of a Protocol Buffers message: number, the whole field, and its content if it has a length."""
    position = 0
    while position < len(message):
        start = position
        key, position = _varint(message, position)
        size, position = _varint(message, position)  # or the number itself
        content = message[position : position + size] if key % 8 == 2 else b""
        position += len(content)
        yield key // 8, message[start:position], content


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the position after it."""
    end = position
    while message[end] > 127:
        end += 1
    return sum(byte % 128 << 7 * index for index, byte in enumerate(message[position : end + 1])), end + 1


def _as_varint(number: int) -> bytes:
    return bytes([number % 128 + 128]) + _as_varint(number // 128) if number > 127 else bytes([number])


def _each(change: Callable[[str], str], texts: Any) -> Any:
    """Change a text, or each of several texts; what is no text stays as it is."""
    if isinstance(texts, str):
        return change(texts)
    return [_each(change, text) for text in texts] if isinstance(texts, list) else texts


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
