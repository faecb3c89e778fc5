"""Case markup: a capital letter at the start of a word becomes a mark and the small letter, so that both share tokens.

`The cat` is encoded as a mark, `the`, ` cat`, and decoded to `The cat` again. A to Z are marked where a small letter a
to z follows; `I`, `NASA` and `École` stay as they are. The mark comes before a space, so that ` the` stays one token
and BPE can merge the mark with the punctuation before it. The rules are in the SentencePiece model, as its
normalization and denormalization. Sources: OpenNMT Tokenizer's case markup; openai/parameter-golf #1729 (CaseOps).
"""

import string
from pathlib import Path
from typing import Any

import sentencepiece

MARK = "\ue000"  # a code point for private use
REPLACEMENT = "\ufffd"  # stands for a mark that is in the text itself; it has as many bytes
SPACE = "\u2581"  # SentencePiece's visible space


class CaseMarkupProcessor(sentencepiece.SentencePieceProcessor):
    """A tokenizer with case markup, behind SentencePiece's interface.

    Text is normalized as by the challenge's tokenizers before the rules see it: a rule can mark a capital after a
    space, but not remove the second of two spaces before it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a model that was trained with the rules of `write_rules`."""
        super().__init__(model_file=str(path))
        self._normalizer = text_normalizer()

    def normalize(self, input: str) -> str:  # type: ignore[override]
        """The text that decoding restores, with visible spaces."""
        return normalized(self._normalizer, input).replace(" ", SPACE)

    def Encode(self, input: str | list[str], **options: Any) -> Any:  # type: ignore[override]
        """Tokens of a text, or of each of several texts."""
        if isinstance(input, str):
            return super().Encode(normalized(self._normalizer, input), **options)
        return super().Encode([normalized(self._normalizer, text) for text in input], **options)

    encode = Encode  # type: ignore[assignment]

    def Decode(self, input: Any, **options: Any) -> Any:  # type: ignore[override]
        """The text of tokens, without a mark whose letter is missing, as at the end of a text that is cut off."""
        decoded = super().Decode(input, **options)
        return decoded.replace(MARK, "") if isinstance(decoded, str) else [text.replace(MARK, "") for text in decoded]

    decode = Decode  # type: ignore[assignment]


def text_normalizer() -> sentencepiece.SentencePieceNormalizer:
    """The normalization of the challenge's tokenizers, which comes before the rules."""
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=False, escape_whitespaces=False
    )


def normalized(normalizer: sentencepiece.SentencePieceNormalizer, text: str) -> str:
    """A text as the rules get it: normalized, and without marks."""
    return str(normalizer.normalize(text)).replace(MARK, REPLACEMENT)


def has_case_markup(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a model has the rules, when SentencePiece itself opened it."""
    return str(tokenizer.normalize("Aa")) == f"{MARK}aa"


def write_rules(folder: Path) -> tuple[str, str]:
    """Write the rules as files for SentencePiece's trainer.

    Args:
        folder: Where to write them.

    Returns:
        The paths of the rules for normalization and for denormalization.
    """
    letters = [(space, capital, capital.lower()) for space in ("", " ") for capital in string.ascii_uppercase]
    marked = {
        f"{space}{capital}{following}": f"{MARK}{space}{small}{following}"
        for space, capital, small in letters
        for following in string.ascii_lowercase
    }
    restored = {f"{MARK}{space}{small}": f"{space}{capital}" for space, capital, small in letters}
    paths = folder / "normalization.tsv", folder / "denormalization.tsv"
    for path, rules in zip(paths, (marked, restored), strict=True):
        path.write_text("".join(f"{_code_points(old)}\t{_code_points(new)}\n" for old, new in sorted(rules.items())))
    return str(paths[0]), str(paths[1])


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
